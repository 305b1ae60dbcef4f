"PatchAlign3D: its file in full size, the forward pass by an independent one, part queries, and ShapeNetPart's protocol."

import json

import numpy as np
import pandas as pd
import pytest
import torch
import trimesh
from PIL import Image
from published_layouts import write_layout
from published_references import bare_tensors, reference_patchalign
from typer.testing import CliRunner

from cg3d.cli.app import app
from cg3d.cli.start import sample_chair
from cg3d.core.atomic import file_hash
from cg3d.data.furniture import furniture
from cg3d.data.shapenet_part import PART_NAMES, read_shapenet_part
from cg3d.evaluation.conditions import CONDITIONS, conditions
from cg3d.evaluation.part_segmentation import part_segmentation
from cg3d.geometry.ops import normalize
from cg3d.io.shape import Shape, read_shape
from cg3d.pretrained.loading import load_published
from cg3d.pretrained.parity import parity_clouds
from cg3d.pretrained.parts import PART_TEMPLATES, TEMPERATURE, load_part_model, part_phrase
from cg3d.pretrained.specs import CONTRACTS
from cg3d.scenes.answers import QUERY_COLORS


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_layout(tmp_path_factory.mktemp("parts") / "patchalign3d.pt", "patchalign3d", epoch=100)


@pytest.fixture(scope="module")
def model(file):
    return load_part_model(file, device="cpu")


class Words:
    "Text towers of 1,280 numbers whose embeddings are written down by sentence."

    name, dim = "written down", 1280

    def __init__(self, table):
        self.table, self.asked = table, []

    def fingerprint(self):
        return "written down"

    def encode_text(self, texts):
        self.asked += texts
        return torch.stack([self.table[text] for text in texts])


def test_layout_and_contract(model):
    assert model.proj.weight.shape == (1280, 384) and len(model.network.blocks.blocks) == 12
    assert model.report.used.shape[0] == len(model.report.table) - 2  # a head of the original's training
    assert set(model.report.unused["role"]) == {"not read by the original"}
    c = CONTRACTS["patchalign3d"]
    assert (c.points, c.channels, c.groups, c.neighbors, c.swap_yz) == (2048, 3, 128, 32, True)
    assert (c.clip, c.clip_weights, c.position) == ("ViT-bigG-14", "laion2b_s39b_b160k", "before every block")
    assert PART_TEMPLATES == ("{}", "a {}", "{} part") and TEMPERATURE == 0.07
    assert part_phrase("  Back_Rest ") == "back rest"


@pytest.mark.parametrize("kind", ["generic", "grid", "near origin"])
def test_patches_agree_with_the_reference(file, model, kind):
    cloud = parity_clouds(2048)[kind][:, :3]
    found, centers = model.embed_patches(cloud[None])
    expected, places = reference_patchalign(bare_tensors(file), cloud)
    assert (found[0] - expected).abs().max() < 2e-5 and torch.equal(centers[0], places)
    assert torch.allclose(found.norm(dim=-1), torch.ones(1, 128), atol=1e-5)


def test_every_point_has_the_answer_of_the_nearest_patch(file):
    shape = furniture()[3]
    rng = torch.Generator().manual_seed(0)
    names = ["Seat", "arm_rest", "leg"]
    sentences = [t.format(n) for n in ("seat", "arm rest", "leg") for t in PART_TEMPLATES]
    words = Words({text: torch.randn(1280, generator=rng) for text in sentences})
    model = load_part_model(file, device="cpu")
    model._attach(words)
    result = model.query_parts(shape, names)
    assert words.asked == sentences and result.names == tuple(names)
    assert len(shape.points) == 2048
    cloud = normalize(torch.from_numpy(shape.points)[None])[0]
    patches, centers = reference_patchalign(bare_tensors(file), cloud)
    text = (
        torch.stack([words.table[text] / words.table[text].norm() for text in sentences])
        .view(3, 3, -1)
        .mean(1)
    )
    scores = (patches @ (text / text.norm(dim=1, keepdim=True)).T / 0.07).softmax(1)
    nearest = torch.cdist(cloud.double(), centers.double()).argmin(1)
    assert (result.patches == nearest.numpy()).all()
    np.testing.assert_allclose(result.scores, scores[nearest], atol=2e-4)
    assert (result.labels == result.scores.argmax(1)).all()
    table = result.table()
    assert table["points"].sum() == 2048 and table["share"].sum() == pytest.approx(100)
    colors = np.eye(3)
    assert (result.colored(colors).colors == colors[result.labels]).all()


def test_up_axis_and_more_points_than_the_network_reads(file):
    shape = furniture()[3]
    model = load_part_model(file, device="cpu")
    words = {t.format(n): torch.eye(1280)[i] for i, n in enumerate(("seat", "leg")) for t in PART_TEMPLATES}
    model._attach(Words(words))
    standing = model.query_parts(shape, ["seat", "leg"])
    lying = Shape(shape.points[:, [0, 2, 1]] * [1, -1, 1], up="z")
    assert np.array_equal(model.query_parts(lying, ["seat", "leg"]).labels, standing.labels)
    twice = Shape(np.concatenate([shape.points, shape.points + 1e-4]), name="dense")
    dense = model.query_parts(twice, ["seat", "leg"])
    assert len(dense.labels) == 4096 and (dense.labels[:2048] == dense.labels[2048:]).mean() > 0.95


