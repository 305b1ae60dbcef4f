"""The whole tensor code on fake CUDA tensors: no operation mixes devices, and every host synchronization is known.

The learner's steps run forward, backward and update as on a GPU, in bf16 where `precision=auto` chooses it there.
Not covered: values, and operations that only a real GPU has (NCCL, PyTorch3D's kernels).
"""

import contextlib
import copy
from collections import Counter
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch
from fake_cuda import CUDA, backward, fake_cloud, fake_cuda, fake_module
from published_layouts import published_layouts
from torch import nn

from cg3d.core.cache import write_rows
from cg3d.core.state_dict import WeightFile, WeightSource
from cg3d.evaluation.linear_probe import few_shot, linear_probe
from cg3d.evaluation.zero_shot import method_scores
from cg3d.geometry import ops
from cg3d.geometry.augment import Augment
from cg3d.geometry.corruptions import CORRUPTIONS
from cg3d.models.cg3d import CG3D, CG3DConfig
from cg3d.models.clip_backbone import load_backbone
from cg3d.models.registry import create_encoder, list_encoders
from cg3d.pretrained import grouping, loading, parts
from cg3d.render.cameras import ViewSettings
from cg3d.render.view_cache import ViewCache
from cg3d.training.config import TrainConfig
from cg3d.training.finetune import FineTuneConfig, fine_tune
from cg3d.training.init import Examples, InitialWeights, temporary_seed
from cg3d.training.learner import Learner
from cg3d.training.losses import PAIRS, POSITIVES, TriModalLoss
from cg3d.training.pretrain import augment_images, none_or_name
from cg3d.training.tower_features import FeatureCache

# Lines that may wait for the GPU; a new one fails a test here.
ALLOWED_IN_A_STEP = {  # of pre-training: once a step
    "core/distributed.py:clip_gradients": "the norm of the gradient, for the log and for skipping bad steps",
    "training/learner.py:reduce": "all losses in one vector",
}
WARM_UP = {"models/layers.py:batches_seen": "reads its counter once, then keeps it on the host"}
CHECKS = {"geometry/ops.py:check_points": "refuses NaN and clouds without extent, once a batch"}


def test_fake_cuda_refuses_mixed_devices():
    with fake_cuda(), pytest.raises(Exception, match="device"):
        torch.rand(3, device=CUDA) + torch.rand(3)


