"""What is said, and drawn, where PyTorch3D is missing or does not load."""

import sys

import pytest
import trimesh
from typer.testing import CliRunner

from cg3d.cli.app import app
from cg3d.core.errors import MissingPackage, install_hint
from cg3d.render.cameras import ring_views
from cg3d.render.mesh import render_mesh


@pytest.fixture(params=["missing", "broken"])
def no_pytorch3d(request, monkeypatch):
    "PyTorch3D is not installed, or its extension finds no CUDA libraries."
    for name in [name for name in sys.modules if name.partition(".")[0] == "pytorch3d"]:
        monkeypatch.delitem(sys.modules, name)
    if request.param == "missing":
        monkeypatch.setitem(sys.modules, "pytorch3d", None)
        return "which is missing"

    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "pytorch3d.renderer":
                raise OSError("libcudart.so.12: cannot open shared object file")

    pytest.importorskip("pytorch3d")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    return "libcudart.so.12: cannot open shared object file"


def test_pictures_of_surfaces_name_what_they_need(no_pytorch3d):
    with pytest.raises(MissingPackage, match=no_pytorch3d) as caught:
        render_mesh(trimesh.creation.box(), *ring_views(1), size=32)
    assert caught.value.remedy == install_hint("render") and caught.value.value == "pytorch3d"


def test_the_command_line_draws_points_and_says_so(no_pytorch3d, tmp_path):
    trimesh.creation.icosphere().export(tmp_path / "ball.ply")
    words = ["render", tmp_path / "ball.ply", "-o", tmp_path / "ball.png", "--views", "1", "--size", "32"]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    assert "ball.ply: its points are drawn, not its surface" in done.stderr and no_pytorch3d in done.stderr
    words[3] = tmp_path / "points.png"
    assert CliRunner().invoke(app, [str(word) for word in [*words, "--points"]]).exit_code == 0
    assert (tmp_path / "ball.png").read_bytes() == (tmp_path / "points.png").read_bytes()
