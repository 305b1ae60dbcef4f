"""Views in plain torch: equal to those by PyTorch3D, on the device of their input, in bounded memory."""

import math
from types import SimpleNamespace

import pytest
import torch
from fake_cuda import CUDA, fake_cloud, fake_cuda

from cg3d.data.furniture import furniture
from cg3d.geometry.ops import with_color
from cg3d.render import mesh as mesh_module
from cg3d.render import points as points_module
from cg3d.render.cameras import ViewSettings, broadcast_angles, cameras, random_views, ring_views
from cg3d.render.mesh import load_pytorch3d, render_mesh
from cg3d.render.points import least_eigenvector, neighbors, render_points, splat, splat_radius


@pytest.fixture(scope="module")
def pytorch3d():
    return pytest.importorskip("pytorch3d.renderer", exc_type=ImportError)


def random_cloud(kind: str, points: int, seed: int) -> torch.Tensor:  # (points, 6)
    generator = torch.Generator().manual_seed(seed)
    xyz = torch.randn(points, 3, generator=generator)
    if kind == "sphere":
        xyz = torch.nn.functional.normalize(xyz, dim=-1)
    elif kind == "box":  # flat faces: covariances of rank 2, many of them diagonal
        side = torch.randint(0, 3, (points,), generator=generator)
        xyz = (torch.rand(points, 3, generator=generator) - 0.5) * torch.tensor([1.0, 0.6, 0.3])
        xyz[torch.arange(points), side] = xyz[torch.arange(points), side].sign() * 0.3
    elif kind == "line":  # of rank 1
        xyz = xyz[:, :1] * torch.tensor([0.2, 0.3, 0.1])
    xyz = xyz / xyz.norm(dim=-1).max()
    return torch.cat([xyz, torch.rand(points, 3, generator=generator)], -1)


def by_pytorch3d(points, azimuth, elevation, settings):
    "The picture by PyTorch3D's cameras, eigenvectors and rasterizer, and the blending in its own words."
    from pytorch3d.common.workaround import symeig3x3
    from pytorch3d.renderer import FoVPerspectiveCameras, look_at_view_transform
    from pytorch3d.renderer.points.rasterize_points import rasterize_points
    from pytorch3d.structures import Pointclouds

    azimuth, elevation = broadcast_angles(azimuth, elevation, len(points), "cpu")
    cloud = with_color(points).repeat_interleave(azimuth.shape[1], 0)
    xyz, rgb = cloud[..., :3].contiguous(), cloud[..., 3:]
    distances, near = neighbors(xyz, max(settings.normal_neighbors, settings.spacing_neighbors + 1))
    radius = splat_radius(distances, settings)
    centered = (xyz - xyz.mean(1, keepdim=True)) * settings.normal_scale
    patches = torch.stack(
        [one[index] for one, index in zip(centered, near[..., : settings.normal_neighbors])]
    )
    spread = patches - patches.mean(2, keepdim=True)
    normals = symeig3x3((spread[..., :, None] * spread[..., None, :]).mean(2))[1][..., 0]
    rotation, shift = look_at_view_transform(settings.distance, elevation.flatten(), azimuth.flatten())
    camera = FoVPerspectiveCameras(R=rotation, T=shift, fov=settings.fov)
    to_view = camera.get_world_to_view_transform()
    seen, normals = to_view.transform_points(xyz), to_view.transform_normals(normals)
    facing = (normals * torch.nn.functional.normalize(-seen, dim=-1)).sum(-1, keepdim=True)
    normals = torch.where(facing < 0, -normals, normals)
    light = torch.nn.functional.normalize(torch.tensor(settings.key_direction), dim=0)
    bright = settings.ambient + settings.head * facing[..., 0].abs()
    bright = bright + settings.key * (normals @ light).clamp(min=0)
    colors = (rgb * bright[..., None]).clamp(0, 1).reshape(-1, 3)
    ndc = torch.cat([camera.transform_points(xyz)[..., :2], seen[..., 2:]], -1)
    radius = radius / math.tan(math.radians(settings.fov / 2)) / seen[..., 2]
    found = rasterize_points(
        Pointclouds(ndc), settings.size, radius, points_per_pixel=settings.points_per_pixel, bin_size=0
    )
    index, depth, distance = found
    weight = (1 - distance / radius.flatten()[index.clamp(min=0)] ** 2) * (index >= 0)
    weight = weight.clamp(min=0) * torch.exp(-(depth - depth[..., :1]).clamp(min=0) / settings.softness)
    blended = (colors[index.clamp(min=0)] * weight[..., None]).sum(-2) / weight.sum(-1, keepdim=True).clamp(
        min=1e-6
    )
    picture = torch.where(index[..., :1] >= 0, blended, 1.0)
    return picture.permute(0, 3, 1, 2).view(*azimuth.shape, 3, settings.size, settings.size)


