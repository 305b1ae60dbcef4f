"""Numbers that must not move: every encoder from a seed, the shipped weights, and the towers. `python tests/test_golden.py` writes them anew."""

import json
from pathlib import Path

import pytest
import torch

import cg3d
from cg3d.models.registry import create_encoder, list_encoders

FILE = Path(__file__).with_name("golden.json")


def numbers(found: torch.Tensor) -> list[float]:
    "A few figures in which every entry has a part"
    weights = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view(found.shape)
    return [
        round(value.item(), 6)
        for value in (
            found.double().mean(),
            found.double().std(),
            (found.double() * weights).sum(),
            *found.flatten()[:3].double(),
        )
    ]


def of_encoder(name: str) -> list[float]:
    torch.manual_seed(0)
    encoder = create_encoder(name, dim=32, in_channels=6).eval()
    generator = torch.Generator().manual_seed(1)
    xyz = torch.nn.functional.normalize(torch.randn(2, 512, 3, generator=generator), dim=-1)
    with torch.no_grad():
        return numbers(encoder(torch.cat([xyz, torch.rand(2, 512, 3, generator=generator)], -1)))


def of_nano() -> dict[str, list[float]]:
    model, shapes = cg3d.load("nano"), cg3d.data.furniture.furniture().select(split="test")
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        return {
            "shapes": numbers(model.encode_shape([shapes[i] for i in range(4)])),
            "texts": numbers(model.backbone.encode_text(["a chair", "a tall lamp"])),
            "image": numbers(model.backbone.encode_image(torch.rand(1, 3, 128, 128, generator=generator))),
        }


@pytest.mark.parametrize("name", list_encoders())
def test_encoder(name):
    assert of_encoder(name) == pytest.approx(
        json.loads(FILE.read_text())["encoders"][name], rel=1e-3, abs=1e-3
    )


def test_shipped_weights():
    for what, found in of_nano().items():
        assert found == pytest.approx(json.loads(FILE.read_text())["nano"][what], rel=1e-3, abs=1e-3), what


if __name__ == "__main__":
    FILE.write_text(
        json.dumps(
            {"encoders": {name: of_encoder(name) for name in list_encoders()}, "nano": of_nano()}, indent=1
        )
        + "\n"
    )
