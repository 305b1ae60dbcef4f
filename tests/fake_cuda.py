"""Fake CUDA tensors: run code as if on a GPU, without one.

Inside of `FakeCuda()` tensors have a shape, a type and a device, but no values (PyTorch's FakeTensorMode). An
operation on tensors of two devices fails as on a GPU (only a CPU scalar may be mixed in). Tensors on the CPU are real.
Operations that make the host wait for the device are recorded with the line that called them, and get a plausible
value so that the program goes on: `.item()`, `.cpu()`, boolean indexing, and copies to the device that are not
`non_blocking`, of which `torch.tensor(..., device=...)` is one.

PyTorch's autograd engine asks the driver for the streams of a device, so it cannot run on a fake one. `backward` takes
its place: it visits the same graph and calls the same backward functions, with the engine's checks and reductions.
Pinned memory and random generators of the device do not exist either; inside, memory counts as pinned, and random
numbers come without a generator.
"""

import contextlib
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PACKAGE = str(Path(__file__).parents[1] / "cg3d")
CUDA = torch.device("cuda", 0)
CHECKS = ("geometry/ops.py:check_points",)  # read whether something is wrong: nothing is


def _caller() -> str:
    "The innermost function of cg3d on the stack, as `package/module.py:function`."
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(PACKAGE) and not frame.name.startswith("<"):  # <listcomp>
            return f"{Path(frame.filename).relative_to(PACKAGE).as_posix()}:{frame.name}"
    return "outside"


