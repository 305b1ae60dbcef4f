"""Checks on a real GPU: `pytest -m gpu tests/test_gpu.py`; skipped where there is none.

Results are compared with the CPU's. `CG3D_TEST_DEVICE=cpu pytest tests/test_gpu.py` runs every check on the CPU,
against itself, which shows that the bodies work; what only a GPU has (its memory counters, its kernels' times) is left
out there. None has met a GPU yet. The numbers of the twelve checks are in the comments."""

import copy
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from published_layouts import write_layout
from torch import nn
from torch.profiler import ProfilerActivity, profile

import cg3d
from cg3d.core.distributed import (
    _AllGather,
    _AllReduceSum,
    clip_gradients,
    full_tensors,
    is_sharded,
    shard_module,
)
from cg3d.core.timing import added_memory
from cg3d.data.furniture import furniture
from cg3d.evaluation.linear_probe import few_shot, linear_probe
from cg3d.evaluation.zero_shot import zero_shot
from cg3d.geometry.ops import ball_query, farthest_point_sample, knn, normalize
from cg3d.models.layers import compile_encoder, group_points
from cg3d.models.registry import create_encoder, list_encoders
from cg3d.pretrained.loading import load_published
from cg3d.render.cameras import ring_views
from cg3d.render.mesh import render_mesh
from cg3d.render.points import render_points
from cg3d.render.view_cache import ViewCache
from cg3d.scenes.grounding import query_scene
from cg3d.scenes.synthetic_rooms import RoomSettings, compose_room
from cg3d.search.batch_embed import BatchEmbedder
from cg3d.search.index import ShapeIndex
from cg3d.training.callbacks import Callback
from cg3d.training.config import TrainConfig
from cg3d.training.finetune import FineTuneConfig, fine_tune
from cg3d.training.grad_cache import grad_cache
from cg3d.training.init import examples
from cg3d.training.losses import POSITIVES, TriModalLoss
from cg3d.training.pretrain import make_learner, make_model, make_triplets, read_data

DEVICE = torch.device(os.environ.get("CG3D_TEST_DEVICE") or "cuda:0")
ON_GPU = DEVICE.type == "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.fixture(autouse=True)
def full_precision():
    "Matrix products without TF32, as comparisons with the CPU need."
    precision, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = cudnn


def clouds(count=4, points=1024, seed=0):
    generator = torch.Generator().manual_seed(seed)
    xyz = normalize(torch.randn(count, points, 3, generator=generator))
    return torch.cat([xyz, torch.rand(count, points, 3, generator=generator)], -1)


def model_of(name, folder):
    "An encoder of the registry, or of a published layout filled with random numbers."
    if "/" in name:
        return load_published(write_layout(folder / "weights.pt", name), device="cpu").encoder
    torch.manual_seed(0)
    return create_encoder(name).eval()


ENCODERS = [*list_encoders(), "cg3d/pointmlp", "openshape/vitb32", "uni3d/ti"]


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_have_the_outputs_of_the_cpu(name, tmp_path):  # (1), (2)
    """Float32 on both devices, and bf16, whose groups are those of float32."""
    encoder = model_of(name, tmp_path)
    there = copy.deepcopy(encoder).to(DEVICE)
    xyz = clouds(2, encoder.contract.points if "/" in name else 1024)
    rules = [module.grouping for module in encoder.modules() if hasattr(module, "grouping")][:1]
    with torch.no_grad():
        expected = encoder(xyz)
        found = there(xyz.to(DEVICE))
        with torch.autocast(DEVICE.type, torch.bfloat16):
            half = there(xyz.to(DEVICE)).float()
            groups = [rule(xyz[..., :3].to(DEVICE)) for rule in rules]
        wanted = [rule(xyz[..., :3]) for rule in rules]
    scale = expected.abs().max()
    assert (found.cpu() - expected).abs().max() < 1e-4 * scale
    assert 0 < (half.cpu() - expected).abs().max() < 0.1 * scale
    for here, other in zip(wanted, groups, strict=True):
        assert torch.equal(other[0].cpu(), here[0])
        assert torch.equal(other[1].sort(-1).values.cpu(), here[1].sort(-1).values)


