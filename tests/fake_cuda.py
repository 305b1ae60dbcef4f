"""Fake CUDA tensors: run code as if on a GPU, without one.

Inside of `FakeCuda()` tensors have a shape, a type and a device, but no values (PyTorch's FakeTensorMode). An
operation on tensors of two devices fails as on a GPU (only a CPU scalar may be mixed in). Operations that would make
the host wait for the device (`.item()`, boolean indexing) are recorded with the line that called them, and get a
plausible value so that the program goes on. Backward passes need a real device: the autograd engine has a thread a GPU.
"""

import contextlib
import traceback
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

PACKAGE = str(Path(__file__).parents[1] / "cg3d")
CUDA = torch.device("cuda", 0)


def _caller() -> str:
    "The innermost line of cg3d on the stack, as `package/module.py:function`."
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(PACKAGE):
            return f"{Path(frame.filename).relative_to(PACKAGE).as_posix()}:{frame.name}"
    return "outside"


class RecordSynchronizations(TorchDispatchMode):
    "Answers operations whose result the host needs, and records the lines that called them."

    def __init__(self):
        super().__init__()
        self.callers: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        aten = torch.ops.aten
        on_cuda = bool(args) and isinstance(args[0], Tensor) and args[0].device.type == "cuda"
        if on_cuda and func is aten._local_scalar_dense.default:
            self.callers.append(_caller())
            kind = args[0].dtype
            return True if kind is torch.bool else 1.0 if kind.is_floating_point else 1
        if on_cuda and func is aten.nonzero.default:
            self.callers.append(_caller())
            return self._positions(args[0])
        if on_cuda and func is aten.bincount.default:
            self.callers.append(_caller())
            return torch.empty(
                max(1, (args + (None, 0))[2] or kwargs.get("minlength", 0)), dtype=torch.int64, device=CUDA
            )
        if on_cuda and func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            masks = [index for index in args[1] if index is not None and index.dtype is torch.bool]
            if masks:
                self.callers.append(_caller())
                indices = []
                for index in args[1]:
                    is_mask = index is not None and index.dtype is torch.bool
                    indices += list(self._positions(index).unbind(1)) if is_mask else [index]
                args = (args[0], indices, *args[2:])
        return func(*args, **kwargs)

    @staticmethod
    def _positions(mask: Tensor) -> Tensor:
        "Positions of half of the entries of a mask, at least one."
        return torch.empty((max(1, mask.numel() // 2), mask.dim()), dtype=torch.int64, device=mask.device)


@contextlib.contextmanager
def fake_cuda():
    "Inside, `torch.rand(..., device=CUDA)` makes a fake tensor; yields the recorder of synchronizations."
    with FakeTensorMode(shape_env=ShapeEnv()), RecordSynchronizations() as recorder:
        yield recorder


def fake_module(module: nn.Module) -> nn.Module:
    "The module with every parameter and buffer replaced by a fake CUDA tensor; call inside of `fake_cuda`."
    for child in module.modules():
        for name, value in list(child._parameters.items()):
            if value is not None:
                fake = torch.empty(value.shape, dtype=value.dtype, device=CUDA)
                child._parameters[name] = nn.Parameter(fake, requires_grad=value.requires_grad)
        for name, value in list(child._buffers.items()):
            if value is not None:
                child._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device=CUDA)
    return module


def fake_cloud(batch: int = 4, points: int = 512, channels: int = 6) -> Tensor:
    "A fake batch of clouds on CUDA; call inside of `fake_cuda`."
    return torch.rand(batch, points, channels, device=CUDA)