SETTINGS = {
    "default": ViewSettings(),  # 128 pixels
    "large": ViewSettings(size=160),
    "odd size": ViewSettings(size=51, points_per_pixel=1),
    "exact normals": ViewSettings(size=64, normal_scale=30.0),
    "wide discs": ViewSettings(size=64, splat=3.0, min_radius=0.1, max_radius=0.5, points_per_pixel=9),
    "small discs": ViewSettings(size=96, min_radius=0.002, max_radius=0.01),
    "far camera": ViewSettings(size=64, distance=6.0, fov=25.0, softness=0.2),
    "near camera": ViewSettings(size=64, distance=1.2, fov=90.0, key_direction=(0.0, 1.0, 0.0)),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_views_equal_those_by_pytorch3d(pytorch3d, name):
    settings = SETTINGS[name]
    kinds = ("noise", "sphere", "box", "line")[
        : 3 if name == "exact normals" else 4
    ]  # a line has no exact normal
    clouds = torch.stack([random_cloud(kind, 400, seed) for seed, kind in enumerate(kinds)])
    angles = random_views((len(kinds), 2), torch.Generator().manual_seed(1), (-85, 85))
    views = render_points(clouds, *angles, settings=settings)
    difference = (views - by_pytorch3d(clouds, *angles, settings)).abs().flatten(2).mean(-1)
    assert difference.max() < 1e-3 and difference.mean() < 1e-4, difference


def test_views_of_bundled_shapes_equal_those_by_pytorch3d(pytorch3d):
    clouds = furniture().points([0, 150, 300, 450])
    for points in (clouds, clouds[..., :3]):  # colored, and gray
        for angles in (ring_views(2), (torch.tensor([0.0, 45]), torch.tensor([90.0, -90]))):
            views = render_points(points, *angles, size=64)
            difference = (views - by_pytorch3d(points, *angles, ViewSettings(size=64))).abs()
            assert difference.flatten(2).mean(-1).max() < 1e-3, difference.mean()


def test_cameras_equal_those_of_pytorch3d(pytorch3d):
    azimuth, elevation = random_views(200, torch.Generator().manual_seed(0), (-89, 89))
    azimuth[:4], elevation[:4] = torch.tensor([0.0, 360, -90, 720]), torch.tensor([90.0, -90, 120, 200])
    settings, xyz = ViewSettings(distance=3.0, fov=35.0), random_cloud("noise", 50, 0)[None, :, :3]
    rotation, shift = pytorch3d.look_at_view_transform(3.0, elevation, azimuth)
    other = pytorch3d.FoVPerspectiveCameras(R=rotation, T=shift, fov=35.0)
    ours = cameras(azimuth, elevation, settings)
    seen = ours.to_view(xyz.expand(200, -1, -1))
    torch.testing.assert_close(
        seen, other.get_world_to_view_transform().transform_points(xyz), atol=1e-5, rtol=0
    )
    in_picture = ours.to_picture(seen)
    torch.testing.assert_close(
        in_picture[..., :2], other.transform_points(xyz)[..., :2], atol=1e-5, rtol=1e-5
    )
    assert torch.equal(in_picture[..., 2], seen[..., 2])
    axes = ours.axes.double()
    torch.testing.assert_close(axes @ axes.mT, torch.eye(3).double().expand(200, 3, 3), atol=1e-6, rtol=0)


def test_cameras_stay_on_the_device_of_their_angles():
    "look_at_view_transform copied every chunk of angles to the CPU and back."
    angles = torch.zeros(2, device="meta")
    assert cameras(angles, angles, ViewSettings()).axes.device.type == "meta"


def test_eigenvectors_of_well_separated_values_are_exact():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(500, 3, 3, generator=generator)).Q
    values = torch.rand(500, 3, generator=generator).sort(-1).values + torch.tensor([0.0, 1.0, 3.0])
    matrix = basis @ torch.diag_embed(values) @ basis.mT
    found = least_eigenvector(matrix)
    assert ((found * basis[..., 0]).sum(-1).abs() > 1 - 1e-4).all()
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(500))