def test_fake_cuda_records_synchronizations():
    with fake_cuda() as recorder:
        x = torch.rand(4, device=CUDA)
        assert x.sum().item() == 1.0 and x[x > 0.5].shape == (2,)
        assert x.tolist() == [1.0] * 4 and x.cpu().device.type == "cpu"
        assert torch.arange(3).tolist() == [0, 1, 2]  # on the CPU alone: real, and no synchronization
        assert recorder.callers == ["outside"] * 4
        x += torch.ones(4).to(CUDA, non_blocking=True)
        x[0] = 2.0
        assert recorder.callers == ["outside"] * 4
        x += torch.ones(4).to(CUDA) + torch.tensor([1.0], device=CUDA)
        x.copy_(torch.ones(4))
    assert recorder.callers == ["outside"] * 7


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def test_backward_without_the_engine_gives_its_gradients():
    """`fake_cuda.backward`, which takes the place of the engine in all tests below, on real tensors."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.GELU(), nn.Linear(6, 6, bias=False))
    clone, points = copy.deepcopy(network), torch.randn(5, 8)

    def losses(net):
        first, second = net(points), Doubled.apply(net(points + 1))
        return [
            (first @ second.T).softmax(-1).diagonal().log().sum(),
            second[:, :2].unflatten(1, (2, 1)).square(),
        ]

    whole, parts = losses(network)
    torch.autograd.backward([whole, parts], [None, torch.ones_like(parts)])
    whole, parts = losses(clone)
    backward([whole, parts], [None, torch.ones_like(parts)])
    for value, other in zip(network.parameters(), clone.parameters(), strict=True):
        torch.testing.assert_close(value.grad, other.grad)


def test_fake_backward_refuses_mixed_devices():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return torch.ones(tuple(gradient.shape))  # on the CPU

    with fake_cuda(), pytest.raises(RuntimeError, match="gradient on device cpu"):
        weight = nn.Parameter(torch.rand(3, device=CUDA))
        Wrong.apply(weight * 2).sum().backward()


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", list_encoders())
def test_encoders(name, train):
    encoder = create_encoder(name).train(train)
    with fake_cuda() as recorder:
        out = fake_module(encoder)(fake_cloud(points=1024))
        assert out.device == CUDA and out.shape == (4, encoder.config.dim)
    assert set(recorder.callers) <= (set(WARM_UP) if train else set()), recorder.callers


def published_encoder(name: str) -> loading.PublishedEncoder:
    "An encoder in the layout of a published file, without numbers (on `meta`)."
    source = published_source(name)
    family = loading.recognize(source)
    contract, _ = loading._contract(source, family)
    with patch("cg3d.pretrained.loading.fill_module"):  # there is nothing to fill it with
        return loading.PublishedEncoder(loading._network(source, family, contract), contract).eval()


def published_source(name: str) -> WeightSource:
    "A file in a published layout, without numbers (on `meta`)."
    layout = published_layouts(small_towers=True)[name]
    tensors = {
        ".".join(filter(None, (at, tensor))): torch.empty(shape, device="meta")
        for at, shapes in layout.items()
        if not at.startswith("optimizer")
        for tensor, shape in shapes.items()
    }
    return WeightSource(WeightFile(f"{name}-1k.pt", tensors, {}), name)


@pytest.mark.parametrize(
    "name", [name for name in published_layouts() if name not in {"slip", "patchalign3d"}]
)
def test_published_encoders(name):
    encoder = published_encoder(name)
    with fake_cuda() as recorder:
        out = fake_module(encoder)(fake_cloud(2, encoder.contract.points))
        assert out.device == CUDA and out.shape == (2, encoder.dim)
        assert set(recorder.callers) <= set(CHECKS), recorder.callers


def test_part_model():
    source, contract = published_source("patchalign3d"), parts.CONTRACTS["patchalign3d"]
    model = parts.PartModel(*parts._build(source, contract), contract, None).eval()
    with fake_cuda() as recorder:
        patches, centers = fake_module(model).embed_patches(fake_cloud(2, contract.points)[..., :3])
        assert patches.device == centers.device == CUDA and patches.shape == (2, 128, 1280)
        assert set(recorder.callers) <= set(CHECKS), recorder.callers


@pytest.mark.parametrize("preset", ["none", "summary", "official", "sensor"])
def test_augmentation(preset):
    with fake_cuda() as recorder:
        out = getattr(Augment, preset)()(fake_cloud(), None)
        assert out.device == CUDA and out.shape == (4, 512, 6)
    assert recorder.callers == [], recorder.callers


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corruptions(kind):
    with fake_cuda():
        out = CORRUPTIONS[kind](fake_cloud(), 3, None)
        assert out.device == CUDA and out.shape[0] == 4 and out.shape[2] == 6


@pytest.mark.parametrize("positives", POSITIVES)
def test_losses(positives):
    texts = ["a chair", "a table", "a chair", "a lamp"]
    with fake_cuda() as recorder:
        loss = fake_module(TriModalLoss(positives=positives, hard_negatives=0.5))
        sides = [torch.rand(4, 16, device=CUDA) for _ in range(3)]
        out = loss(*sides, texts, PAIRS)
        assert all(value.device == CUDA for value in out.values())
    assert recorder.callers == [], recorder.callers


@pytest.mark.parametrize("positives", ["caption", "decoupled"])
def test_losses_of_several_views_and_texts(positives):
    texts = [("a chair", "a seat"), ("a table", "a desk"), ("a chair", "a stool"), ("a lamp", "a light")]
    with fake_cuda() as recorder:
        loss = fake_module(TriModalLoss(positives=positives, hard_negatives=0.5, learnable=True))
        sides = [nn.Parameter(torch.rand(4, *shape, device=CUDA)) for shape in ((16,), (3, 16), (2, 16))]
        loss(*sides, texts, PAIRS)["loss"].backward()
        assert all(side.grad.device == CUDA for side in sides) and loss.log_scale.grad.device == CUDA
    assert recorder.callers == [], recorder.callers


class Shapes:
    "What a learner reads: real tensors on the CPU, views as bytes."

    def __init__(self, views=1, texts=1):
        self.views, self.texts = views, texts

    def __len__(self):
        return 24

    def batch(self, rows, epoch):
        count, group = len(rows), () if self.views == 1 else (self.views,)
        texts = [tuple(f"thing {(row + i) % 5}" for i in range(self.texts)) for row in rows]
        return {
            "points": torch.rand(count, 128, 6),
            "images": torch.randint(0, 255, (count, *group, 3, 32, 32), dtype=torch.uint8),
            "texts": texts if self.texts > 1 else [group[0] for group in texts],
            "name": ["thing"] * count,
            "id": [str(row) for row in rows],
            "row": torch.tensor(rows),
            "view": torch.zeros((count, *group), dtype=torch.int64),
        }


STEPS = {  # settings of a run -> number of steps that between them do everything
    "joint, pixels, in parts": (
        {"visual_prompt": "pixel+deep", "text_prompt": "context", "part": 3, "image_augment": True},
        2,
    ),
    "alternate, several positives": (
        {"schedule": "alternate", "positives": "decoupled", "views_per_step": 2, "texts_per_step": 2},
        3,
    ),
    "frozen, recomputed activations": (
        {
            "schedule": "frozen",
            "visual_prompt": "none",
            "encoder": "point_transformer_small groups=16",
            "checkpointing": True,
        },
        2,
    ),
}


def model_of(config: TrainConfig) -> CG3D:
    encoder, *settings = config.encoder.split()
    return CG3D.build(
        CG3DConfig(
            encoder=encoder,
            encoder_cfg={name: int(value) for name, value in (word.split("=") for word in settings)},
            points=config.points,
            clip_weights="random",
            visual_prompt=none_or_name(config.visual_prompt),
            text_prompt=none_or_name(config.text_prompt),
        ),
        load_backbone("nano", "random", "cpu"),
    )


@pytest.mark.parametrize("name", STEPS)
def test_steps_of_the_learner(name):
    """Reading, copying, augmentation, towers, loss, backward, clipping and update; two synchronizations a step."""
    options, steps = STEPS[name]
    options = {"encoder": "pointnet"} | options
    config = TrainConfig(
        epochs=4, batch_size=6, points=128, learnable_temperature=True, device="auto", **options
    )
    model = model_of(config)
    data = Shapes(config.views_per_step, config.texts_per_step)
    with fake_cuda() as recorder, patch("cg3d.training.learner.claim_device", lambda name: CUDA):
        learner = Learner(
            model,
            TriModalLoss(learnable=True, positives=config.positives),
            data,
            config,
            augment=Augment.sensor(),
            augment_images=augment_images if config.image_augment else None,
        )
        assert learner.bf16 and learner.towers.batch_size == 256
        model.train()
        for step in range(steps):
            recorder.callers.clear()
            learner.one_step()
            assert not learner.trouble
            expected = Counter(ALLOWED_IN_A_STEP.keys())
            if step:
                assert Counter(recorder.callers) == expected, recorder.callers
            else:
                assert set(recorder.callers) <= {*expected, *WARM_UP}, recorder.callers
        learner.reader.shutdown()
        trained = [value for group in learner.optimizers[0].param_groups for value in group["params"]]
        assert trained and all(value.grad.device == CUDA for value in trained)


def tuned_examples(count=12, labels=3) -> Examples:
    "Labeled clouds on the CPU, as they are read."
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(count, 300, 6, generator=generator)
    return Examples(points, torch.arange(count) % labels, tuple(f"label {i}" for i in range(labels)))


ALLOWED_IN_TUNING = {
    "training/finetune.py:train_epoch": "loss, norm of the gradient and number of hits, once a step",
    "training/finetune.py:run": "scores of the evaluated shapes, once a batch",
    "training/finetune.py:features": "features of a frozen encoder, once a batch; its input",
    "training/finetune.py:fine_tune": "the model goes to the device, and back at the end",
    "training/finetune.py:training_clouds": "the clouds go to the device, once",
}


@pytest.mark.parametrize("mode", ["full", "head"])
def test_fine_tuning(mode):
    config = FineTuneConfig(
        epochs=1, head_epochs=1, min_steps=1, batch_size=6, holdout=0.3, points=256, watch=1
    )
    start = InitialWeights("scratch", create_encoder("pointnet"), 256)
    train = tuned_examples()
    with fake_cuda() as recorder, patch("cg3d.training.finetune.pick_device", lambda name: CUDA):
        tuned = fine_tune(start, train, config, mode, watch=train)
    assert len(tuned.history) == 1 and {"held_out", "test"} <= set(tuned.history)
    assert next(start.encoder.parameters()).device.type == "cpu"
    assert set(recorder.callers) <= {*ALLOWED_IN_TUNING, *WARM_UP}, Counter(recorder.callers)
    assert Counter(recorder.callers)["training/finetune.py:train_epoch"] == 1


class Labeled:
    "A collection of twelve clouds with three labels."

    def __init__(self):
        self.table = pd.DataFrame({"category": [f"label {i % 3}" for i in range(12)], "split": "test"})
        self.clouds = tuned_examples().points

    def __len__(self):
        return len(self.table)

    def points(self, rows):
        return self.clouds[np.asarray(rows)]


ALLOWED_IN_PROBES = {
    "evaluation/linear_probe.py:feature_key": "hash of the weights, once",
    "training/finetune.py:features": "features, once a batch; its input",
    "models/clip_backbone.py:update_hash": "hash of the weights beside the numbers, once",
}


@pytest.mark.parametrize("probe", [linear_probe, few_shot])
def test_probes(probe, tmp_path):
    options = {"folds": 2, "penalties": (1.0,)} if probe is linear_probe else {"shots": (1, 2), "seeds": 2}
    with fake_cuda() as recorder:
        encoder = fake_module(create_encoder("pointnet", dim=16))
        table = probe(encoder, Labeled(), Labeled(), points=256, cache=tmp_path, **options)
        assert next(encoder.parameters()).device == CUDA
    assert len(table) and table["accuracy"].between(0, 100).all()
    assert set(recorder.callers) <= set(ALLOWED_IN_PROBES), Counter(recorder.callers)


IN_RENDERING = {
    "render/points.py:_parts": "numbers of the pixels that each disc covers, once a call",
    "render/points.py:_runs": "lengths of the runs of sorted pixels, twice a call",
}
ALLOWED_IN_EVALUATION = {
    "evaluation/zero_shot.py:method_scores": "scores go to the CPU, once a method and chunk",
}


def test_evaluator():
    """Zero-shot scores of the encoder, and of rendered views by both towers."""
    model = model_of(TrainConfig(encoder="pointnet", points=256, visual_prompt="deep", text_prompt="context"))
    rows = Labeled()
    with fake_cuda() as recorder:
        fake_module(model)
        scores = method_scores(model, rows, torch.arange(12) % 3, ["a", "b", "c"], chunk=8, views=2)
    assert {value.shape for value in scores.values()} == {(12, 3)} and len(scores) == 4
    assert {value.device.type for value in scores.values()} == {"cpu"}
    found = Counter(recorder.callers)
    assert set(found) == {*ALLOWED_IN_EVALUATION, *CHECKS, *IN_RENDERING}, found
    assert found["evaluation/zero_shot.py:method_scores"] == 2 * 3  # chunks, methods


ALLOWED_IN_CLASSIFICATION = {
    "models/cg3d.py:classify": "order, probabilities and similarities, once each",
    "models/clip_backbone.py:weights_stamp": "have the weights of the text tower or of the prompts changed?",
    "models/clip_backbone.py:logit_scale": "factor on the similarities",
}


def test_classification():
    model = model_of(TrainConfig(encoder="pointnet", points=256))
    with fake_cuda() as recorder:
        table = fake_module(model).classify(Labeled().clouds, ["a", "b", "c"], views=2)
    assert len(table) == 36
    found = Counter(recorder.callers)
    assert set(found) == {*ALLOWED_IN_CLASSIFICATION, *CHECKS, *IN_RENDERING}, found
    assert max(found.values()) == 3, found


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_features_of_cached_views(kind, tmp_path):
    """The frozen schedule encodes views that were read as bytes."""

    class Views:
        shape, key = (6, 2, 3, 32, 32), "views"

        def __getitem__(self, at):
            return torch.ones((len(at[0]), 3, 32, 32), dtype=kind)

    backbone = load_backbone("nano", "random", "cpu")
    with fake_cuda() as recorder:
        features = FeatureCache(Views(), fake_module(backbone), tmp_path, 8, bf16=True, progress=False)
    assert features[[0, 5], [0, 1]].shape == (2, backbone.dim)
    found = Counter(recorder.callers)
    assert found.pop("models/clip_backbone.py:update_hash") > 100  # the key: a hash of all weights
    assert found == {"models/clip_backbone.py:weights_stamp": 1, "core/cache.py:write_rows": 2}, found


def test_views_are_rendered_on_the_device(tmp_path):
    copied = []

    def write(rows, values, name):
        copied.append((values.device, values.dtype))
        write_rows(rows, values, name)

    options = {"views": 2, "settings": ViewSettings(size=32), "folder": tmp_path, "progress": False}
    with fake_cuda() as recorder, patch("cg3d.core.cache.write_rows", write):
        cache = ViewCache(tuned_examples(70).points, **options, device=CUDA)
    assert copied == [(CUDA, torch.uint8)] * 2  # 64 shapes at once, bytes on the way back
    assert cache[0, 1].dtype == torch.float32
    found = Counter(recorder.callers)
    assert found.pop("core/cache.py:write_rows") == 2 and set(found) == {*CHECKS, *IN_RENDERING}, found


def test_a_temporary_seed_touches_the_generator_of_its_device_only(monkeypatch):
    called = []
    for name in ("manual_seed", "manual_seed_all", "get_rng_state", "set_rng_state"):
        monkeypatch.setattr(torch.cuda, name, lambda *args, name=name: called.append((name, args)) or args[0])
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    with temporary_seed(7, "cpu"):
        drawn = torch.rand(2)
    assert not called
    with temporary_seed(7, CUDA):
        assert torch.equal(torch.rand(2), drawn)
        assert ("manual_seed", (7,)) in called and "set_rng_state" not in dict(called)
    assert "set_rng_state" in dict(called) and "manual_seed_all" not in dict(called)


def test_own_searches():
    """The operators that encoders call are opaque to fake tensors; here their implementations run."""
    with fake_cuda() as recorder, patch("cg3d.geometry.ops.cuda_kernels", lambda *tensors: None):
        xyz = fake_cloud(2, 300, 3)
        first = torch.zeros(2, 1, dtype=torch.int64, device=CUDA)
        for skip_below in (None, 1e-3):
            assert ops._farthest_points(xyz, first, 8, skip_below).device == CUDA
        assert ops.farthest_point_sample(xyz, 8, ties="pointnet2").device == CUDA
        distances, indices = ops._nearest(xyz[:, :20], xyz, 5, None)
        assert distances.device == indices.device == CUDA
        assert ops._in_ball(xyz[:, :20], xyz, 0.2, 5, None).device == CUDA
        for radius in (None, 0.3):
            center, around = grouping._search(xyz, 8, 4, radius, 1e-3, "pointnet2")
            assert center.device == around.device == CUDA and around.shape == (2, 8, 4)
    assert recorder.callers == [], recorder.callers