def test_groups_do_not_depend_on_the_precision():  # (2)
    xyz = clouds(4, 2048)[..., :3].bfloat16()
    center, around = group_points(xyz.float(), 128, 24)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found = group_points(xyz.to(DEVICE), 128, 24)
    assert torch.equal(found[0].cpu(), center) and torch.equal(found[1].cpu(), around)


def test_searches_find_the_same_points():  # (1)
    xyz = clouds(4, 2048)[..., :3]
    there = xyz.to(DEVICE)
    chosen = farthest_point_sample(xyz, 256)
    assert torch.equal(farthest_point_sample(there, 256).cpu(), chosen)
    assert torch.equal(
        farthest_point_sample(there, 64, start=7, skip_below=1e-3).cpu(),
        farthest_point_sample(xyz, 64, start=7, skip_below=1e-3),
    )
    distance, nearest = knn(xyz[:, :128], xyz, 32)
    distance_there, nearest_there = knn(there[:, :128], there, 32)
    assert torch.equal(nearest_there.cpu(), nearest)
    torch.testing.assert_close(distance_there.cpu(), distance, atol=1e-6, rtol=1e-5)
    inside = ball_query(xyz[:, :128], xyz, 0.2, 32)
    assert torch.equal(ball_query(there[:, :128], there, 0.2, 32).cpu(), inside)


@pytest.mark.parametrize("positives", POSITIVES)
def test_losses_have_the_gradients_of_the_cpu(positives):  # (4)
    generator = torch.Generator().manual_seed(0)
    texts = ["a chair", "a bed", "a chair", *(f"thing {i}" for i in range(21))]
    results = []
    for device in ("cpu", DEVICE):
        generator.manual_seed(0)
        sides = [torch.randn(24, 64, generator=generator).to(device).requires_grad_() for _ in range(3)]
        loss = TriModalLoss(positives=positives, hard_negatives=0.3).to(device)(*sides, texts)["loss"]
        loss.backward()
        results.append([loss.detach().cpu(), *(side.grad.cpu() for side in sides)])
    for here, there in zip(*results, strict=True):
        torch.testing.assert_close(there, here, atol=1e-5, rtol=1e-4)


