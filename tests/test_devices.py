"""The whole tensor code on fake CUDA tensors: no operation mixes devices, and every host synchronization is known.

Forward, backward and update run as they do on a GPU, in bf16 where `precision=auto` chooses it there. Two things are
not covered here but in test_gpu.py: values, and operations that only a real GPU has (NCCL, PyTorch3D's kernels).
"""

import contextlib
import copy
from collections import Counter
from unittest.mock import patch

import pandas as pd
import pytest
import torch
from fake_cuda import CUDA, backward, fake_cloud, fake_cuda, fake_module
from published_layouts import write_layout
from torch import nn

from cg3d.evaluation.embedding_benchmark import evaluate_points
from cg3d.evaluation.linear_probe import few_shot, linear_probe
from cg3d.geometry.augment import Augment
from cg3d.geometry.corruptions import CORRUPTIONS
from cg3d.io.collection import write_collection
from cg3d.io.shape import Shape
from cg3d.models.cg3d import CG3D, CG3DConfig
from cg3d.models.clip_backbone import load_backbone
from cg3d.models.registry import create_encoder, list_encoders
from cg3d.pretrained.loading import load_published
from cg3d.training.config import TrainConfig
from cg3d.training.finetune import FineTuneConfig, fine_tune
from cg3d.training.init import Examples
from cg3d.training.learner import Learner
from cg3d.training.losses import PAIRS, POSITIVES, TriModalLoss
from cg3d.training.pretrain import augment_images, none_or_name

# Lines that may wait for the GPU; a new one fails a test here.
ALLOWED_IN_A_STEP = {  # of pre-training: once a step
    "core/distributed.py:clip_gradients": "the norm of the gradient, for the log and for skipping bad steps",
    "training/learner.py:reduce": "all losses in one vector",
}
WARM_UP = {"models/layers.py:batches_seen": "reads its counter once, then keeps it on the host"}
ALLOWED_IN_FINE_TUNING = {
    "training/finetune.py:train_epoch": "loss, norm of the gradient and hits of a step in one vector",
    "training/finetune.py:run": "scores of an evaluation",
    "training/finetune.py:features": "features of the frozen encoder, once before the training",
    "training/finetune.py:fine_tune": "the trained classifier goes to the CPU",
}


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
    twin, points = copy.deepcopy(network), torch.randn(5, 8)

    def losses(net):
        first, second = net(points), Doubled.apply(net(points + 1))
        return [
            (first @ second.T).softmax(-1).diagonal().log().sum(),
            second[:, :2].unflatten(1, (2, 1)).square(),
        ]

    whole, parts = losses(network)
    torch.autograd.backward([whole, parts], [None, torch.ones_like(parts)])
    whole, parts = losses(twin)
    backward([whole, parts], [None, torch.ones_like(parts)])
    for value, other in zip(network.parameters(), twin.parameters(), strict=True):
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
        if train:
            out.square().sum().backward()
            assert all(value.grad.device == CUDA for value in encoder.parameters())
    assert set(recorder.callers) <= (set(WARM_UP) if train else set()), recorder.callers


PUBLISHED = ("cg3d/point_transformer", "ulip/pointbert", "ulip2/pointbert", "openshape/bigG", "uni3d/ti")


@pytest.mark.parametrize("layout", PUBLISHED)
def test_published_encoders(layout, tmp_path):
    encoder = load_published(write_layout(tmp_path / "weights.pt", layout, small_towers=True)).encoder.train()
    with fake_cuda() as recorder, torch.autocast("cuda", torch.bfloat16):
        out = fake_module(encoder)(fake_cloud(points=1024))
        assert out.device == CUDA and out.ndim == 2 and len(out) == 4
        out.float().square().sum().backward()
        grads = [
            value.grad for value in encoder.parameters() if value.requires_grad and value.grad is not None
        ]
        assert grads and all(grad.device == CUDA for grad in grads)
    assert recorder.callers == [], recorder.callers


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


def examples() -> Examples:
    torch.manual_seed(0)
    return Examples(torch.rand(12, 128, 6), torch.arange(12) % 2, ("chair", "table"))


@pytest.mark.parametrize("mode", ["head", "full"])
def test_fine_tuning(mode):
    config = FineTuneConfig(
        device="auto",
        points=64,
        epochs=2,
        head_epochs=2,
        min_steps=4,
        batch_size=4,
        watch=1,
        augment="sensor",
    )
    start = create_encoder("pointnet", dim=32)
    with fake_cuda() as recorder, contextlib.ExitStack() as stack:
        stack.enter_context(patch("cg3d.training.finetune.pick_device", lambda name: CUDA))
        nothing = contextlib.nullcontext  # seeding a GPU needs one; see test_finetune.py
        stack.enter_context(patch("cg3d.training.finetune.temporary_seed", lambda seed, device: nothing()))
        result = fine_tune(start, examples(), config, mode, watch=examples())
    assert {value.device.type for value in result.classifier.parameters()} == {"cpu"}
    assert {value.device.type for value in start.parameters()} == {"cpu"}
    assert set(recorder.callers) <= {*ALLOWED_IN_FINE_TUNING, *WARM_UP}, recorder.callers
    steps = Counter(recorder.callers)["training/finetune.py:train_epoch"]
    assert steps == result.history["steps"].iloc[-1]  # once a step


@pytest.fixture
def collection(tmp_path):
    generator = torch.Generator().manual_seed(0)
    shapes = []
    for i in range(16):
        xyz, rgb = (torch.rand(160, 3, generator=generator).numpy() for _ in range(2))
        shapes.append(Shape(xyz, rgb, name=("chair", "table")[i % 2], id=str(i), source="toys"))
    columns = pd.DataFrame(
        {
            "split": ["train"] * 8 + ["test"] * 8,
            "category": [shape.name for shape in shapes],
            "caption": [f"a {shape.name} {shape.id}" for shape in shapes],
        }
    )
    write_collection(tmp_path / "toys", shapes, n=128, columns=columns)
    from cg3d.io.collection import read_collection

    return read_collection(tmp_path / "toys")


def test_evaluation_leaves_the_model_on_its_device(collection, tmp_path):
    """Evaluator, probe and few-shot with a model on CUDA; afterwards the model still answers there."""
    model = model_of(TrainConfig(encoder="pointnet", points=64))
    train, test = collection.select(split="train"), collection.select(split="test")
    with fake_cuda():
        fake_module(model)
        table = evaluate_points(model, collection)
        assert len(table) == 5
        probe = linear_probe(model, train, test, penalties=[0.1], folds=2, cache=tmp_path)
        shots = few_shot(model, train, test, shots=[1], seeds=2, cache=tmp_path)
        assert len(probe) == 1 and len(shots)
        assert len(model.classify(test.points(), ["chair", "table"])) == 16
        out = model.encode_shape(test.points())
        assert out.device == CUDA and out.shape == (8, model.backbone.dim)
    assert {value.device.type for value in model.parameters()} == {"cuda"}
