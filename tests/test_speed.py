"""Faster never means other results: the encoders against their published layout (`benchmarks/published_encoders.py`), which holds the very same weights."""

import sys
from pathlib import Path

import pytest
import torch

from cg3d.models import layers, registry

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from published_encoders import published

SMALL = {
    "pointmlp": dict(
        dim=16, width=8, anchors=(32, 16), neighbors=8, growth=(2, 2), pre_blocks=(1, 2), pos_blocks=(2, 1)
    ),
    "point_transformer": dict(
        dim=16,
        width=32,
        depth=2,
        heads=4,
        groups=16,
        neighbors=8,
        patch_width=24,
        patch_hidden=(8, 16, 32),
        drop_path=0.0,
    ),
}


def pair(name):
    torch.manual_seed(0)
    ours = registry.create_encoder(name, **SMALL[name])
    for parameter in ours.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))  # no zero and no one left
    points = torch.rand(16, 64, 6, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return ours, published(name, ours), points


@pytest.mark.parametrize("small", [0, layers.SMALL])  # 0: every product goes to oneDNN
@pytest.mark.parametrize("name", SMALL)
def test_training_gives_the_published_answer_and_gradients(name, small, monkeypatch):
    monkeypatch.setattr(layers, "SMALL", small)
    monkeypatch.setattr(layers, "ONEDNN", True)
    ours, other, points = pair(name)
    found = [model.train()(points) for model in (ours, other)]
    assert (found[0] - found[1]).abs().max() < 1e-4
    aim = torch.randn(16, 16, generator=torch.Generator().manual_seed(2))  # what the embeddings are pulled to
    for out in found:
        (out - aim).square().mean().backward()
    wanted, scale = dict(other.named_parameters()), max(p.grad.abs().max() for p in other.parameters())
    for key, parameter in ours.named_parameters():
        assert (parameter.grad - wanted[key].grad).abs().max() < 1e-4 * scale, key
    for key, kept in ours.named_buffers():
        if "running_mean" in key:
            assert (
                kept / ours.get_submodule(key.rpartition(".")[0]).momentum
                - dict(other.named_buffers())[key] / 0.1
            ).abs().max() < 1e-3, key


@pytest.mark.parametrize("name", SMALL)
def test_evaluation_gives_the_published_answer(name, monkeypatch):
    monkeypatch.setattr(layers, "SMALL", 0)
    monkeypatch.setattr(layers, "ONEDNN", True)
    ours, other, points = pair(name)
    with torch.no_grad():
        assert (ours.eval()(points) - other.eval()(points)).abs().max() < 1e-4
