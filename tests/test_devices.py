"""The whole tensor code on fake CUDA tensors: no operation mixes devices, and every host synchronization is known."""

import pytest
import torch
from fake_cuda import CUDA, fake_cloud, fake_cuda, fake_module

from cg3d.geometry.augment import Augment
from cg3d.geometry.corruptions import CORRUPTIONS
from cg3d.models.registry import create_encoder, list_encoders
from cg3d.training.losses import PAIRS, POSITIVES, TriModalLoss


def test_fake_cuda_refuses_mixed_devices():
    with fake_cuda(), pytest.raises(Exception, match="device"):
        torch.rand(3, device=CUDA) + torch.rand(3)


def test_fake_cuda_records_synchronizations():
    with fake_cuda() as recorder:
        x = torch.rand(4, device=CUDA)
        assert x.sum().item() == 1.0 and x[x > 0.5].shape == (2,)
    assert recorder.callers == ["outside", "outside"]


WARM_UP = {"models/layers.py:batches_seen"}  # reads its counter once, then keeps it on the host


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", list_encoders())
def test_encoders(name, train):
    encoder = create_encoder(name).train(train)
    with fake_cuda() as recorder:
        out = fake_module(encoder)(fake_cloud(points=1024))
        assert out.device == CUDA and out.shape == (4, encoder.config.dim)
    assert set(recorder.callers) <= (WARM_UP if train else set()), recorder.callers


@pytest.mark.parametrize("preset", ["none", "summary", "official", "sensor"])
def test_augmentation(preset):
    with fake_cuda() as recorder:
        out = getattr(Augment, preset)()(fake_cloud(), None)
        assert out.device == CUDA and out.shape == (4, 512, 6)
    allowed = {"geometry/augment.py:one_sided"} if preset == "sensor" else set()
    assert set(recorder.callers) <= allowed, recorder.callers


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