def _answer(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    "A real tensor on the CPU, in the place of a fake one that the host wants to read."
    with unset_fake_temporarily():
        return torch.ones(tuple(like.shape), dtype=dtype or like.dtype)


class RecordSynchronizations(TorchDispatchMode):
    """Answers operations whose result the host needs, and records the lines that called them.

    What happens on the CPU alone is computed with real tensors."""

    def __init__(self):
        super().__init__()
        self.callers: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        values = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        device = torch.device(kwargs.get("device") or "cpu")
        if device.type == "cpu" and not any(isinstance(value, FakeTensor) for value in values):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        on_cuda = bool(args) and isinstance(args[0], Tensor) and args[0].device.type == "cuda"
        answer = getattr(self, ANSWERS.get(func, ""), None)
        if self.waits_for_the_copy(func, args, kwargs):
            self.callers.append(_caller())
        if func is aten.copy_.default and not on_cuda and args[1].device.type == "cuda":
            self.callers.append(_caller())
            return args[0]
        if answer is None or not on_cuda:
            return func(*args, **kwargs)
        return answer(func, args, kwargs)

    @staticmethod
    def waits_for_the_copy(func, args, kwargs) -> bool:
        "Whether this is a copy from the CPU to the device for which the host waits."
        if func is aten._to_copy.default:
            to, blocking = torch.device(kwargs.get("device") or "cpu"), not kwargs.get("non_blocking")
            return to.type == "cuda" and args[0].device.type == "cpu" and blocking
        if func is aten.copy_.default:
            blocking = not (args + (False,))[2] and not kwargs.get("non_blocking")
            to, source = args[:2]  # a source without axes is what `x[0] = 1.0` writes, by a kernel on a GPU
            return to.device.type == "cuda" and source.device.type == "cpu" and source.ndim > 0 and blocking
        return False

    def scalar(self, func, args, kwargs):
        self.callers.append(caller := _caller())
        kind = args[0].dtype
        return caller not in CHECKS if kind is torch.bool else 1.0 if kind.is_floating_point else 1

    def equal(self, func, args, kwargs):
        self.callers.append(_caller())
        return True

    def copy(self, func, args, kwargs):
        if torch.device(kwargs.get("device") or CUDA).type != "cpu":
            return func(*args, **kwargs)
        self.callers.append(_caller())
        return _answer(args[0], kwargs.get("dtype"))

    def nonzero(self, func, args, kwargs):
        self.callers.append(_caller())
        return self.positions(args[0])

    def bincount(self, func, args, kwargs):
        self.callers.append(_caller())
        length = max(1, (args + (None, 0))[2] or kwargs.get("minlength", 0))
        return torch.empty(length, dtype=torch.int64, device=CUDA)

    def index(self, func, args, kwargs):
        masks = [index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]]
        if any(masks):
            self.callers.append(_caller())
            indices = []
            for index, is_mask in zip(args[1], masks):
                indices += list(self.positions(index).unbind(1)) if is_mask else [index]
            args = (args[0], indices, *args[2:])
        return func(*args, **kwargs)

    def to_list(self, value: Tensor) -> list:
        "In place of `tolist`, which waits once for all values."
        if value.device.type == "cuda":
            self.callers.append(_caller())
        return _answer(value).tolist()

    @staticmethod
    def positions(mask: Tensor) -> Tensor:
        "Positions of half of the entries of a mask, at least one."
        return torch.empty((max(1, mask.numel() // 2), mask.dim()), dtype=torch.int64, device=mask.device)


aten = torch.ops.aten
ANSWERS = {  # operation -> method that answers it
    aten._local_scalar_dense.default: "scalar",
    aten.equal.default: "equal",
    aten._to_copy.default: "copy",
    aten.nonzero.default: "nonzero",
    aten.bincount.default: "bincount",
    aten.index.Tensor: "index",
    aten.index_put.default: "index",
    aten.index_put_.default: "index",
}


class _Gradients:
    "Gradients that wait for their backward function, summed by input."

    def __init__(self):
        self.waiting: dict = {}  # node -> input -> gradient

    def add(self, node, number: int, gradient: Tensor | None) -> None:
        inputs = self.waiting.setdefault(node, {})
        if gradient is None:
            return
        meta = node.variable if hasattr(node, "variable") else node._input_metadata[number]
        if gradient.device != meta.device:
            raise RuntimeError(
                f"{node.name()} gets a gradient on device {gradient.device}, not {meta.device}"
            )
        if gradient.shape != meta.shape:
            gradient = gradient.sum_to_size(meta.shape)  # of what was broadcast
        gradient = gradient.to(meta.dtype)
        inputs[number] = inputs[number] + gradient if number in inputs else gradient

    def call(self, node) -> tuple:  # one gradient for each of `node.next_functions`
        inputs = self.waiting.pop(node, {})
        if hasattr(node, "variable"):  # a leaf
            if 0 in inputs:
                leaf = node.variable
                leaf.grad = inputs[0] if leaf.grad is None else leaf.grad + inputs[0]
            return ()
        if not inputs:
            return (None,) * len(node.next_functions)
        run = node.apply if isinstance(node, BackwardCFunction) else node
        result = run(*(inputs.get(i) for i in range(len(node._input_metadata))))
        return result if isinstance(result, tuple) else (result,)


def backward(
    tensors: Tensor | Sequence[Tensor],
    grad_tensors: Tensor | Sequence[Tensor | None] | None = None,
    *options,  # of the engine; they do not matter here
    **more,
) -> None:
    "`torch.autograd.backward` without the engine: every backward function in this thread, after those it depends on."
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    given = (
        [grad_tensors] if isinstance(grad_tensors, Tensor) else list(grad_tensors or [None] * len(tensors))
    )
    edges = [get_gradient_edge(value) for value in tensors]
    users: dict = {}  # node -> number of nodes that give it a gradient
    nodes, stack = set(), [edge.node for edge in edges]
    while stack:
        node = stack.pop()
        if node in nodes:
            continue
        nodes.add(node)
        for following, _number in node.next_functions:
            if following is not None:
                users[following] = users.get(following, 0) + 1
                stack.append(following)
    gradients = _Gradients()
    with torch.no_grad():
        for edge, value, gradient in zip(edges, tensors, given):
            gradients.add(edge.node, edge.output_nr, torch.ones_like(value) if gradient is None else gradient)
        ready = [node for node in nodes if node not in users]
        while ready:
            node = ready.pop()
            for (following, number), gradient in zip(node.next_functions, gradients.call(node)):
                if following is not None:
                    gradients.add(following, number, gradient)
                    users[following] -= 1
                    if not users[following]:
                        ready.append(following)


class _NoGenerator:
    "In place of a generator on the device: seeding it gives None, PyTorch's own generator."

    def __init__(self, device="cpu"):
        self.device = torch.device(device)

    def manual_seed(self, seed: int) -> torch.Generator | None:
        return None if self.device.type == "cuda" else _GENERATOR(self.device).manual_seed(seed)


_GENERATOR = torch.Generator


def _no_inference_mode(mode: bool = True) -> contextlib.AbstractContextManager:
    "In place of `torch.inference_mode`, in which operations such as `.item()` reach a mode as one."
    return torch.no_grad() if mode else contextlib.nullcontext()


@contextlib.contextmanager
def fake_cuda():
    "Inside, `torch.rand(..., device=CUDA)` makes a fake tensor; yields the recorder of synchronizations."
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch("torch.autograd.backward", backward))
        stack.enter_context(patch("torch.nn.Module._apply", _apply))
        stack.enter_context(patch("torch.inference_mode", _no_inference_mode))
        stack.enter_context(patch("torch.Generator", _NoGenerator))
        stack.enter_context(patch("torch.Tensor.pin_memory", lambda value, device=None: value))
        stack.enter_context(patch("torch.Tensor.is_pinned", lambda value, device=None: True))
        stack.enter_context(patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False))
        stack.enter_context(patch("torch.cuda.is_bf16_supported", lambda including_emulation=True: True))
        stack.enter_context(
            patch("torch.cuda.get_rng_state", lambda device=None: torch.empty(16, dtype=torch.uint8))
        )
        stack.enter_context(patch("torch.cuda.set_rng_state", lambda state, device=None: None))
        stack.enter_context(patch("torch.cuda.manual_seed", lambda seed: None))
        stack.enter_context(patch("torch.cuda.device", lambda device: contextlib.nullcontext()))
        stack.enter_context(FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True))
        recorder = stack.enter_context(RecordSynchronizations())
        stack.enter_context(patch.object(FakeTensor, "tolist", lambda value: recorder.to_list(value)))
        yield recorder


def _apply(module: nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    "In place of `Module._apply`, behind `.to()` and `.cpu()`: fake tensors cannot take the place of others."
    for child in module.modules() if recurse else [module]:
        for name, value in list(child._parameters.items()):
            if value is not None and _differs(value, new := convert(value.detach())):
                child._parameters[name] = nn.Parameter(new, requires_grad=value.requires_grad)
        for name, value in list(child._buffers.items()):
            if value is not None and _differs(value, new := convert(value)):
                child._buffers[name] = new
    return module


def _differs(value: Tensor, new: Tensor) -> bool:
    return (value.device, value.dtype) != (new.device, new.dtype)


def fake_module(module: nn.Module) -> nn.Module:
    "The module with every parameter and buffer replaced by a fake CUDA tensor; call inside of `fake_cuda`."
    return module.to_empty(device=CUDA)


def fake_cloud(batch: int = 4, points: int = 512, channels: int = 6) -> Tensor:
    "A fake batch of clouds on CUDA; call inside of `fake_cuda`."
    return torch.rand(batch, points, channels, device=CUDA)