def test_memory_is_bounded_and_parts_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    ndc = torch.rand(3, 400, 3, generator=generator) * 2 - torch.tensor([1.0, 1.0, -0.1])
    ndc[0, :50, 2] = ndc[0, 0, 2]  # discs at one depth
    radius = 0.05 + 0.2 * torch.rand(3, 400, generator=generator)
    whole, largest, cover = splat(ndc, radius, 40, 5), [], points_module._cover

    def watched(*args):
        found = cover(*args)
        largest.append(len(found[0]))
        return found

    monkeypatch.setattr(points_module, "_cover", watched)
    monkeypatch.setattr(points_module, "PAIRS_AT_ONCE", 2000)
    for one, other in zip(whole, splat(ndc, radius, 40, 5)):
        assert torch.equal(one, other)
    assert len(largest) > 10 and max(largest) <= 2000 + 40 * 40


def test_points_at_and_behind_the_camera_are_left_out():
    ndc = torch.tensor([[[float("nan"), float("inf"), 0.0], [0, 0, -1], [0, 0, 1]]])
    index, depth, distance = splat(ndc, torch.tensor([[float("inf"), -0.5, 0.5]]), 8, 3)
    assert (
        set(index.unique().tolist()) == {-1, 2}
        and (depth[index >= 0] == 1).all()
        and distance.isfinite().all()
    )


SYNCHRONIZATIONS = {
    "render/points.py:_parts",
    "render/points.py:_runs",
}  # counts of pairs, per chunk of views


@pytest.mark.parametrize("channels", [3, 6])
def test_points_on_fake_cuda(monkeypatch, channels):
    monkeypatch.setattr(
        points_module, "check_points", lambda points: points
    )  # reads whether values are finite
    with fake_cuda() as recorder:
        angles = torch.rand(5, device=CUDA) * 360, torch.rand(5, device=CUDA) * 30
        views = render_points(fake_cloud(4, 300, channels), *angles, size=32)
        assert views.device == CUDA and views.shape == (4, 5, 3, 32, 32)
    assert set(recorder.callers) == SYNCHRONIZATIONS and len(recorder.callers) == 3, recorder.callers


def test_meshes_on_fake_cuda(monkeypatch):
    """Cameras, angles and the picture were made on the CPU, whatever the device of the mesh.

    The rasterizer and the textures are compiled code, which fake tensors cannot enter: a stand-in gives what they
    return, on the device of the mesh."""

    class Meshes:
        textures = True

        def __len__(self):
            return 1

        def verts_packed(self):
            return torch.rand(8, 3, device=CUDA)

        def faces_packed(self):
            return torch.zeros(12, 3, dtype=torch.int64, device=CUDA)

        def sample_textures(self, found):
            return torch.rand(*found.pix_to_face.shape, 3, device=CUDA)

    class Camera:
        def __init__(self, R, T, fov, device):
            assert R.device == T.device == device == CUDA

    class Rasterizer:
        def __init__(self, camera, settings):
            self.size = settings["image_size"]

        def __call__(self, meshes):
            shape = (1, self.size, self.size, 1)
            faces = torch.zeros(shape, dtype=torch.int64, device=CUDA)
            return SimpleNamespace(pix_to_face=faces, bary_coords=torch.rand(*shape, 3, device=CUDA))

    renderer = SimpleNamespace(
        FoVPerspectiveCameras=Camera, MeshRasterizer=Rasterizer, RasterizationSettings=lambda **named: named
    )
    monkeypatch.setattr(mesh_module, "load_pytorch3d", lambda: (renderer, SimpleNamespace(Meshes=Meshes)))
    with fake_cuda():
        views = render_mesh(Meshes(), *ring_views(2), size=16)
        assert views.device == CUDA and views.shape == (1, 2, 3, 16, 16)


def test_a_mesh_of_pytorch3d_is_drawn(pytorch3d):
    _, structures = load_pytorch3d()
    corners = torch.tensor([[-1.0, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]])
    textures = pytorch3d.TexturesVertex([torch.tensor([[1.0, 0, 0]]).expand(4, 3)])
    square = structures.Meshes([corners], [torch.tensor([[0, 1, 2], [0, 2, 3]])], textures)
    plain = ViewSettings(ambient=1, key=0, head=0, distance=4)
    view = render_mesh(square, torch.zeros(1), torch.zeros(1), 32, plain)[0, 0]
    side = 2 * plain.distance * math.tan(math.radians(25)) / 32  # of a pixel, on the square's plane
    assert abs((1 - view[1]).sum().item() * side**2 - 4) < 0.2  # covered, edges in part
    assert (view[0] == 1).all() and (view[1:, 16, 16] == 0).all()