def test_what_is_refused(file, model, tmp_path):
    with pytest.raises(ValueError, match="PatchAlign3D, which embeds patches and no whole shapes"):
        load_published(file)
    other = write_layout(tmp_path / "cg3d.pt", "cg3d/point_transformer", small_towers=True)
    with pytest.raises(ValueError, match="no container proj.*load_published"):
        load_part_model(other)
    with pytest.raises(ValueError, match="no setting 'heads'"):
        load_part_model(file, heads=3)
    with pytest.raises(ValueError, match="embeds into 1280 numbers, the towers 'nano' into 384"):
        load_part_model(file, clip="nano", device="cpu")
    with pytest.raises(ValueError, match="reads clouds of 2,048 points, got 100"):
        model.embed_patches(torch.rand(1, 100, 3))
    content = torch.load(file, weights_only=True)
    del content["model"]["blocks.blocks.3.attn.qkv.weight"]
    torch.save(content, tmp_path / "broken.pt")
    with pytest.raises(ValueError, match="needs 'blocks.blocks.3.attn.qkv.weight'"):
        load_part_model(tmp_path / "broken.pt")
    with pytest.raises(ValueError, match="is given 2 times"):
        model.embed_parts(["seat", "Seat"])


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_command_writes_every_form(file, model, tmp_path):
    sample_chair().export(tmp_path / "chair.glb")
    content = torch.load(file, weights_only=True)
    weight = content["proj"]["proj.weight"][:384]  # for nano's text tower
    cloud = read_shape(tmp_path / "chair.glb", 2048).cloud()[None]
    tokens, _ = model.network.tokens(model.contract.prepare(cloud))
    bias = -weight @ tokens[0, 1:].mean(0).detach()  # patches differ, so that each name has points
    content["proj"] = {"proj.weight": weight, "proj.bias": bias}
    torch.save(content, tmp_path / "patchalign3d.pt")
    files = [tmp_path / f"parts.{suffix}" for suffix in ("ply", "glb", "csv", "json", "png")]
    words = ["parts", tmp_path / "chair.glb", "seat, leg", "back rest", "-m", tmp_path, "--clip", "nano"]
    words += [word for path in files for word in ("-o", path)]
    done = call(*words, "--points", 1500, "--device", "cpu", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    names = ["seat", "leg", "back rest"]
    shape = read_shape(tmp_path / "chair.glb", 1500)
    expected = load_part_model(tmp_path, "nano", device="cpu").query_parts(shape, names)
    counts = np.bincount(expected.labels, minlength=3)
    assert [row["part"] for row in told["parts"]] == names
    assert [row["points"] for row in told["parts"]] == counts.tolist() and counts.sum() == 1500
    assert counts.min() > 0
    cloud = trimesh.load(files[0])
    np.testing.assert_allclose(cloud.vertices, shape.points, atol=1e-6)
    expected_colors = np.rint(255 * np.array(QUERY_COLORS)[expected.labels])
    np.testing.assert_array_equal(cloud.colors[:, :3], expected_colors)
    found = {name: len(part.vertices) for name, part in trimesh.load(files[1]).geometry.items()}
    assert found == dict(zip(names, counts))
    assert pd.read_csv(files[2])["points"].tolist() == counts.tolist()
    assert json.loads(files[3].read_text())["parts"] == told["parts"]
    picture = Image.open(files[4])
    assert picture.width == 3 * 320 and picture.height > 320
    assert (np.asarray(picture)[:320] < 247).any(-1).mean() > 0.02, "something is drawn"
    assert call(*words, "--points", 1500).exit_code == 2, "the files exist"
    told = call("parts", tmp_path / "chair.glb", "seat, leg", "-m", tmp_path, "--clip", "nano").output
    assert "8,192 points; y up" in told and "score" in told


@pytest.mark.parametrize(
    "words,message",
    [
        (("seat, leg",), "weights with --model; fetch them with `cg3d download patchalign3d`"),
        (("seat, leg", "-m", "nano"), "'nano' answers no part queries; fetch them"),
        (("seat, leg", "-m", "none.pt"), "none.pt: no such file"),
        (("seat, seat", "-m", "p.pt"), "given 2 times"),
        (("seat, leg", "-m", "p.pt", "-o", "x.html"), "written as .ply .glb .csv"),
        (("seat, leg", "-m", "p.pt", "--up", "w"), "not one of"),
    ],
)
def test_what_the_command_refuses(words, message, tmp_path):
    sample_chair().export(tmp_path / "chair.glb")
    done = call("parts", tmp_path / "chair.glb", *words)
    assert done.exit_code == 2 and message in done.stderr and "Traceback" not in done.output, done.output


def layout(root, shapes):
    "ShapeNetPart's folders: `shapes` is synset, model, points, numbers of parts."
    (root / "train_test_split").mkdir(parents=True)
    listed = [f"shape_data/{synset}/{name}" for synset, name, *_ in shapes]
    (root / "train_test_split/shuffled_test_file_list.json").write_text(json.dumps(listed))
    (root / "synsetoffset2category.txt").write_text("Mug\t03797390\nChair\t03001627\n")
    for synset, name, points, parts in shapes:
        (root / synset).mkdir(exist_ok=True)
        lines = ["%.6f %.6f %.6f 0.1 0.2 0.9 %.6f" % (*point, part) for point, part in zip(points, parts)]
        (root / synset / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return root


def test_shapenet_part_layout(tmp_path):
    points = np.random.default_rng(0).random((30, 3))
    shapes = [
        ("03797390", "a-b", points, [36] * 10 + [37] * 20),
        ("03001627", "cc", points, [12] * 30),
        ("03001627", "dd", points, [16] * 30),
    ]
    root = layout(tmp_path / "parts", shapes)
    data = read_shapenet_part(root)
    shape, labels = data.read(0)
    assert (shape.id, shape.category, shape.up) == ("03797390-a-b", "mug", "y")
    assert labels.tolist() == [0] * 10 + [1] * 20 and data.read(1)[1].tolist() == [0] * 30
    with pytest.raises(ValueError, match=r"parts \[16\] are not those of a chair, 12 to 15"):
        data.read(2)
    (root / "03001627/cc.txt").unlink()
    assert read_shapenet_part(root, categories=["chair"]).left_out == 1
    with pytest.raises(ValueError, match="split='dev' is none of train, val, test"):
        read_shapenet_part(root, "dev")
    with pytest.raises(ValueError, match="no category 'cup'"):
        read_shapenet_part(root, categories=["cup"])
    with pytest.raises(FileNotFoundError, match="shuffled_val_file_list.json"):
        read_shapenet_part(root, "val")
    (root / "03797390/a-b.txt").write_text("1 2 3 4\n")
    with pytest.raises(ValueError, match="a line has 4 numbers"):
        read_shapenet_part(root).read(0)


def test_part_segmentation_by_hand(tmp_path):
    "Two mugs and a chair: the mean over shapes is not that over categories."
    points = np.random.default_rng(0).normal(size=(40, 3))
    shapes = [
        ("03797390", "a", points, [36] * 20 + [37] * 20),
        ("03797390", "b", points, [37] * 40),
        ("03001627", "c", points, [12] * 20 + [14] * 20),
    ]

    class First:
        def query_parts(self, shape, names, templates):
            return type("result", (), {"labels": np.zeros(len(shape.points), int)})

    table = part_segmentation(First(), read_shapenet_part(layout(tmp_path / "parts", shapes)), ["canonical"])
    found = table.set_index("category")["mIoU"]
    first, second = (0.5 + 0) / 2, (0 + 0) / 2  # mugs: handle 20 of 40 points, body 0; handle 0 of 40, body 0
    chair = (0.5 + 1 + 0 + 1) / 4  # seat and armrest are in neither
    assert np.isclose(found["instance"], 100 * (first + second + chair) / 3)
    assert np.isclose(found["class"], 100 * ((first + second) / 2 + chair) / 2)
    assert np.isclose(table.set_index("category")["accuracy"]["mug"], 25)
    data = read_shapenet_part(tmp_path / "parts")
    limited = part_segmentation(First(), data, ["rotated"], limit=1)
    assert limited["N"].tolist() == [2, 2, 1, 1] and (limited["left out"] == 1).all()
    with pytest.raises(ValueError, match="mug has 2 parts, named were"):
        part_segmentation(First(), data, names={"mug": ["cup"]})
    with pytest.raises(ValueError, match="poses=.*must be some of canonical, rotated"):
        part_segmentation(First(), data, ["upright"])


def test_the_protocol_with_the_published_layout(file, tmp_path):
    "End to end: reader, rotation, network, text, score; with these random weights only the form can be tested."
    points = furniture()[3].points
    root = layout(tmp_path / "parts", [("03001627", "c", points, np.arange(len(points)) % 4 + 12)])
    sentences = [t.format(part_phrase(n)) for n in PART_NAMES["chair"] for t in PART_TEMPLATES]
    generator = torch.Generator().manual_seed(1)
    model = load_part_model(file, device="cpu")
    model._attach(Words({text: torch.randn(1280, generator=generator) for text in sentences}))
    table = part_segmentation(model, read_shapenet_part(root))
    assert table["pose"].tolist() == ["canonical"] * 3 + ["rotated"] * 3
    found = model.query_parts(read_shapenet_part(root).read(0)[0], PART_NAMES["chair"]).labels
    assert np.isclose(table["accuracy"][0], 100 * (found == np.arange(len(points)) % 4).mean())
    assert table["mIoU"].between(0, 100).all()
    stated = conditions(model, [False], "{} | a {} | {} part (3)", "test")
    assert (table[list(CONDITIONS)] == pd.Series(stated)).all().all()
    assert stated["up"] == "z" and stated["color"] == "none"
    assert stated["file"] == f"sha256:{file_hash(file)[:12]}" and stated["weights"].startswith("sha256:")
