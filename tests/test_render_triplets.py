"Views, texts, the view cache and the training item, on shapes made here."

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from cg3d.data.captions import TextMix, draw_text, list_texts
from cg3d.data.triplets import Triplets, collate
from cg3d.io.collection import write_collection
from cg3d.io.color import to_srgb
from cg3d.io.shape import Shape
from cg3d.models.templates import TEMPLATES, fill_template
from cg3d.render import view_cache
from cg3d.render.cameras import ViewSettings, broadcast_angles, random_views, ring_views
from cg3d.render.mesh import render_mesh
from cg3d.render.points import neighbors, render_points, splat
from cg3d.render.view_cache import ViewCache


def ball(n=300, seed=0, colored=True):
    generator = torch.Generator().manual_seed(seed)
    xyz = torch.nn.functional.normalize(torch.randn(n, 3, generator=generator), dim=-1)
    return torch.cat([xyz, (xyz + 1) / 2], -1) if colored else xyz


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    clouds = [ball(256, seed) for seed in range(6)]
    shapes = [
        Shape(
            c[:, :3].numpy() * (1, 1 + i, 1),
            c[:, 3:].numpy() if i else None,
            name=f"ball {i}",
            tags=("toy",),
            id=f"b{i}",
            caption=f"caption {i}" if i % 2 else "",
            size=(0.1, 0.1 + i, 0.1),
        )
        for i, c in enumerate(clouds)
    ]
    columns = pd.DataFrame(dict(split=["train"] * 4 + ["test"] * 2))
    return write_collection(tmp_path_factory.mktemp("set") / "balls", shapes, n=256, columns=columns)


def test_leaf_imports_stay_light():
    code = "import sys, cg3d.render.cameras, cg3d.data.captions; print([m for m in ('pytorch3d', 'trimesh', 'open_clip', 'plotly', 'accelerate', 'sklearn') if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def splat_slow(ndc, radius, size, k):
    "PyTorch3D's rasterizer, which compares every pixel with every point."
    pytest.importorskip("pytorch3d.renderer", exc_type=ImportError)
    from pytorch3d.renderer.points.rasterize_points import rasterize_points
    from pytorch3d.structures import Pointclouds

    return rasterize_points(Pointclouds(ndc), image_size=size, radius=radius, points_per_pixel=k, bin_size=0)


@pytest.mark.parametrize("size,k", [(32, 1), (48, 4), (33, 7)])
def test_splat_equals_pytorch3d(size, k):
    generator = torch.Generator().manual_seed(size)
    ndc = torch.rand(2, 150, 3, generator=generator) * torch.tensor([2.4, 2.4, 2.0]) - torch.tensor(
        [1.2, 1.2, 0.2]
    )  # some outside, some behind
    radius = 0.02 + 0.15 * torch.rand(2, 150, generator=generator)
    for fast, slow in zip(splat(ndc, radius, size, k), splat_slow(ndc, radius, size, k)):
        assert (fast - slow).abs().gt(1e-5).float().mean() < 1e-3
    assert (splat(ndc + 5, radius, size, k)[0] == -1).all()  # nothing in the picture


def test_views_follow_the_contract():
    views = render_points(
        torch.stack([ball(seed=1), ball(seed=2)]),
        *random_views((2, 3), torch.Generator().manual_seed(0)),
        size=40,
    )
    assert (
        views.shape == (2, 3, 3, 40, 40)
        and views.dtype == torch.float32
        and 0 <= views.min()
        and views.max() <= 1
    )
    assert (views[..., 0, 0] == 1).all() and (views < 1).any(2).float().mean() > 0.2
    assert torch.equal(
        views[:1],
        render_points(
            ball(seed=1)[None],
            *(a[:1] for a in random_views((2, 3), torch.Generator().manual_seed(0))),
            size=40,
        ),
    )
    gray = render_points(ball(colored=False)[None], *ring_views(1), size=40)
    assert (gray.amax(2) - gray.amin(2)).max() < 1e-5 and gray.min() < 0.5


@pytest.mark.parametrize("n", [1, 2, 5])
def test_tiny_clouds_are_drawn(n):
    cloud = torch.tensor([[0.0, 0.0, 0.0], [0.5, 0, 0], [0, 0.5, 0], [0, 0, 0.5], [-0.5, 0, 0]])[:n][None]
    views = render_points(cloud, *ring_views(2), size=32)
    assert views.isfinite().all() and (views < 1).any()