def test_collectives_of_one_process(tmp_path):  # (7)
    backend = "nccl" if ON_GPU else "gloo"
    if ON_GPU:
        torch.cuda.set_device(DEVICE)
    dist.init_process_group(backend, init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        rows = torch.randn(4, 3, device=DEVICE, requires_grad=True)
        for function in (_AllGather, _AllReduceSum):
            rows.grad = None
            result = function.apply(rows)
            (result * torch.arange(12.0, device=DEVICE).view(4, 3)).sum().backward()
            assert torch.equal(result, rows)
            assert rows.grad.flatten().tolist() == list(range(12))
    finally:
        dist.destroy_process_group()


def test_views_are_those_of_the_cpu():  # (3)
    angles = ring_views(3)
    xyz = furniture().points([0, 100, 200])
    expected, found = render_points(xyz, *angles), render_points(xyz.to(DEVICE), *angles)
    assert found.device == DEVICE and (found.cpu() - expected).abs().mean() < 1e-3
    assert expected.std() > 0.05


def test_mesh_views_are_those_of_the_cpu():  # (3)
    renderer = pytest.importorskip("pytorch3d.renderer", exc_type=ImportError)
    from pytorch3d.structures import Meshes

    corners = torch.tensor([[-1.0, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]])
    textures = renderer.TexturesVertex([torch.rand(4, 3, generator=torch.Generator().manual_seed(0))])
    square = Meshes([corners], [torch.tensor([[0, 1, 2], [0, 2, 3]])], textures)
    expected = render_mesh(square, *ring_views(2), size=64)
    found = render_mesh(square.to(DEVICE), *ring_views(2), size=64)
    assert found.device == DEVICE and (found.cpu() - expected).abs().mean() < 1e-3
    assert expected.std() > 0.05


def memory_of(run):  # bytes
    "Highest memory that a call adds."
    if not ON_GPU:
        return added_memory(run) * 2**20
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_parts_have_the_gradients_of_the_whole_and_the_memory_of_one():  # (4)
    torch.manual_seed(0)
    encoder = create_encoder("pointmlp_small").to(DEVICE).eval()  # without the statistics of batch norm
    xyz = clouds(256, 256).to(DEVICE)
    aim = torch.randn(256, encoder.dim, generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def gradients(rows, part):
        encoder.zero_grad(set_to_none=True)
        (out,), finish = grad_cache(lambda piece: (encoder(piece),), xyz[:rows].split(part), encoder, DEVICE)
        nn.functional.cosine_similarity(out, aim[:rows]).mean().backward()
        finish()
        return [value.grad.clone() for value in encoder.parameters()]

    memory = {(rows, part): memory_of(lambda: gradients(rows, part)) for rows, part in ((32, 32), (256, 32))}
    memory[256, 256] = memory_of(lambda: gradients(256, 256))
    print({key: f"{value / 2**20:.0f} MiB" for key, value in memory.items()})
    assert memory[256, 32] < 0.5 * memory[256, 256]
    if ON_GPU:
        assert memory[256, 32] < 1.3 * memory[32, 32]
    scale = max(value.abs().max() for value in gradients(256, 256))
    for whole, parts in zip(gradients(256, 256), gradients(256, 32), strict=True):
        assert (whole - parts).abs().max() < 1e-4 * scale


SCHEDULES = {
    "joint": {"visual_prompt": "deep"},
    "alternate": {"visual_prompt": "pixel", "part": 2, "image_augment": True},
    "frozen": {"visual_prompt": "none"},
}


class StopAt(Callback):
    def __init__(self, step):
        self.step = step

    def after_step(self, learner):
        if learner.step == self.step:
            raise KeyboardInterrupt


def training(tmp_path, monkeypatch, name, schedule, *callbacks, **changes):
    "A learner of 16 bundled shapes, four steps an epoch, as the job makes it."
    monkeypatch.setenv("CG3D_CACHE", str(tmp_path / "cache"))
    config = TrainConfig(
        encoder="pointnet",
        clip_weights="random",
        limit=16,
        points=128,
        views=2,
        view_size=32,
        batch_size=4,
        min_shapes=2,
        schedule=schedule,
        device=str(DEVICE),
        precision="fp32",
        out=str(tmp_path / name),
        **SCHEDULES[schedule],
    )
    config = replace(config, **changes)
    triplets = make_triplets(read_data("furniture"), config, progress=False)
    learner = make_learner(config, config.out, triplets, make_model(config), progress=False)
    learner.callbacks += callbacks
    return learner


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_twenty_steps_and_a_resumed_run(schedule, tmp_path, monkeypatch):  # (5); on a CPU eight steps
    epochs = 5 if ON_GPU else 2
    whole = training(tmp_path, monkeypatch, "whole", schedule, epochs=epochs).fit()
    training(tmp_path, monkeypatch, "half", schedule, StopAt(2 * epochs + 2), epochs=epochs).fit()
    again = training(tmp_path, monkeypatch, "half", schedule, epochs=epochs, resume=True).fit()
    assert whole.step == again.step == 4 * epochs and not whole.skipped
    assert {value.device for value in again.model.encoder.parameters()} == {DEVICE}
    for value, other in zip(whole.model.encoder.parameters(), again.model.encoder.parameters(), strict=True):
        # a GPU adds gradients in no fixed order
        torch.testing.assert_close(value, other, atol=1e-3 if ON_GPU else 0, rtol=1e-2 if ON_GPU else 0)


def test_probe_few_shot_fine_tuning_and_evaluation(tmp_path):  # (6)
    """Nothing moves the model of its caller: the last line would fail."""
    model = cg3d.load("nano", device=DEVICE)
    shapes = furniture()
    chosen = shapes.select(shapes.table["category"].isin(["chair", "bed", "table lamp"]).to_numpy())
    train, test = chosen.select(split="train"), chosen.select(split="test")
    assert linear_probe(model, train, test, cache=tmp_path)["accuracy"][0] > 50
    assert few_shot(model, train, test, shots=(2,), seeds=2, cache=tmp_path)["accuracy"][0] > 40
    config = FineTuneConfig(epochs=1, min_steps=4, batch_size=8, points=256, device=str(DEVICE))
    tuned = fine_tune(
        model, examples(train), config, watch=examples(test, sorted(set(train.table["category"])))
    )
    assert tuned.history["loss"].notna().all() and tuned.history["test"].notna().any()
    table = zero_shot(model, test, ["chair", "bed", "table lamp"])
    assert table["top1"].max() > 60
    vectors = model.encode_shape(test[0])
    assert vectors.device == DEVICE and abs(vectors.norm().item() - 1) < 1e-5


def test_a_sharded_encoder_in_one_process(tmp_path):  # (7)
    if ON_GPU:
        torch.cuda.set_device(DEVICE)
    backend = "nccl" if ON_GPU else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        plain = create_encoder("point_transformer_small", groups=16).to(DEVICE).eval()
        sharded, xyz = copy.deepcopy(plain), clouds(2, 256).to(DEVICE)
        shard_module(sharded)
        assert all(map(is_sharded, sharded.parameters()))
        norms = []
        for encoder in (plain, sharded):
            encoder(xyz).square().mean().backward()
            norms.append(clip_gradients(list(encoder.parameters()), 1e-3))
        assert norms[0] == pytest.approx(norms[1], rel=1e-4)
        whole = full_tensors({name: value.grad for name, value in sharded.named_parameters()})
        for name, value in plain.named_parameters():
            torch.testing.assert_close(whole[name], value.grad.cpu(), atol=1e-6, rtol=1e-3)
    finally:
        dist.destroy_process_group()


def test_two_processes_on_one_device(tmp_path):  # (7)
    """Gradients of two processes with eight shapes each, over Gloo, are those of one process with sixteen."""
    worker = Path(__file__).with_name("gradients_worker.py")
    results = []
    for count, batch in ((1, 16), (2, 8)):
        launcher = ("-m", "torch.distributed.run", "--nproc-per-node", str(count), "--standalone")
        words = (tmp_path / str(count), "pointnet", batch, "visual_prompt=none", f"device={DEVICE}")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CG3D_TEST_BACKEND": "gloo"}
        command = [sys.executable, *(launcher if count > 1 else ()), worker, *words]
        done = subprocess.run(
            [str(word) for word in command], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        results.append(torch.load(tmp_path / str(count) / "gradients.pt", map_location="cpu"))
    one, two = (result["gradients"] for result in results)
    assert [result["world"] for result in results] == [1, 2]
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-5


def test_a_compiled_encoder_is_translated_once():  # (8)
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return torch._inductor.compile(graph, inputs) if ON_GPU else graph.forward

    encoder = create_encoder("pointmlp_small").to(DEVICE)
    real = torch.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda module: real(module, backend=count))
        encode = compile_encoder(encoder)
    for seed in range(14):
        encode(clouds(4, 256, seed).to(DEVICE))
    assert len(graphs) == 1, "the first ten batches are not compiled, the others are by one graph"
    expected = encoder.eval()(clouds(4, 256).to(DEVICE))
    assert (encode(clouds(4, 256).to(DEVICE)) - expected).abs().max() < 1e-3 * expected.abs().max()
    assert len(graphs) == 2, "evaluation is another graph"


def waits_of(run):
    "How often the host waits for the device."
    if not ON_GPU:
        counter = HostReads()
        with counter:
            run()
        return counter.count
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(entry.message) for entry in caught)


class HostReads(torch.overrides.TorchFunctionMode):
    "Counts reads of numbers that a GPU would have to be waited for; rows and views are read where they are."

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in {"item", "tolist", "__bool__", "__int__", "__float__", "nonzero", "numpy", "cpu"}:
            self.count += isinstance(args[0], torch.Tensor) and args[0].is_floating_point()
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_two_synchronizations_a_step(schedule, tmp_path, monkeypatch):  # (9)
    learner = training(tmp_path, monkeypatch, "run", schedule, epochs=5, augment="none")
    learner.model.train()
    for _ in range(12):  # features are cached, batch norm has its usual momentum
        learner.one_step()
    counts = [waits_of(learner.one_step) for _ in range(2)]
    learner.reader.shutdown()
    assert 0 < max(counts) <= 2, counts


def test_profile_of_a_step():  # (10)
    encoder = create_encoder("pointmlp_small" if not ON_GPU else "pointmlp").to(DEVICE)
    xyz = clouds(4 if not ON_GPU else 64).to(DEVICE)

    def step():
        with torch.autocast(DEVICE.type, torch.bfloat16):
            out = encoder(xyz)
        out.float().square().mean().backward()

    for _ in range(12):
        step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ON_GPU else [])]
    with profile(activities=activities) as profiled:
        step()
        if ON_GPU:
            torch.cuda.synchronize()
    events = profiled.key_averages()
    print(events.table(sort_by="self_cuda_time_total" if ON_GPU else "self_cpu_time_total", row_limit=12))
    names = {event.key for event in events}
    assert (
        "cg3d::group_points" in names
        and not {"aten::item", "aten::nonzero", "aten::_local_scalar_dense"} & names
    )


