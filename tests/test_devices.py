"""The whole tensor code on fake CUDA tensors: no operation mixes devices, and every host synchronization is known.

The learner's steps run forward, backward and update as on a GPU, in bf16 where `precision=auto` chooses it there.
Not covered: values, and operations that only a real GPU has (NCCL, PyTorch3D's kernels).
"""

import copy
from collections import Counter
from unittest.mock import patch

import pytest
import torch
from fake_cuda import CUDA, backward, fake_cloud, fake_cuda, fake_module
from torch import nn

from cg3d.geometry.augment import Augment
from cg3d.geometry.corruptions import CORRUPTIONS
from cg3d.models.cg3d import CG3D, CG3DConfig
from cg3d.models.clip_backbone import load_backbone
from cg3d.models.registry import create_encoder, list_encoders
from cg3d.training.config import TrainConfig
from cg3d.training.learner import Learner
from cg3d.training.losses import PAIRS, POSITIVES, TriModalLoss
from cg3d.training.pretrain import augment_images, none_or_name

# Lines that may wait for the GPU; a new one fails a test here.
ALLOWED_IN_A_STEP = {  # of pre-training: once a step
    "core/distributed.py:clip_gradients": "the norm of the gradient, for the log and for skipping bad steps",
    "training/learner.py:reduce": "all losses in one vector",
}
WARM_UP = {"models/layers.py:batches_seen": "reads its counter once, then keeps it on the host"}


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
    assert set(recorder.callers) <= (set(WARM_UP) if train else set()), recorder.callers


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
