"""Twelve checks on a real GPU: `pytest -m gpu tests/test_gpu.py -s`; skipped where there is none.

`CG3D_TEST_DEVICE=cpu pytest tests/test_gpu.py` runs the bodies on the CPU, against itself, which shows that they work:
checks 1-8, 11 and 12. What only a GPU can show is left out there: allocated memory (4), the number of
synchronizations (9), the profile (10), and that real memory runs out (12; the error is raised by hand instead).
Two processes on one GPU (7) use Gloo, as NCCL wants a GPU each.
"""

import contextlib
import copy
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.distributed as dist
from published_layouts import write_layout
from torch.utils._python_dispatch import TorchDispatchMode

from cg3d.core.distributed import _AllGather, _AllReduceSum
from cg3d.evaluation.embedding_benchmark import evaluate_points, evaluate_towers
from cg3d.evaluation.linear_probe import few_shot, linear_probe
from cg3d.geometry.augment import Augment
from cg3d.geometry.ops import ball_query, farthest_point_sample, knn, normalize
from cg3d.io.collection import read_collection, write_collection
from cg3d.io.scene import Scene
from cg3d.io.shape import Shape
from cg3d.models.cg3d import CG3D, CG3DConfig
from cg3d.models.clip_backbone import load_backbone
from cg3d.models.layers import compile_encoder
from cg3d.models.registry import create_encoder, list_encoders
from cg3d.pretrained.loading import load_published
from cg3d.render.points import render_points
from cg3d.scenes.grounding import query_scene
from cg3d.search.batch_embed import collection_source, embed_batches
from cg3d.search.index import ShapeIndex
from cg3d.training.callbacks import Checkpoint
from cg3d.training.config import TrainConfig
from cg3d.training.finetune import FineTuneConfig, fine_tune
from cg3d.training.init import examples
from cg3d.training.learner import Callback, Learner
from cg3d.training.losses import POSITIVES, TriModalLoss
from cg3d.training.pretrain import none_or_name

DEVICE = torch.device(os.environ.get("CG3D_TEST_DEVICE") or "cuda")
ON_GPU = DEVICE.type == "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
only_on_a_gpu = pytest.mark.skipif(not ON_GPU, reason="measures a GPU")
PUBLISHED = ("cg3d/point_transformer", "ulip/pointbert", "ulip2/pointbert", "openshape/bigG", "uni3d/ti")


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


def encoder_named(name, tmp_path):
    if name in PUBLISHED:
        return load_published(write_layout(tmp_path / "weights.pt", name, small_towers=True)).encoder.eval()
    torch.manual_seed(0)
    encoder = create_encoder(name).train()
    with torch.no_grad():
        encoder(clouds(8))  # running statistics
    return encoder.eval()


class Searches(TorchDispatchMode):
    "Records the indices that the package's searches return."

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "cg3d":
            parts = result if isinstance(result, tuple) else (result,)
            self.found += [part.cpu() for part in parts if not part.is_floating_point()]
        return result


# 1 and 2: encoders and searches


def test_searches_find_the_same_points():
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


@pytest.mark.parametrize("name", [*list_encoders(), *PUBLISHED])
def test_encoders_answer_as_on_the_cpu(name, tmp_path):
    encoder, points = encoder_named(name, tmp_path), clouds()
    with torch.no_grad():
        with Searches() as here:
            expected = encoder(points)
        there = copy.deepcopy(encoder).to(DEVICE)
        with Searches() as on_device:
            found = there(points.to(DEVICE))
        with Searches() as in_bf16, torch.autocast(DEVICE.type, torch.bfloat16):
            rounded = there(points.to(DEVICE))
    assert torch.cosine_similarity(found.cpu(), expected).min() > 1 - 1e-5
    assert torch.cosine_similarity(rounded.float().cpu(), expected).min() > 0.98
    assert len(here.found) == len(on_device.found) == len(in_bf16.found)
    for indices, other in zip(here.found, on_device.found, strict=True):
        assert torch.equal(indices, other)
    for indices, other in zip(on_device.found, in_bf16.found, strict=True):
        assert torch.equal(indices.sort(-1).values, other.sort(-1).values), "other neighbors under bf16"