def test_index_scene_and_classification():  # (11)
    shapes = furniture().select(split="test")
    here, there = cg3d.load("nano", device="cpu"), cg3d.load("nano", device=DEVICE)
    few = [shapes[row] for row in range(8)]
    labels = ["chair", "table", "lamp", "bed", "box"]
    expected, found = (model.classify(few, labels, top=1, views=2) for model in (here, there))
    assert found["label"].tolist() == expected["label"].tolist()
    assert (found["probability"] - expected["probability"]).abs().max() < 0.01
    tables = [ShapeIndex.from_items(model, shapes).search("a wooden chair", k=5) for model in (here, there)]
    assert tables[0]["id"].tolist()[0] == tables[1]["id"].tolist()[0]
    room = compose_room(0, settings=RoomSettings(floor_objects=3, small_objects=1, spacing=0.05))
    answers = [query_scene(room, "a chair", model, "instances", progress=False) for model in (here, there)]
    assert (answers[0].indices() == answers[1].indices()).mean() > 0.99


def test_bulk_embedding_goes_on_with_smaller_batches():  # (12)
    """The allocator itself refuses what no machine has."""
    model = cg3d.load("nano", device=DEVICE)
    shapes = [furniture()[row] for row in range(12)]
    expected = model.encode_shape(shapes)

    def hungry(module, inputs):
        if len(inputs[0]) > 3:
            torch.empty(2**55, dtype=torch.uint8, device=DEVICE)

    model.encoder.register_forward_pre_hook(hungry)
    embedder = BatchEmbedder(model, 12)
    with pytest.warns(UserWarning, match="batch_size=12 does not fit"):
        found = embedder(shapes)
    assert embedder.batch_size == 3
    assert abs(torch.from_numpy(found) - expected.cpu()).max() < 1e-4


def test_views_are_cached_by_the_device(tmp_path, monkeypatch):
    """Bytes of the CPU and of the device differ by rounding only."""
    xyz, options = furniture().points(range(4)), {"views": 2, "progress": False}
    here, there = (
        ViewCache(xyz, folder=tmp_path / str(device), device=device, **options) for device in ("cpu", DEVICE)
    )
    assert here.key == there.key
    assert (here.array.astype(int) - there.array.astype(int)).__abs__().max() <= 1
