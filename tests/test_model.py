"""Backbone, prompts and model together: gradients, frozenness, checkpoints, bad input."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import wraps
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import trimesh
from PIL import Image

from cg3d.core.device import pick_device
from cg3d.core.errors import InputError
from cg3d.geometry.ops import MISSING_COLOR, normalize
from cg3d.io.shape import Shape, read_shape
from cg3d.models import cg3d as model_module
from cg3d.models import clip_backbone as backbone_module
from cg3d.models import views as views_module
from cg3d.models.cg3d import CG3D, CG3DConfig, as_points, resample
from cg3d.models.clip_backbone import CONFIG_FILE, NANO_CONFIG, Backbone, fit_images, load_backbone
from cg3d.models.prompts import Prompts
from cg3d.models.views import embed_views
from cg3d.pretrained.factory import load
from cg3d.render.cameras import ring_views
from cg3d.render.mesh import render_mesh

ROOT = Path(__file__).parent.parent
CHOICES = [("pixel", None), ("shallow", None), ("deep", None), (None, "context"), ("pixel+deep", "context")]
TEXTS = ["a chair", "a lamp " * 60]  # the second one is too long for any context


@pytest.fixture(scope="module", params=["nano", "ViT-B-32"])
def tower(request) -> Backbone:
    torch.manual_seed(0)
    loaded = load_backbone(request.param, "random")
    loaded.at_start = loaded.fingerprint()
    return loaded


@pytest.fixture(scope="module")
def small() -> Backbone:
    torch.manual_seed(0)
    return load_backbone("nano", "random")


@pytest.fixture
def model(small) -> CG3D:
    torch.manual_seed(0)
    return CG3D.build(backbone=small, encoder="pointnet", points=128, clip_weights="random")


@pytest.fixture
def shape() -> Shape:
    return Shape(np.random.default_rng(0).normal(size=(500, 3)).astype("float32"), name="cloud")


@pytest.mark.parametrize("visual,text", CHOICES)
def test_prompts_learn_and_the_tower_stays(tower, visual, text):
    torch.manual_seed(0)
    prompts = Prompts(tower, visual, text, tokens=3).train()
    views = torch.rand(2, 3, 96, 96)
    optimizer = torch.optim.Adam(
        [*prompts.parameters(), *tower.parameters()], lr=0.1
    )  # the tower too: it must not move
    image, words = prompts.encode_image(views), prompts.encode_text(TEXTS)
    assert image.shape == words.shape == (2, tower.dim)
    (1 - torch.cosine_similarity(image, words)).mean().backward()
    for name, parameter in prompts.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert (
            (parameter.grad.flatten(1) if parameter.ndim == 2 else parameter.grad.flatten(0, -2))
            .abs()
            .sum(-1)
            .gt(0)
            .all()
        ), f"a part of {name} has no gradient"
    assert all(parameter.grad is None for parameter in tower.parameters())
    optimizer.step()
    assert tower.fingerprint() == tower.at_start
    with torch.no_grad():
        moved = (
            not torch.allclose(prompts.encode_image(views), image, atol=1e-5),
            not torch.allclose(prompts.encode_text(TEXTS), words, atol=1e-5),
        )
    assert moved == (visual is not None, text is not None)


def test_off_is_the_backbone(tower):
    off, views = Prompts(tower, "none", None), torch.rand(2, 3, 64, 80)
    assert not list(off.parameters())
    with torch.no_grad():
        assert torch.equal(off.encode_image(views), tower.encode_image(views))
        assert torch.equal(off.encode_text(TEXTS), tower.encode_text(TEXTS))
        assert torch.equal(Prompts(tower, "pixel").encode_image(views), tower.encode_image(views)), (
            "zeros at first"
        )


def test_prompts_are_gone_after_use(tower):
    views = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        plain = tower.encode_image(views), tower.encode_text(TEXTS)
        prompts = Prompts(tower, "deep", "context")
        prompts.encode_image(views), prompts.encode_text(TEXTS)
        with pytest.raises(TypeError):
            prompts.encode_text(["fine", 3])
        assert torch.equal(plain[0], tower.encode_image(views)) and torch.equal(
            plain[1], tower.encode_text(TEXTS)
        )


def test_cached_stem_gives_the_same_gradients(tower):
    prompts, views = Prompts(tower, "deep"), torch.rand(2, 3, 64, 64)
    prompts.encode_image(views).sum().backward()
    first = [parameter.grad.clone() for parameter in prompts.parameters()]
    prompts.zero_grad()
    prompts.encode_tokens(tower.image_tokens(views)).sum().backward()
    for one, parameter in zip(first, prompts.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, one)
    with pytest.raises(ValueError, match="pixel"):
        Prompts(tower, "pixel+deep").encode_tokens(tower.image_tokens(views))


def test_unknown_and_impossible_prompts(small):
    with pytest.raises(ValueError, match="pixel, shallow, deep"):
        Prompts(small, "deeep")
    with pytest.raises(ValueError, match="context"):
        Prompts(small, None, "coop")
    with pytest.raises(ValueError, match="at least one"):
        Prompts(small, tokens=0)
    with pytest.raises(ValueError, match="no room"):
        Prompts(small, None, "context", tokens=47)


def test_a_tower_without_blocks_takes_pixels_only():
    backbone = load_backbone("RN50", "random")
    with pytest.raises(ValueError, match="ModifiedResNet"):
        Prompts(backbone, "deep")
    assert Prompts(backbone, "pixel").encode_image(torch.rand(1, 3, 32, 32)).shape == (1, backbone.dim)


def test_half_precision_folder_loads_as_float32(tmp_path, small):
    from safetensors.torch import save_file

    folder = tmp_path / "tower"
    folder.mkdir()
    (folder / CONFIG_FILE).write_text(json.dumps(NANO_CONFIG))
    with pytest.raises(FileNotFoundError, match="no weights"):
        load_backbone(str(folder))
    state = small.clip.state_dict()
    save_file(
        {
            name: value.half().contiguous() if value.is_floating_point() else value
            for name, value in state.items()
        },
        folder / "open_clip_model.safetensors",
    )
    first, second = load_backbone(f"local-dir:{folder}"), load_backbone(folder)
    assert {parameter.dtype for parameter in first.parameters()} == {torch.float32}
    assert first.fingerprint() == second.fingerprint() != small.fingerprint()
    views = torch.rand(2, 3, 128, 128)
    torch.testing.assert_close(first.encode_image(views), small.encode_image(views), atol=0.02, rtol=0.02)
    save_file(
        {name: value.half().contiguous() for name, value in state.items() if "blocks.3" not in name},
        folder / "open_clip_model.safetensors",
    )
    with pytest.raises(ValueError, match="do not fit"):
        load_backbone(folder)


def test_backbone_names(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="openai.*random"):
        load_backbone("ViT-B-32")
    with pytest.raises(ValueError, match="ViT-B-32"):
        load_backbone("ViT-B-33", "openai")
    with pytest.raises(ValueError, match="neither a file nor a tag"):
        load_backbone("ViT-B-32", "opanai")
    with pytest.raises(FileNotFoundError, match=CONFIG_FILE):
        load_backbone(tmp_path)
    asked = {}

    @wraps(open_clip.create_model)  # its parameters are checked before it is called
    def offline(*args, **settings):
        asked.update(settings)
        raise RuntimeError("Failed to download")

    monkeypatch.setattr("open_clip.create_model", offline)
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE"):
        load_backbone("ViT-B-32", "openai")
    assert asked["force_quick_gelu"], "OpenAI's weights were trained with QuickGELU"
    monkeypatch.setattr(backbone_module, "data_dir", lambda: tmp_path)
    with pytest.raises(FileNotFoundError):
        load_backbone("nano")


def test_images_are_fitted():
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import center_crop, resize

    for height, width in ((50, 90), (90, 47), (20, 20), (33, 200)):
        image = torch.rand(1, 3, height, width)
        expected = center_crop(
            resize(image, 32, interpolation=InterpolationMode.BICUBIC, antialias=True).clamp(0, 1), 32
        )
        torch.testing.assert_close(fit_images(image, (32, 32)), expected, msg=f"{height} x {width}")
    image = torch.rand(1, 3, 50, 90)
    assert fit_images(image, (32, 32), "longest")[0, :, 0].eq(1).all(), "white above"
    with pytest.raises(ValueError, match="stretch"):
        fit_images(image, (32, 32), "stretch")


def test_embeddings(model, shape):
    clouds = torch.rand(5, 128, 6)
    for vectors, count in (
        (model.encode_shape(shape), 1),
        (model.encode_shape([shape, shape]), 2),
        (model.encode_shape(clouds, batch_size=2), 5),
        (model.encode_shape(clouds[..., :3]), 5),
        (model.encode_text("one"), 1),
        (model.encode_image(Image.new("RGBA", (9, 5))), 1),
        (model.encode_image([torch.rand(3, 8, 8)] * 2), 2),
    ):
        assert (
            vectors.shape == (count, model.backbone.dim)
            and vectors.dtype == torch.float32
            and not vectors.requires_grad
        )
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(count))
    model.train()
    torch.testing.assert_close(model.encode_shape(clouds), model.encode_shape(clouds, batch_size=1))
    assert model.encoder.training and not model.backbone.training
    unit = normalize(clouds)
    with torch.no_grad():
        bare = model.eval().encoder(unit)
    torch.testing.assert_close(torch.nn.functional.normalize(bare, dim=-1), model.encode_shape(unit))


def test_forward_trains_encoder_and_prompts_only(model):
    model.train()
    outputs = model(torch.rand(2, 128, 6), torch.rand(2, 3, 64, 64), ["a", "b"])
    sum(output.square().sum() for output in outputs).backward()
    grads = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert grads == {"encoder", "prompts"}


@pytest.mark.parametrize("count", [30, 128, 400, 5000])
def test_resample(count):
    points = torch.randn(2, count, 6)
    kept = resample(points, 128)
    assert kept.shape == (2, 128, 6) and torch.equal(kept, resample(points, 128))
    assert (kept[:, :, None] == points[:, None]).all(-1).any(-1).all(), "no point is made up"
    assert len(kept[0].unique(dim=0)) == min(count, 128)


@pytest.mark.parametrize(
    "bad",
    [
        torch.rand(2, 64, 5),
        torch.rand(64, 3),
        torch.rand(1, 64, 3).half(),
        torch.rand(1, 64, 3).double(),
        torch.full((1, 64, 3), float("nan")),
        torch.ones(1, 64, 3),
        torch.rand(1, 1, 3),
        torch.rand(0, 64, 3),
        [],
        [1],
        None,
        {"points": np.zeros((64, 3))},
        np.zeros((1, 64, 3)),
        np.zeros((64, 3)),
        np.ones((4, 64, 7)),
        np.full((64, 3), np.nan),
        np.random.default_rng(0).uniform(0, 255, (64, 6)),
        [torch.rand(1, 64, 3)],
    ],
)
def test_bad_clouds(model, bad):
    with pytest.raises((ValueError, TypeError)):
        model.encode_shape(bad)


@pytest.mark.parametrize(
    "bad",
    [
        torch.rand(4, 8, 8),
        torch.rand(3, 8, 8) * 255,
        torch.zeros(3, 8, 8, dtype=torch.uint8),
        torch.full((3, 8, 8), float("nan")),
        [],
        "a.png",
    ],
)
def test_bad_images(model, bad):
    with pytest.raises((ValueError, TypeError)):
        model.encode_image(bad)


def test_files_arrays_and_meshes_are_shapes(model, tmp_path):
    "What a newcomer has at hand may be classified as it is."
    solid = trimesh.creation.box((1, 2, 1))
    for name in ("box.glb", "box.ply"):
        solid.export(tmp_path / name)
    expected = model.encode_shape(read_shape(tmp_path / "box.glb"))
    for given in (str(tmp_path / "box.glb"), tmp_path / "box.ply", solid, trimesh.Scene([solid])):
        torch.testing.assert_close(model.encode_shape(given), expected, atol=1e-5, rtol=0)
    table = model.classify([tmp_path / "box.glb", solid], ["box", "ball"], top=1)
    assert table["shape"].tolist() == ["box", "mesh"] and table["similarity"].nunique() == 1
    with pytest.raises(FileNotFoundError, match="chair.glb"):
        model.classify("chair.glb", ["chair"])
    with pytest.raises(FileNotFoundError, match="lamp.glb"):
        model.encode_shape([solid, "lamp.glb"])
    cloud = np.random.default_rng(0).random((300, 6))
    one = model.encode_shape(cloud.astype(np.float32))
    assert one.shape == (1, model.backbone.dim)
    for given in (
        cloud,
        [cloud],
        cloud[None],
        torch.from_numpy(cloud).float()[None],
        [torch.from_numpy(cloud)],
    ):
        torch.testing.assert_close(model.encode_shape(given), one, atol=1e-4, rtol=0)
    far = cloud + [5e6, 3e6, 0, 0, 0, 0]  # coordinates of a map, in float64
    torch.testing.assert_close(model.encode_shape(far[None]), one, atol=1e-4, rtol=0)
    torch.testing.assert_close(model.encode_shape(far), one, atol=1e-4, rtol=0)


def test_views_are_averaged_with_the_3d_embedding(model, shape, monkeypatch):
    clouds = normalize(torch.rand(3, 128, 6))
    seen = embed_views(model.prompts, clouds, ring_views(2), mean=True)
    expected = torch.nn.functional.normalize(model.encode_shape(clouds) + seen, dim=-1)
    voted = model.encode_shape(clouds, views=2)
    torch.testing.assert_close(voted, expected, atol=3e-4, rtol=0)
    torch.testing.assert_close(voted, model.encode_shape(clouds, views=2, batch_size=2), atol=3e-4, rtol=0)
    assert (voted * model.encode_shape(clouds)).sum(-1).max() < 0.99
    agreement = model.encode_shape(clouds, views=2, normalize=False).norm(dim=-1)
    assert (agreement < 1).all() and (agreement > 0).all()
    tables = [model.classify(shape, ["chair", "lamp"], views=views) for views in (0, 2)]
    assert tables[0]["similarity"].tolist() != tables[1]["similarity"].tolist()
    monkeypatch.setattr(model, "views", 2, raising=False)  # for callers that cannot pass it on
    assert torch.equal(model.encode_shape(clouds), voted)
    assert model.classify(shape, ["chair", "lamp"]).equals(tables[1])
    assert model.classify(shape, ["chair", "lamp"], views=0).equals(tables[0])
    for wrong in (-1, 1.5, True):
        with pytest.raises(InputError, match="views="):
            model.encode_shape(clouds, views=wrong)
        with pytest.raises(InputError, match="views="):
            model.classify(clouds, ["chair", "lamp"], views=wrong)


def test_views_of_a_mesh_show_its_surface(model, tmp_path, monkeypatch):
    solid = trimesh.creation.box((1, 1, 1))
    solid.visual.face_colors = [200, 30, 30, 255]
    solid.export(tmp_path / "box.glb")
    drawn = []

    def render(mesh, azimuth, elevation, size, settings):
        drawn.append((len(azimuth), size))
        return render_mesh(mesh, azimuth, elevation, size, settings)

    monkeypatch.setattr(views_module, "render_mesh", render)
    surface = model.encode_shape(tmp_path / "box.glb", views=3)
    assert drawn == [(3, max(model.backbone.image_size))]
    model.encode_shape(solid, views=1)
    assert len(drawn) == 2, "an object of trimesh has a surface, too"
    points = model.encode_shape(read_shape(tmp_path / "box.glb"), views=3)
    monkeypatch.setattr(views_module, "mesh_renderer_loads", lambda: False)
    torch.testing.assert_close(model.encode_shape(tmp_path / "box.glb", views=3), points)
    assert len(drawn) == 2 and not torch.allclose(points, surface, atol=1e-3)


def test_classify(model, shape):
    table = model.classify([shape, shape], ["chair", "lamp", "sofa"])
    assert list(table.columns) == ["row", "shape", "label", "probability", "similarity"] and len(table) == 6
    assert table.groupby("row").probability.sum().sub(1).abs().max() < 1e-5
    for _, part in table.groupby("row"):
        assert part.similarity.is_monotonic_decreasing
    best = model.classify(shape, ["chair", "lamp", "sofa"], top=1)
    assert best.label.tolist() == [table.label[0]]
    expected = model.encode_shape(shape) @ model.zero_shot_classifier(["chair", "lamp", "sofa"]).T
    assert abs(best.similarity[0] - expected.max().item()) < 1e-6
    one = model.zero_shot_classifier(["chair"], ["a {}."])
    torch.testing.assert_close(one, model.encode_text(["a chair."]))
    for bad, message in (
        ([], "empty"),
        ("chair", "list"),
        (["a", "a"], "times"),
        ([" "], "blank"),
        ([3], "strings"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            model.classify(shape, bad)
    with pytest.raises(ValueError, match="{}"):
        model.classify(shape, ["chair"], templates=["a chair"])
    with pytest.raises(ValueError, match="top"):
        model.classify(shape, ["chair"], top=0)


def test_save_and_load(tmp_path, model, shape, small):
    with torch.no_grad():
        for parameter in model.prompts.parameters():
            parameter.add_(0.1)
    model.save(tmp_path / "run")
    again = load(tmp_path / "run", backbone=small)
    view = torch.rand(1, 3, 64, 64)
    assert torch.equal(again.encode_shape(shape), model.encode_shape(shape)) and torch.equal(
        again.encode_image(view), model.encode_image(view)
    )
    assert not again.training and again.config.clip_fingerprint == small.fingerprint()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json", "model.safetensors"]
    torch.manual_seed(1)
    with pytest.raises(ValueError, match="fingerprint"):
        load(tmp_path / "run", backbone=load_backbone("nano", "random"))
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    for change, message in (
        ({"encoder": "pointmlp_small"}, "another architecture.*missing"),
        ({"visual_prompt": None}, "deep_prompt_embeddings"),
        ({"prompt_tokens": 2}, r"\(1, 5, 256\) for \(1, 2, 256\)"),
        ({"lr": 1}, "unknown parameter lr"),
        ({"points": "many"}, "points"),
    ):
        (tmp_path / "run" / "config.json").write_text(json.dumps(written | change))
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "run", backbone=small)
    (tmp_path / "run" / "config.json").write_text(json.dumps(written))
    (tmp_path / "run" / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match="cannot be read"):
        load(tmp_path / "run", backbone=small)
    with pytest.raises(FileNotFoundError, match="nano"):
        load(tmp_path / "nothing")


def test_a_tensor_is_prepared_batch_by_batch(model, monkeypatch):
    "The whole tensor was normalized and resampled before it was cut: 24 GB for 100,000 clouds of 10,000 points."
    sizes = []

    def watched(clouds, *rest):
        sizes.append(len(clouds))
        return as_points(clouds, *rest)

    monkeypatch.setattr(model_module, "as_points", watched)
    clouds = torch.rand(7, 300, 6)
    batched = model.encode_shape(clouds, batch_size=3)
    assert sizes == [3, 3, 1]
    torch.testing.assert_close(batched, model.encode_shape(clouds, batch_size=7))
    with pytest.raises(ValueError, match="batch_size=0"):
        model.encode_shape(clouds, batch_size=0)
    with pytest.raises(TypeError):
        model.encode_shape(clouds, 3)  # a number where `normalize` might stand


def test_colors_of_0_to_255_are_refused(model):
    clouds = torch.rand(2, 128, 6)
    wrong = clouds.clone()
    wrong[1, :, 3:] *= 255
    with pytest.raises(ValueError, match=r"rgb must lie in \[0, 1\].*divide by 255"):
        model.encode_shape(wrong)
    wrong = clouds.clone()
    wrong[0, 5, 4] = -0.2
    with pytest.raises(ValueError, match="rgb must lie"):
        model.encode_shape(wrong)


def test_unnormalized_embeddings(model):
    clouds = torch.rand(2, 128, 6)
    raw = model.encode_shape(clouds, normalize=False)
    torch.testing.assert_close(torch.nn.functional.normalize(raw, dim=-1), model.encode_shape(clouds))
    assert (raw.norm(dim=-1) - 1).abs().min() > 1e-3
    assert (model.encode_text("a chair", normalize=False).norm() - 1).abs() > 1e-3


def test_labels_are_encoded_once_until_a_weight_changes(model, shape, monkeypatch):
    calls = []
    encode_text = Prompts.encode_text

    def counted(prompts, texts):
        calls.append(len(texts))
        return encode_text(prompts, texts)

    monkeypatch.setattr(Prompts, "encode_text", counted)
    labels = ["chair", "lamp"]
    first = model.zero_shot_classifier(labels, ["a {}."])
    model.classify(shape, labels, ["a {}."])
    model.classify([shape, shape], labels, ["a {}."])
    assert calls == [2]
    first.zero_()  # what was handed out is the caller's
    assert model.zero_shot_classifier(labels, ["a {}."]).norm(dim=-1).sub(1).abs().max() < 1e-5
    model.zero_shot_classifier(labels, ["one {}."])
    model.zero_shot_classifier(labels[::-1], ["a {}."])
    assert calls == [2, 2, 2], "templates and order of labels count"
    with torch.no_grad():
        model.prompts.prompt_embeddings[0, 0, 0] += 1
    model.zero_shot_classifier(labels, ["a {}."])
    assert calls == [2, 2, 2, 2]
    for i in range(40):
        model.zero_shot_classifier([f"thing {i}"], ["a {}."])
    assert len(model._classifiers) == model.kept_classifiers


def test_fingerprint_is_kept_until_a_weight_changes(model, monkeypatch):
    hashed = []
    original = backbone_module.update_hash

    def counted(digest, tensors):
        hashed.append(1)
        original(digest, tensors)

    monkeypatch.setattr(backbone_module, "update_hash", counted)
    monkeypatch.setattr(model_module, "update_hash", counted)
    model.backbone._fingerprint = (None, "")
    prints = [model.fingerprint(), model.fingerprint()]
    assert len(hashed) == 2 and prints[0] == prints[1]  # once the backbone, once the trained parts
    changes = (
        lambda: model.encoder.projection.bias.add_(1e-3),
        lambda: model.prompts.prompt_embeddings.mul_(1.01),
        lambda: model.encoder.load_state_dict({k: v + 1 for k, v in model.encoder.state_dict().items()}),
        lambda: model.encoder.projection.bias.data.add_(1),  # passes the version counter by
        lambda: setattr(model.encoder.projection.bias, "data", model.encoder.projection.bias + 1),
        lambda: torch.optim.SGD([model.encoder.projection.weight], lr=1.0).step(),
    )
    model.encoder.projection.weight.grad = torch.ones_like(model.encoder.projection.weight)
    for change in changes:
        with torch.no_grad():
            change()
        prints.append(model.fingerprint())
    assert len(set(prints)) == len(changes) + 1
    assert len(hashed) == 2 + len(changes), "the backbone was hashed once"
    prints = {model.fingerprint()}
    bias = model.backbone.clip.ln_final.bias
    with torch.no_grad():
        bias += 1
        prints.add(model.fingerprint())
        bias -= 1
    assert len(prints) == 2


def test_a_given_backbone_is_not_moved(small, model, tmp_path):
    assert CG3D.build(backbone=small, encoder="pointnet").device == small.device
    with pytest.raises(ValueError, match=r"device='meta', but the given backbone is on 'cpu'"):
        CG3D.build(backbone=small, encoder="pointnet", device="meta")
    model.save(tmp_path)
    with pytest.raises(ValueError, match=r"backbone.to\('meta'\)"):
        CG3D.from_pretrained(tmp_path, device="meta", backbone=small)
    assert small.device.type == "cpu"


def test_default_device_is_cuda_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device() == pick_device("auto") == pick_device("cuda") == torch.device("cuda", 1)
    assert pick_device("cuda:0") == torch.device("cuda", 0) and pick_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match="the last CUDA device that torch finds is cuda:1"):
        pick_device("cuda:2")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="start at most 2 processes"):
        pick_device()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # as a scheduler shows them
    assert pick_device() == torch.device("cuda", 0)
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert pick_device("cuda") == torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)  # after torch.cuda.set_device(3)
    assert pick_device() == pick_device("cuda") == torch.device("cuda", 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device() == torch.device("cpu")
    with pytest.raises(ValueError, match="finds no CUDA device"):
        pick_device("cuda")


def test_short_reprs(model):
    assert len(repr(model).splitlines()) <= 6 and "pointnet" in repr(model) and "nano" in repr(model)
    assert len(repr(model.backbone).splitlines()) == 1 and "384 numbers" in repr(model.backbone)


def test_private_methods_of_the_image_towers_exist():
    "The adapter calls methods that open_clip and timm do not promise to keep; a version without one is named here."
    from importlib import import_module

    assert backbone_module.PRIVATE
    for path, names in backbone_module.PRIVATE.items():
        module, _, cls = path.rpartition(".")
        tower = getattr(import_module(module), cls)
        assert [name for name in names if not hasattr(tower, name)] == [], f"{path} has lost a method"
        assert backbone_module.missing_private(tower) == []


def test_a_library_without_a_private_method_is_refused_by_name(small, monkeypatch):
    from timm.models.vision_transformer import VisionTransformer

    clip = load_backbone("nano", "random").clip
    monkeypatch.delattr(VisionTransformer, "_pos_embed")
    with pytest.raises(ValueError, match="timm.*VisionTransformer.*has no _pos_embed"):
        Backbone(clip, small.tokenizer, "old")


def test_build_refuses(small):
    with pytest.raises(ValueError, match="pointnet"):
        CG3D.build(backbone=small, encoder="pointnett")
    with pytest.raises(ValueError, match="n_points"):
        CG3D.build(backbone=small, n_points=3)
    with pytest.raises(ValueError, match="dim=512"):
        CG3D.build(backbone=small, dim=512)
    with pytest.raises(ValueError, match="not both"):
        CG3D.build(CG3DConfig(), backbone=small, points=3)


def test_import_is_lazy():
    code = (
        "import sys, time; start = time.perf_counter(); import cg3d; took = time.perf_counter() - start; "
        "heavy = {'torch', 'numpy', 'pandas', 'open_clip'} & set(sys.modules); assert not heavy, heavy; assert took < 1, took; "
        "assert cg3d.Shape.__name__ == 'Shape' and cg3d.core.paths.data_dir; "
        "import cg3d.models.clip_backbone, cg3d.models.prompts, cg3d.models.cg3d; "
        "heavy = {'open_clip', 'timm', 'pytorch3d', 'plotly', 'accelerate', 'trimesh', 'sklearn'} & set(sys.modules); assert not heavy, heavy\n"
        "try: cg3d.nonsense\nexcept AttributeError: pass\nelse: raise SystemExit('no error')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_clouds_of_many_colors_are_averaged_with_their_colorless_copies(small, tmp_path):
    torch.manual_seed(0)
    config = CG3DConfig(encoder="pointnet", points=128, clip_weights="random", gray_copy_above=48)
    model = CG3D.build(config, backbone=small)
    clouds = normalize(torch.rand(3, 128, 6))
    clouds[1, :, 3:] = torch.tensor([0.9, 0.1, 0.1])  # one color: it stays as it is
    gray = clouds.clone()
    gray[..., 3:] = MISSING_COLOR
    with torch.no_grad():
        plain, colorless = model.eval().encoder(clouds), model.encoder(gray)
    expected = plain.clone()
    expected[[0, 2]] = (plain + colorless)[[0, 2]] / 2
    torch.testing.assert_close(model.encode_shape(clouds, normalize=False), expected)
    torch.testing.assert_close(model.encode_shape(clouds[:1], normalize=False), expected[:1])
    torch.testing.assert_close(model.encode_shape(clouds[..., :3], normalize=False), colorless)
    assert (expected - plain).abs().max() > 1e-3
    again = CG3D.from_pretrained(model.save(tmp_path), backbone=small)
    assert again.config.gray_copy_above == 48 and again.fingerprint() == model.fingerprint()
    model.config = replace(model.config, gray_copy_above=None)
    torch.testing.assert_close(model.encode_shape(clouds, normalize=False), plain)
    assert again.fingerprint() != model.fingerprint()
    for wrong in (0, 2.5):
        with pytest.raises((InputError, TypeError), match="gray_copy_above"):
            CG3DConfig(gray_copy_above=wrong)
    with pytest.raises(InputError, match="sees no colors"):
        CG3DConfig(gray_copy_above=48, in_channels=3)