@pytest.mark.parametrize("name", ["pointnet", "pointmlp_small", "point_transformer_small"])
def test_training_gives_the_gradients_of_the_cpu(name):
    torch.manual_seed(0)
    encoder, points = create_encoder(name).double(), clouds(8).double()
    for part in encoder.modules():
        if hasattr(part, "p"):
            part.p = 0.0  # dropout draws other numbers on another device
        if hasattr(part, "drop_prob"):
            part.drop_prob = 0.0
    there = copy.deepcopy(encoder).to(DEVICE)
    encoder(points).square().sum().backward()
    there(points.to(DEVICE)).square().sum().backward()
    for (key, value), other in zip(encoder.named_parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(other.grad.cpu(), value.grad, atol=1e-6, rtol=1e-4, msg=key)


# 3: pictures


def test_splats_are_the_pictures_of_the_cpu():
    points, azimuth, elevation = clouds(2, 2048), torch.tensor([0.0, 120.0]), torch.tensor([20.0, -10.0])
    here = render_points(points, azimuth, elevation, 128)
    there = render_points(points.to(DEVICE), azimuth.to(DEVICE), elevation.to(DEVICE), 128)
    assert there.device.type == DEVICE.type and (there.cpu() - here).abs().mean() < 1e-3


def test_mesh_views_are_the_pictures_of_the_cpu():
    pytest.importorskip("pytorch3d")
    from pytorch3d.renderer import TexturesVertex
    from pytorch3d.utils import ico_sphere

    from cg3d.render.mesh import render_mesh

    azimuth, elevation = torch.tensor([0.0, 120.0]), torch.tensor([20.0, -10.0])
    mesh = ico_sphere(3)
    mesh.textures = TexturesVertex(mesh.verts_padded() / 2 + 0.5)
    here = render_mesh(mesh, azimuth, elevation, 64)
    there = render_mesh(mesh.to(DEVICE), azimuth.to(DEVICE), elevation.to(DEVICE), 64)
    assert (there.cpu() - here).abs().mean() < 1e-3


# 4: losses, and batches in parts


@pytest.mark.parametrize("positives", POSITIVES)
def test_losses_have_the_gradients_of_the_cpu(positives):
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


class Many:
    "Random shapes: real work for the encoder, views as bytes."

    def __init__(self, count, points=256):
        self.count, self.points = count, points

    def __len__(self):
        return self.count

    def batch(self, rows, epoch):
        generator = torch.Generator().manual_seed(epoch)
        images = torch.randint(0, 255, (self.count, 3, 32, 32), dtype=torch.uint8, generator=generator)
        return {
            "points": clouds(self.count, self.points, epoch)[rows],
            "images": images[rows],
            "texts": [f"thing {row % 50}" for row in rows],
            "name": [f"thing {row}" for row in rows],
            "id": [str(row) for row in rows],
            "row": torch.tensor(rows),
            "view": torch.zeros(len(rows), dtype=torch.int64),
        }


def run_of(schedule="joint", count=64, callbacks=(), **options):
    "A learner on random towers and random shapes."
    visual = "none" if schedule == "frozen" else "deep"
    settings = {
        "encoder": "pointmlp_small",
        "batch_size": count,
        "points": 256,
        "epochs": 1,
        "precision": "fp32",
    }
    settings |= {"visual_prompt": visual, "schedule": schedule, "device": str(DEVICE), "augment": "none"}
    config = TrainConfig(**(settings | options))
    torch.manual_seed(0)
    model = CG3D.build(
        CG3DConfig(
            encoder=config.encoder,
            points=config.points,
            clip_weights="random",
            visual_prompt=none_or_name(config.visual_prompt),
        ),
        load_backbone("nano", "random", DEVICE),
    )
    augment = None if config.augment == "none" else getattr(Augment, config.augment)()
    loss = TriModalLoss(positives=config.positives)
    return Learner(model, loss, Many(count, config.points), config, list(callbacks), augment=augment)


@pytest.mark.parametrize("schedule", ["joint", "frozen"])
def test_a_batch_in_parts_has_the_memory_of_one_part(schedule):
    large, part = (512, 64) if ON_GPU else (32, 8)
    most = {}
    for count, options in ((part, {}), (large, {"part": part})):
        run = run_of(schedule, count, **options)
        run.model.train()
        batch = run.batch()
        run.losses(batch, run.phases[0])[1]()  # fills the caches of the towers
        run.model.zero_grad()
        if ON_GPU:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats(DEVICE)
            before = torch.cuda.memory_allocated(DEVICE)
        losses, backward = run.losses(batch, run.phases[0])
        backward()
        assert losses["loss"].isfinite()
        run.reader.shutdown()
        if ON_GPU:
            most[count] = torch.cuda.max_memory_allocated(DEVICE) - before
        del run, losses, backward, batch
    print(schedule, {count: f"{value / 2**20:.0f} MiB" for count, value in most.items()})
    assert not ON_GPU or most[large] < 1.3 * most[part], most


# 5: runs


class StopAt(Callback):
    def __init__(self, step):
        self.step = step

    def after_step(self, learner):
        if learner.step == self.step:
            learner.requested = "SIGINT"


@pytest.mark.parametrize("schedule", ["joint", "alternate", "frozen"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(schedule, tmp_path):
    steps = 20 if ON_GPU else 4
    options = {
        "schedule": schedule,
        "count": 16,
        "epochs": steps // 2,
        "batch_size": 8,
        "encoder": "pointnet",
    }
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        runs = []
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        for folder, resume, callbacks in (
            (whole, False, []),
            (parts, False, [StopAt(steps // 2)]),
            (parts, True, []),
        ):
            keep = Checkpoint(folder)
            runs.append(run_of(callbacks=[keep, *callbacks], out=str(folder), resume=resume, **options).fit())
    finally:
        torch.use_deterministic_algorithms(False)
    assert [run.step for run in runs] == [steps, steps // 2, steps] and not any(run.skipped for run in runs)
    for (name, value), other in zip(
        runs[0].model.encoder.state_dict().items(), runs[2].model.encoder.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(value, other, atol=1e-6, rtol=1e-5, msg=name)


# 6: evaluation and fine-tuning leave the model where it is


@pytest.fixture
def collection(tmp_path):
    generator = torch.Generator().manual_seed(0)
    shapes = []
    for i in range(16):
        xyz, rgb = (torch.rand(300, 3, generator=generator).numpy() for _ in range(2))
        shapes.append(Shape(xyz, rgb, name=("chair", "table")[i % 2], id=str(i), source="toys"))
    columns = pd.DataFrame(
        {
            "split": ["train"] * 8 + ["test"] * 8,
            "category": [shape.name for shape in shapes],
            "caption": [f"a {shape.name} {shape.id}" for shape in shapes],
        }
    )
    write_collection(tmp_path / "toys", shapes, n=256, columns=columns)
    return read_collection(tmp_path / "toys")


def small_model(points=128):
    torch.manual_seed(0)
    config = CG3DConfig(encoder="pointnet", points=points, clip_weights="random")
    return CG3D.build(config, load_backbone("nano", "random", DEVICE)).eval()


def test_evaluation_and_fine_tuning_leave_the_model_on_its_device(collection, tmp_path):
    model = small_model()
    train, test = collection.select(split="train"), collection.select(split="test")
    before = model.encode_shape(test.points())
    assert len(evaluate_towers(model.backbone, collection, views=1)) == 3
    assert len(evaluate_points(model, collection)) == 5
    assert len(linear_probe(model, train, test, penalties=[0.1], folds=2, cache=tmp_path)) == 1
    assert len(few_shot(model, train, test, shots=[1], seeds=2, cache=tmp_path))
    config = FineTuneConfig(device=str(DEVICE), epochs=1, head_epochs=1, min_steps=2, batch_size=4, points=64)
    for mode in ("head", "full"):
        result = fine_tune(model, examples(train), config, mode, watch=examples(test))
        assert result.history["loss"].notna().all()
    assert {value.device.type for value in model.parameters()} == {DEVICE.type}
    after = model.encode_shape(test.points())
    assert after.device.type == DEVICE.type and torch.equal(after, before)


# 7: several processes


def test_collectives_of_one_process(tmp_path):
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


@pytest.mark.parametrize("split", [False, True])
def test_two_processes_have_the_gradients_of_one(split, tmp_path):
    """Over Gloo, which takes two processes on one GPU; `split` shards weights and gradients (FSDP)."""
    worker = Path(__file__).parent / "gradients_worker.py"
    device = "cuda:0" if ON_GPU else "cpu"
    results = []
    for count, batch, more in ((1, 16, []), (2, 8, [f"split={split}"])):
        folder = tmp_path / str(count)
        launcher = (
            ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"] if count == 2 else []
        )
        words = [folder, "point_transformer_small drop_path=0", batch, f"device={device}", *more]
        done = subprocess.run(
            [sys.executable, *launcher, str(worker), *map(str, words)],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CG3D_TEST_BACKEND": "gloo"},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(torch.load(folder / "gradients.pt", weights_only=True, map_location="cpu"))
    one, two = results
    assert (one["world"], two["world"]) == (1, 2) and one["gradients"].keys() == two["gradients"].keys()
    for name, value in one["gradients"].items():
        torch.testing.assert_close(two["gradients"][name], value, atol=1e-5, rtol=1e-4, msg=name)


# 8: compilation


@pytest.mark.parametrize("name", ["pointnet", "point_transformer_small", "pointmlp_small"])
def test_compiled_encoders_are_not_compiled_again(name, monkeypatch):
    if not ON_GPU:  # the compiler itself takes minutes
        compiler = torch.compile
        monkeypatch.setattr(torch, "compile", lambda module: compiler(module, backend="eager"))
    torch._dynamo.reset()
    torch.manual_seed(0)
    encoder = create_encoder(name).to(DEVICE)
    plain = copy.deepcopy(encoder)
    encode, points = compile_encoder(encoder), clouds(8, 512).to(DEVICE)
    for step in range(12):
        if step == 0:
            torch.testing.assert_close(encode(points), plain(points))
        encode(points).square().sum().backward()
    encoder.eval()
    with torch.no_grad():
        encode(points)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            encoder.train()
            encode(points).square().sum().backward()
            encoder.eval()
            with torch.no_grad():
                encode(points)


# 9 and 10: what a step waits for, and where its time goes


@only_on_a_gpu
@pytest.mark.parametrize("schedule", ["joint", "alternate", "frozen"])
def test_a_step_waits_twice_for_the_gpu(schedule):
    run = run_of(schedule, 64, batch_size=16, epochs=20, precision="auto", augment="sensor")
    run.model.train()
    for _ in range(12):
        run.one_step()
    counts = []
    for _ in range(2):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                run.one_step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found = [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
        counts.append(found)
    run.reader.shutdown()
    print(schedule, counts)
    assert all(len(found) <= 2 for found in counts), counts


@only_on_a_gpu
def test_sampling_is_a_small_part_of_a_pointmlp_step():
    from torch.profiler import ProfilerActivity, profile

    encoder, points = create_encoder("pointmlp").to(DEVICE), clouds(32).to(DEVICE)

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            encoder(points).square().sum().backward()

    for _ in range(12):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(5):
            step()
        torch.cuda.synchronize()
    table = profiler.key_averages()
    print(table.table(sort_by="self_device_time_total", row_limit=15))
    kernels = [event for event in table if event.device_type.name == "CUDA"]
    whole = sum(event.self_device_time_total for event in kernels)
    sampling = sum(event.self_device_time_total for event in kernels if "farthest" in event.key.lower())
    print(f"farthest point sampling: {100 * sampling / whole:.1f} % of the time of the kernels")
    assert 0 < sampling < 0.5 * whole


# 11 and 12: search, scenes, classification, bulk embedding


def test_index_scene_and_classification(collection):
    model = small_model()
    index = ShapeIndex.from_items(model, collection)
    assert index.search("a chair", k=3)["rank"].tolist() == [1, 2, 3]
    first = collection[0]
    assert index.search(first, k=1)["row"].tolist() == [0]
    table = model.classify([collection[i] for i in range(4)], ["chair", "table"])
    assert len(table) == 8 and table["probability"].between(0, 1).all()
    parts = [clouds(1, 400, seed)[0, :, :3].numpy() * 0.3 + [2.0 * seed, 0, 0] for seed in range(3)]
    xyz = torch.cat([torch.from_numpy(part).float() for part in parts]).numpy()
    scene = Scene(points=xyz, colors=xyz * 0 + 0.5, instance=torch.arange(3).repeat_interleave(400).numpy())
    result = query_scene(scene, "a chair", model, source="instances", progress=False)
    assert len(result.proposals) == 3


def test_bulk_embedding_goes_on_when_memory_runs_out(collection, monkeypatch):
    model = small_model()
    source, problems = collection_source(collection, "toys"), []
    expected = model.encode_shape(collection.points()).cpu()
    with contextlib.ExitStack() as stack:
        if ON_GPU:
            large = torch.empty(0, device=DEVICE)
            encode = model.encoder.forward

            def hungry(points):  # as much memory for each cloud as three clouds of four can have
                nonlocal large
                free, _ = torch.cuda.mem_get_info(DEVICE)
                large = torch.empty(len(points) * int(free * 0.3), dtype=torch.uint8, device=DEVICE)
                result = encode(points)
                large = torch.empty(0, device=DEVICE)
                return result

            monkeypatch.setattr(model.encoder, "forward", hungry)
        else:
            encode = model.encoder.forward

            def limited(points):
                if len(points) > 3:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                return encode(points)

            monkeypatch.setattr(model.encoder, "forward", limited)
        stack.enter_context(pytest.warns(UserWarning, match="batch_size=8 does not fit"))
        batches = list(embed_batches(source, model, range(16), 8, problems))
    assert not problems and [row for rows, _ in batches for row in rows] == list(range(16))
    found = torch.cat([torch.as_tensor(vectors) for _, vectors in batches])
    assert torch.cosine_similarity(found, expected).min() > 0.999