def test_bad_views_are_refused():
    with pytest.raises(ValueError):
        render_points(torch.zeros(2, 5), 0.0, 0.0)
    with pytest.raises(ValueError):
        render_points(torch.full((1, 5, 3), float("nan")), 0.0, 0.0)
    with pytest.raises(ValueError, match="azimuth"):
        render_points(ball()[None], torch.zeros(3, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="size"):
        ViewSettings(size=-1)
    pytest.importorskip("pytorch3d.renderer", exc_type=ImportError)
    with pytest.raises(FileNotFoundError):
        render_mesh("nowhere.glb", *ring_views(1))
    with pytest.raises(TypeError):
        render_mesh(3, *ring_views(1))


def test_mesh_stands_upright_and_keeps_its_colors(tmp_path):
    import trimesh

    pytest.importorskip("pytorch3d.renderer", exc_type=ImportError)

    box = trimesh.creation.box((0.2, 1.0, 0.2))  # tall along y
    box.visual.vertex_colors = np.tile([220, 30, 30, 255], (8, 1))
    box.export(tmp_path / "box.glb")
    seen = render_mesh(tmp_path / "box.glb", *ring_views(1), size=48)[0, 0]
    hit = (seen < 0.99).any(0)
    high, wide = hit.any(1).sum(), hit.any(0).sum()
    assert high > 2 * wide and seen[0][hit].mean() > 2 * seen[1][hit].mean()
    flat = (render_mesh(box, *ring_views(1), size=48, up="z")[0, 0] < 0.99).any(0)
    assert flat.any(1).sum() < high  # z up: y lies down

    from pytorch3d.renderer import TexturesVertex
    from pytorch3d.structures import Meshes

    verts, faces = (
        torch.tensor(box.vertices).float() / np.linalg.norm([0.1, 0.5, 0.1]),
        torch.tensor(box.faces),
    )
    color = torch.from_numpy(to_srgb(np.array([220, 30, 30]) / 255)).float()  # COLOR_0 of a GLB is linear
    mesh = Meshes([verts], [faces], TexturesVertex([color.expand(8, 3)]))
    assert (render_mesh(mesh, *ring_views(1), size=48)[0, 0] - seen).abs().max() < 0.02


def test_texts():
    assert all(fill_template(t, "oven").count("oven") == 1 for t in TEMPLATES) and len(TEMPLATES) >= 10
    row = dict(
        name="stool",
        tags="Seat, Blend Swap",
        width=0.3,
        height=0.9,
        depth=0.3,
        caption="c",
        query="q",
        category="chair",
    )
    texts = list_texts(row, ("red",))
    assert "a tall red stool" in texts["attributes"] and texts["caption"] == ["c"]
    assert "blend swap" not in str(texts)
    drawn = {draw_text(row, torch.Generator().manual_seed(i)) for i in range(200)}
    assert {"c", "q", "a stool, seat"} <= drawn and not any("chair" in text for text in drawn)
    assert draw_text(row, torch.Generator().manual_seed(3)) == draw_text(
        row, torch.Generator().manual_seed(3)
    )
    with pytest.raises(TypeError):
        TextMix(color=1)


def test_cache_is_continued_after_an_interruption(tmp_path, monkeypatch):
    points, calls = torch.stack([ball(seed=s) for s in range(20)]), []

    def fails(clouds, *args, **kwargs):
        calls.append(len(clouds))
        if len(calls) > 1:
            raise KeyboardInterrupt
        return render_points(clouds, *args, **kwargs)

    options = dict(views=2, settings=ViewSettings(size=16), folder=tmp_path, workers=1, progress=False)
    monkeypatch.setattr(view_cache, "render_points", fails)
    with pytest.raises(KeyboardInterrupt):
        ViewCache(points, **options)
    (folder,) = (tmp_path / "views").iterdir()
    assert not (folder / "array.npy").exists() and not (folder / "manifest.json").exists()
    rendered = []

    def watched(clouds, *args, **kwargs):
        rendered.append(len(clouds))
        return render_points(clouds, *args, **kwargs)

    monkeypatch.setattr(view_cache, "render_points", watched)
    cache, again = ViewCache(points, **options), ViewCache(points, **options | dict(workers=2))
    assert rendered == [8, 4], "the first eight shapes were kept, and nothing is rendered twice"
    assert not cache.hit and again.hit and cache[3, 1].shape == (3, 16, 16)
    expected = render_points(points, cache.azimuth, cache.elevation, size=16)[:, 0]
    assert (cache[:, 0] - expected).abs().max() <= 0.5 / 255 + 1e-6
    moved = points + torch.tensor([0.0, 0.01, 0, 0, 0, 0])
    assert not ViewCache(moved, **options).hit, "other content, other key"


def test_an_unchanged_cache_is_opened_without_reading_it(tmp_path, monkeypatch):
    "Every start compared the checksum of all views: 240 GB for ShapeNet at 30 views of 224 pixels, on every rank."
    points = torch.stack([ball(seed=s) for s in range(3)])
    options = dict(views=2, settings=ViewSettings(size=16), folder=tmp_path, progress=False)
    ViewCache(points, **options)
    monkeypatch.setattr("cg3d.core.cache.checksum", None)
    assert ViewCache(points, **options).hit


def test_neighbors_of_other_devices_are_those_of_the_tree(monkeypatch):
    "On a GPU `geometry.ops.knn` takes the place of the k-d tree."
    from cg3d.geometry.ops import knn

    xyz = ball(400)[None, :, :3]
    distances, indices = neighbors(xyz, 13)
    by_table = knn(xyz, xyz, 13)
    assert torch.equal(indices, by_table[1]) and (distances - by_table[0]).abs().max() < 1e-6
    meta = neighbors(torch.empty(1, 40, 3, device="meta"), 5)
    assert meta[1].shape == (1, 40, 5) and meta[1].device.type == "meta"


def test_angles():
    for azimuth, elevation in ((torch.zeros(3), 20.0), (torch.zeros(2, 3), torch.zeros(3))):
        assert [tuple(a.shape) for a in broadcast_angles(azimuth, elevation, 2, "cpu")] == [(2, 3)] * 2
    for wrong in (torch.zeros(3, 3), torch.zeros(0), torch.zeros(1, 1, 1)):
        with pytest.raises(ValueError, match=r"\(V,\) or \(2, V\)"):
            broadcast_angles(wrong, wrong, 2, "cpu")


@pytest.mark.parametrize("chunk", [1, 3, None])
def test_views_do_not_depend_on_how_many_are_drawn_at_once(chunk):
    points = torch.stack([ball(seed=s) for s in range(2)])
    expected = render_points(points, *ring_views(3), size=24, chunk=100)
    assert torch.equal(render_points(points, *ring_views(3), size=24, chunk=chunk), expected)


def test_triplets(collection, tmp_path, monkeypatch):
    monkeypatch.setenv("CG3D_CACHE", str(tmp_path))
    options = dict(points=64, views=3, size=16, progress=False)
    data = Triplets(collection, "train", **options)
    assert len(data) == 4 and len(list((tmp_path / "views").iterdir())) == 1
    batch = data.batch([0, 2, 3], epoch=1)
    assert (
        batch["points"].shape == (3, 64, 6)
        and batch["images"].shape == (3, 3, 16, 16)
        and batch["id"] == ["b0", "b2", "b3"]
    )
    assert (
        (batch["points"][0, :, 3:] == 0.4).all() and 0 <= batch["images"].min() and batch["images"].max() <= 1
    )
    data.set_epoch(1)
    items = collate([data[0], data[2], data[3]])
    assert (
        torch.equal(items["points"], batch["points"])
        and torch.equal(items["images"], batch["images"])
        and items["texts"] == batch["texts"]
    )
    assert {tuple(data.batch([1], epoch)["view"].tolist()) for epoch in range(3)} == {
        (0,),
        (1,),
        (2,),
    }  # all views in turn
    resumed = Triplets(collection, "train", **options)
    assert resumed.cache.hit and torch.equal(resumed.batch([0, 2, 3], 1)["points"], batch["points"])
    other = Triplets(collection, "train", **options, seed=1)
    assert not torch.equal(other.batch([0, 2, 3], 1)["points"], batch["points"])

    held = Triplets(collection, ["test"], **options, train=False)
    assert held.batch([0, 1], 0)["texts"] == held.batch([0, 1], 7)["texts"] and held.batch([1])["texts"] == [
        "caption 5"
    ]
    dealt = Triplets(collection, "train", **options, shuffle_texts=True)
    assert dealt.row_texts != data.row_texts
    assert sorted(map(str, dealt.row_texts)) == sorted(map(str, data.row_texts))
    with pytest.raises(ValueError, match="points=999"):
        Triplets(collection, points=999)
