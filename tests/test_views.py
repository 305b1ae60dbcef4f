"""Embeddings of rendered views: one function for every tower, on the tower's device"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cg3d.core.errors import InputError, KindError
from cg3d.models import views
from cg3d.models.clip_backbone import load_backbone
from cg3d.models.prompts import Prompts
from cg3d.models.views import device_of, embed_views
from cg3d.render.cameras import random_views, ring_views
from cg3d.render.points import render_points


@pytest.fixture(scope="module")
def tower():
    torch.manual_seed(0)
    return load_backbone("nano", "random")


@pytest.fixture(scope="module")
def clouds():
    generator = torch.Generator().manual_seed(0)
    xyz = F.normalize(torch.rand(5, 200, 3, generator=generator) - 0.5, dim=-1)
    return torch.cat([xyz, torch.rand(5, 200, 3, generator=generator)], -1)


def test_the_three_former_embedders_give_the_same_numbers(tower, clouds):
    "View scores of zero-shot evaluation, view vectors of search, and embeddings of the comparison, as they were computed."
    azimuth, elevation = ring_views(3)
    former = []
    for part in clouds.split(2):
        images = render_points(part, azimuth.expand(len(part), -1), elevation.expand(len(part), -1))
        with torch.no_grad():
            seen = F.normalize(tower.encode_image(images.flatten(0, 1)).float(), dim=-1)
        former.append(F.normalize(seen.view(len(part), 3, -1).mean(1), dim=-1))
    assert torch.equal(embed_views(tower, clouds, ring_views(3), mean=True, batch_size=2), torch.cat(former))
    azimuth, elevation = random_views((5, 1), torch.Generator().manual_seed(3))
    with torch.no_grad():
        parts = [
            tower.encode_image(render_points(part, a, e)[:, 0]).float()
            for part, a, e in zip(clouds.split(2), azimuth.split(2), elevation.split(2))
        ]
    now = embed_views(tower, clouds, (azimuth, elevation), batch_size=2)
    assert now.shape == (5, 1, tower.dim) and torch.equal(now[:, 0], F.normalize(torch.cat(parts), dim=-1))


def test_batches_do_not_change_the_result(tower, clouds):
    torch.testing.assert_close(
        embed_views(tower, clouds, batch_size=2), embed_views(tower, clouds, batch_size=5), atol=1e-5, rtol=0
    )


def test_rendering_and_encoding_happen_on_the_device_of_the_tower(monkeypatch, clouds):
    "A tower on an accelerator was given pictures on the CPU by one of the three former embedders."
    rendered = []

    def render(points, azimuth, elevation, settings):
        rendered.append((points.device.type, azimuth.device.type, elevation.device.type))
        return torch.zeros(*azimuth.shape, 3, 8, 8, device=points.device)

    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.projection = nn.Linear(192, 4, device="meta")

        def encode_image(self, images):
            assert images.device.type == "meta"
            return self.projection(images.flatten(1))

    monkeypatch.setattr(views, "render_points", render)
    embeddings = embed_views(Tower(), clouds, ring_views(2), batch_size=2)
    assert embeddings.device.type == "meta" and embeddings.shape == (5, 2, 4)
    assert rendered == [("meta", "meta", "meta")] * 3


def test_the_result_may_enter_training(tower, clouds):
    "A tensor made in inference mode could not be saved for a backward pass."
    embeddings = embed_views(tower, clouds[:2])[:, 0]
    nn.Linear(tower.dim, 2)(embeddings).sum().backward()
    assert not embeddings.requires_grad


def test_prompts_without_weights_know_their_device(tower):
    prompts = Prompts(tower, None, None)
    assert not list(prompts.parameters()) and device_of(prompts) == tower.device


def test_refusals(tower, clouds):
    with pytest.raises(KindError, match="encode_image, Linear has none"):
        embed_views(nn.Linear(2, 2), clouds)
    with pytest.raises(InputError, match="points are empty"):
        embed_views(tower, clouds[:0])
    with pytest.raises(InputError, match=r"\(5, V\)"):
        embed_views(tower, clouds, random_views((4, 1)))
