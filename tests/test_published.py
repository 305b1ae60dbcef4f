"Published weights: every layout loads completely, the contract is kept, and a bad file is refused by name."

import argparse
import os
import re

import numpy as np
import pytest
import torch
import trimesh
from published_layouts import payload, published_layouts, random_tensors, with_adam, write_layout
from published_references import REFERENCES, bare_tensors, pointnet2_centers

from cg3d.core.state_dict import read_checkpoint
from cg3d.geometry.ops import farthest_point_sample, normalize
from cg3d.io.read import read_points
from cg3d.io.shape import Shape
from cg3d.pretrained.grouping import Grouping
from cg3d.pretrained.loading import PublishedModel, load_published
from cg3d.pretrained.parity import parity, parity_clouds, read_outputs, write_clouds
from cg3d.pretrained.score import shape_embedding
from cg3d.pretrained.specs import CONTRACTS, contracts

FAMILY = {"cg3d": "cg3d", "ulip": "ulip", "ulip2": "ulip2", "openshape": "openshape", "uni3d": "uni3d"}


def cloud(n, channels=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.cat([normalize(torch.randn(1, n, 3, generator=g)), torch.rand(1, n, 3, generator=g)], -1)[
        ..., :channels
    ]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "One file of each light layout, written once."
    folder = tmp_path_factory.mktemp("weights")
    names = ("cg3d/point_transformer", "ulip/pointmlp", "openshape/vitb32", "openshape/bigG", "uni3d/ti")
    return {
        name: write_layout(
            folder / f"{name.replace('/', '_')}.pt",
            name,
            small_towers=True,
            epoch=7,
            args=argparse.Namespace(lr=1e-3),
            best_acc1=np.float64(60.1),
        )
        for name in names
    }


@pytest.fixture(scope="module")
def models(files):
    return {name: load_published(path) for name, path in files.items()}


def edited(path, folder, edit):
    content = torch.load(path, weights_only=False)  # our own file
    edit(content)
    torch.save(content, folder / "edited.pt")
    return folder / "edited.pt"


def test_every_tensor_is_used_or_named(files, models):
    for name, model in models.items():
        table = model.report.table
        assert sorted(table.tensor) == sorted(read_checkpoint(files[name]).tensors)
        assert table.role.str.len().min() > 0 and table.used.any()
        assert model.report.family == FAMILY[name.split("/")[0]] and model.report.values["epoch"] == 7
        assert f"{len(model.report.used)} of {len(table)} tensors used" in str(model.report)
        unused_numbers = model.report.unused.numbers.sum()
        held = sum(v.numel() for v in model.state_dict().values())
        assert (
            held + unused_numbers >= table.numbers.sum() - 1
        )  # the factor on similarities may live outside the towers


def test_encoder_gives_unnormalized_embeddings(models):
    sizes = {
        "cg3d/point_transformer": 512,
        "ulip/pointmlp": 512,
        "openshape/vitb32": 512,
        "openshape/bigG": 1280,
        "uni3d/ti": 1024,
    }
    with torch.no_grad():
        for name in ("cg3d/point_transformer", "openshape/vitb32"):
            out = models[name].encoder(cloud(models[name].contract.points).expand(2, -1, -1))
            assert out.shape == (2, sizes[name]) and not torch.allclose(
                out.norm(dim=1), torch.ones(2), atol=0.1
            )
            assert torch.allclose(out[0], out[1], atol=1e-4)
    assert {name: model.encoder.dim for name, model in models.items()} == sizes


def test_wrappers_do_not_matter(files, models, tmp_path):
    state = random_tensors(published_layouts(True)["cg3d/point_transformer"]["base_model"])
    points = cloud(1024, 3)
    with torch.no_grad():
        expected = models["cg3d/point_transformer"].encoder(points)
        for wrap in (
            lambda s: {"base_model": {f"module.{k}": v for k, v in s.items()}},
            lambda s: {"model": {f"transformer_q.{k}": v for k, v in s.items()}},
            lambda s: {f"module.base_model.{k}": v for k, v in s.items()},
            lambda s: {"base_model": {k: v.half() if v.is_floating_point() else v for k, v in s.items()}},
        ):
            torch.save(wrap(state), tmp_path / "w.pt")
            got = load_published(tmp_path / "w.pt").encoder(points)
            assert (got - expected).abs().max() < (
                0.05
                if wrap(state).get("base_model", {}).get("projection.bias", torch.ones(1)).dtype
                == torch.float16
                else 1e-6
            )


def test_safetensors(files, models, tmp_path):
    from safetensors.torch import save_file

    tensors = read_checkpoint(files["openshape/vitb32"]).tensors
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "vitb32.safetensors")
    model = load_published(tmp_path / "vitb32.safetensors")
    assert model.contract == models["openshape/vitb32"].contract and all(
        torch.equal(a, b)
        for a, b in zip(model.encoder.parameters(), models["openshape/vitb32"].encoder.parameters())
    )


def test_contract_at_the_edge(models):
    swap = models["openshape/bigG"].contract
    points = cloud(swap.points)
    assert torch.equal(swap.prepare(points), points[..., [0, 2, 1, 3, 4, 5]])
    assert (swap.prepare(points[..., :3])[..., 3:] == 0.4).all()
    flat = models["cg3d/point_transformer"].contract
    assert flat.prepare(cloud(1024)).shape == (1, 1024, 3)
    for model in models.values():
        with pytest.raises(ValueError, match=f"{model.contract.points:,} points, got 777"):
            model.encoder(cloud(777))
    raw = models["cg3d/point_transformer"].encoder
    with torch.no_grad():
        assert torch.equal(raw(cloud(1024)), raw.network(cloud(1024, 3)))
        assert raw.network(cloud(300, 3)).shape == (1, 512)  # the bare network takes what it is given


def test_table_of_contracts():
    table = contracts()
    assert list(table.index) == list(CONTRACTS)
    for family in ("cg3d", "ulip/", "ulip2", "openshape", "uni3d"):
        assert any(name.startswith(family) for name in table.index)
    assert table.loc["openshape/bigG", "up"].startswith("z") and table.loc["openshape/vitl14", "up"] == "y"
    assert (
        table.loc["cg3d/pointmlp-8k", "points"] == 8192
        and "0.001" in table.loc["ulip/pointbert", "near origin"]
    )
    assert not table.astype(str).eq("").drop(columns="note").any().any()


def test_point_count_of_cg3d(files, tmp_path):
    os.link(files["cg3d/point_transformer"], tmp_path / "point_transformer_8k.pth")
    assert load_published(tmp_path / "point_transformer_8k.pth").contract.points == 8192
    plain = load_published(files["cg3d/point_transformer"])
    assert plain.contract.points == 1024 and "1,024 points assumed" in str(plain.report)
    chosen = load_published(files["cg3d/point_transformer"], points=8192)
    assert chosen.contract.points == 8192 and not chosen.report.notes
    with pytest.raises(ValueError, match="no setting 'patches'.*groups"):
        load_published(files["cg3d/point_transformer"], patches=3)


def test_towers_inside_ulip(models):
    model = models["ulip/pointmlp"]
    assert isinstance(model, PublishedModel) and model.backbone.dim == 512
    text = model.encode_text(["a chair", "a table"])
    picture = model.encode_image(torch.rand(2, 3, 40, 30))
    assert text.shape == picture.shape == (2, 512) and torch.allclose(
        text.norm(dim=1), torch.ones(2), atol=1e-5
    )
    assert model.logit_scale == pytest.approx(np.exp(2.6593), rel=1e-4)


def test_cg3d_with_slip_beside_it(files, tmp_path):
    os.link(files["cg3d/point_transformer"], tmp_path / "point_transformer_1k.pth")
    write_layout(tmp_path / "slip_base_100ep.pt", "slip", seed=9, small_towers=True)
    model = load_published(tmp_path / "point_transformer_1k.pth")
    assert set(model.report.table.file) == {"point_transformer_1k.pth", "slip_base_100ep.pt"}
    assert model.prompts.visual == ("deep",) and model.prompts.deep_prompt_embeddings.shape == (1, 5, 128)
    picture = torch.rand(1, 3, 24, 24)
    assert (
        model.encode_image(picture)
        - torch.nn.functional.normalize(model.backbone.encode_image(picture), dim=-1)
    ).abs().max() > 1e-4
    answer = model.classify(cloud(1500), ["chair", "lamp"], templates=["This is a {}"])
    assert answer.probability.sum() == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="load_published"):
        model.save(tmp_path / "out")


def test_without_towers(files, tmp_path, models):
    with pytest.raises(ValueError, match="slip_base_100ep.pt"):
        models["cg3d/point_transformer"].encode_text("a chair")
    with pytest.raises(ValueError, match="1280 numbers.*384"):
        load_published(files["openshape/bigG"], clip="nano")
    assert (
        models["openshape/bigG"].config.clip == "ViT-bigG-14"
        and models["uni3d/ti"].config.clip == "EVA02-E-14-plus"
    )


@pytest.mark.parametrize(
    "layout, edit, words",
    [
        ("ulip/pointmlp", lambda c: c["state_dict"].pop("module.pc_projection"), "pc_projection"),
        ("openshape/bigG", lambda c: c["state_dict"].pop("module.proj.weight"), "proj.weight"),
        ("cg3d/point_transformer", lambda c: c["base_model"].pop("projection.weight"), "projection.weight"),
        ("uni3d/ti", lambda c: c["module"].pop("point_encoder.trans2embed.weight"), "trans2embed.weight"),
        (
            "uni3d/ti",
            lambda c: c["module"].pop("point_encoder.visual.blocks.3.attn.q_bias"),
            "blocks.3.attn.q_bias",
        ),
        (
            "cg3d/point_transformer",
            lambda c: c["base_model"].update({"blocks.blocks.0.extra.weight": torch.ones(2)}),
            "unexpected tensor 'base_model.blocks.blocks.0.extra.weight'",
        ),
        (
            "openshape/vitb32",
            lambda c: c.update({"pc_encoder.lift.2.weight": torch.ones(7)}),
            r"pc_encoder.lift.2.weight' has shape \(7,\)",
        ),
        (
            "openshape/vitb32",
            lambda c: [c.pop(k) for k in list(c) if k.startswith("pc_encoder")] and c.update(w=torch.ones(2)),
            "belongs to none of cg3d, ulip",
        ),
    ],
)
def test_bad_tensors_are_named(files, tmp_path, layout, edit, words):
    with pytest.raises(ValueError, match=words):
        load_published(edited(files[layout], tmp_path, edit))


def test_wrong_family(files):
    with pytest.raises(ValueError, match="no ulip checkpoint.*openshape"):
        load_published(files["openshape/vitb32"], family="ulip")
    with pytest.raises(ValueError, match="no family 'pointclip'; there are cg3d"):
        load_published(files["openshape/vitb32"], family="pointclip")


class Trap:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_damaged_and_dangerous_files(files, tmp_path):
    whole = files["uni3d/ti"].read_bytes()
    for keep in (0, 100, len(whole) // 2, len(whole) - 50):
        (tmp_path / "cut.pt").write_bytes(whole[:keep])
        with pytest.raises(ValueError, match="cut.pt"):
            load_published(tmp_path / "cut.pt")
    torch.save({"state_dict": {"w": torch.ones(2)}, "extra": Trap(tmp_path / "sprung")}, tmp_path / "trap.pt")
    with pytest.raises(ValueError, match="system.*refused"):
        load_published(tmp_path / "trap.pt")
    assert not (tmp_path / "sprung").exists()
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "whole_model.pt")
    with pytest.raises(ValueError, match="Linear.*refused"):
        load_published(tmp_path / "whole_model.pt")


def test_hub_without_network(monkeypatch, tmp_path):
    import huggingface_hub

    asked = []

    def offline(repo, filename, **kind):
        asked.append((repo, filename, *kind.values()))
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    monkeypatch.chdir(tmp_path)
    for name in (
        "OpenShape/openshape-pointbert-vitg14-rgb",
        "hf-hub:BAAI/Uni3D/modelzoo/uni3d-b/model.pt",
        "datasets/SFXX/ulip/a/b.pt",
    ):
        with pytest.raises(FileNotFoundError, match="pass its path") as caught:
            load_published(name)
        assert "\n" not in str(caught.value)
    assert asked == [
        ("OpenShape/openshape-pointbert-vitg14-rgb", "model.pt"),
        ("BAAI/Uni3D", "modelzoo/uni3d-b/model.pt"),
        ("SFXX/ulip", "a/b.pt", "dataset"),
    ]
    for path in ("runs/model.pt", "/nowhere/x.pt", tmp_path / "none.pt"):
        with pytest.raises(FileNotFoundError, match="no such file"):
            load_published(path)


def test_an_encoder_can_be_trained(files):
    model = load_published(files["openshape/vitb32"])
    model.encoder.network(cloud(400)).sum().backward()
    assert all(p.grad is not None for p in model.encoder.parameters())


@pytest.mark.parametrize("radius", [None, 0.4])
def test_published_neighborhoods_are_the_same_under_autocast(radius):
    "The distance table was computed in bfloat16 there: 3 % of the neighbors were others."
    xyz = cloud(512, channels=3)
    rule = Grouping(64, 32, radius, skip_below=1e-3)
    centers, around = rule(xyz)
    with torch.autocast("cpu", torch.bfloat16):
        low = rule(xyz)
    assert torch.equal(low[0], centers) and torch.equal(low[1], around)
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(rule(xyz)[1], around) and torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(precision)


def test_a_published_encoder_compiles_to_one_graph(files, monkeypatch):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    network = load_published(files["openshape/vitb32"]).encoder.network
    compiled = torch.compile(network, backend=count)
    points = cloud(400)
    with torch.no_grad():
        torch.testing.assert_close(compiled(points), network(points))
    assert len(graphs) == 1


def test_pointmlp_of_ulip_has_no_near_origin_rule(models):
    "ULIP samples PointMLP's anchors with a loop of its own; CG3D's file is read by the rule of pointnet2_ops."
    assert CONTRACTS["ulip/pointmlp"].skip_below is None and CONTRACTS["ulip/pointbert"].skip_below == 1e-3
    assert CONTRACTS["cg3d/pointmlp-1k"].skip_below == 1e-3
    grouper = models["ulip/pointmlp"].encoder.network.local_grouper_list[0]
    assert grouper.grouping.skip_below is None


def test_family_spellings(files):
    assert load_published(files["openshape/vitb32"], family="OpenShape").report.family == "openshape"


def kernel_by_hand(cloud, k, skip_below=1e-3):
    "pointnet2's kernel in plain Python: T threads with strict maxima, then a tree that prefers the left of a pair."
    points = [[float(np.float32(v)) for v in p] for p in cloud.tolist()]
    threads = 1
    while threads * 2 <= min(len(points), 512):
        threads *= 2
    chosen, gap = [0], [1e10] * len(points)
    while len(chosen) < k:
        last, slots = points[chosen[-1]], []
        for thread in range(threads):
            best, at = -1.0, 0
            for i in range(thread, len(points), threads):
                if sum(v * v for v in points[i]) <= skip_below:
                    continue
                gap[i] = min(gap[i], sum((a - b) ** 2 for a, b in zip(points[i], last)))
                if gap[i] > best:
                    best, at = gap[i], i
            slots.append((best, at))
        while len(slots) > 1:
            half = len(slots) // 2
            slots = [right if right[0] > left[0] else left for left, right in zip(slots[:half], slots[half:])]
        chosen.append(slots[0][1])
    return chosen


@pytest.mark.parametrize(
    "n, k", [(1, 1), (5, 5), (33, 20), (64, 40), (500, 30), (512, 20), (700, 40), (1100, 25)]
)
def test_ties_follow_the_kernel_of_pointnet2(n, k):
    "Numbers on a grid of 1/32 are exact in float32, so every tie is a tie there too."
    g = torch.Generator().manual_seed(n)
    grid = torch.randint(-8, 9, (2, n, 3), generator=g) / 32
    got = farthest_point_sample(grid, k, skip_below=1e-3, ties="pointnet2")
    assert got.tolist() == [kernel_by_hand(cloud, k) for cloud in grid]
    assert torch.equal(got[0], pointnet2_centers(grid[0], k))
    every = farthest_point_sample(grid, k, ties="pointnet2")
    assert every.tolist() == [kernel_by_hand(cloud, k, skip_below=-1) for cloud in grid]
    if n > 33:
        assert not torch.equal(got, farthest_point_sample(grid, k, skip_below=1e-3)), "the plain rule differs"


def test_ties_without_candidates_and_with_another_word():
    tiny = torch.rand(1, 40, 3) * 0.01
    assert farthest_point_sample(tiny, 4, skip_below=1e-3, ties="pointnet2").tolist() == [[0, 0, 0, 0]]
    with pytest.raises(ValueError, match="ties='dgl' is none of first, pointnet2"):
        farthest_point_sample(tiny, 4, ties="dgl")


@pytest.mark.parametrize("kind", ["generic", "grid", "near origin"])
def test_encoders_agree_with_the_references(files, models, kind):
    for name in ("cg3d/point_transformer", "ulip/pointmlp", "openshape/vitb32", "uni3d/ti"):
        cloud = parity_clouds(models[name].contract.points)[kind]
        with torch.no_grad():
            difference = models[name].encoder(cloud[None])[0] - REFERENCES[name](
                bare_tensors(files[name]), cloud
            )
        assert difference.abs().max() < 5e-5, name


def test_the_plain_order_of_ties_is_another_model(files, models):
    cloud = parity_clouds(10_000)["grid"][None]
    plain = load_published(files["uni3d/ti"], ties="first")
    with torch.no_grad():
        assert (plain.encoder(cloud) - models["uni3d/ti"].encoder(cloud)).abs().max() > 0.01


def unit(xyz):
    xyz = xyz - xyz.mean(0)
    return xyz / np.sqrt((xyz**2).sum(1)).max()


def loop_thinned(xyz, count):  # ULIP's reader, which starts at a random point; here at the first
    chosen, gap = [0], np.full(len(xyz), 1e10, np.float32)
    while len(chosen) < count:
        gap = np.minimum(gap, ((xyz - xyz[chosen[-1]]) ** 2).sum(1))
        chosen.append(int(gap.argmax()))
    return np.array(chosen)


def test_ulip_and_openshape_thin_before_they_normalize(files, models):
    raw = cloud(16_384)[0] * torch.tensor([3.0, 3, 3, 1, 1, 1]) + torch.tensor([0, 0, 2.0, 0, 0, 0])
    ulip = load_published(files["ulip/pointmlp"], points=1500)
    rows = loop_thinned(raw[:, :3].numpy(), 1500)
    expected = torch.from_numpy(unit(raw[rows, :3].numpy()))[None]
    shape = Shape(raw[:, :3].numpy(), raw[:, 3:].numpy())
    with torch.no_grad():
        want = torch.nn.functional.normalize(ulip.encoder(expected), dim=-1)
        late = torch.nn.functional.normalize(
            ulip.encoder(torch.from_numpy(unit(raw[:, :3].numpy()))[None, rows]), dim=-1
        )
    for given in (raw[None], shape, Shape(raw[:, [0, 2, 1]].numpy() * [1, -1, 1], up="z")):
        assert (ulip.encode_shape(given) - want).abs().max() < 1e-5
    assert (want - late).abs().max() > 1e-4, "the order matters"
    b32 = models["openshape/vitb32"]
    order = torch.randperm(16_384, generator=torch.Generator().manual_seed(0))[:10_000]
    drawn = torch.cat([torch.from_numpy(unit(raw[order, :3].numpy())), raw[order, 3:]], 1)
    with torch.no_grad():
        want = torch.nn.functional.normalize(b32.encoder(drawn[None]), dim=-1)
    assert (b32.encode_shape(shape) - want).abs().max() < 1e-5


def test_ball_queries_read_shuffled_clouds(files, models):
    "A scan lists its points from one end to the other; the first in a ball would be those of one side."
    b32, whole = models["openshape/vitb32"], cloud(10_000)[0]
    lines = whole[whole[:, 0].argsort()][None]
    order = torch.randperm(10_000, generator=torch.Generator().manual_seed(0))
    kept = load_published(files["openshape/vitb32"], sampling="random")
    with torch.no_grad():
        shuffled, in_lines = (
            torch.nn.functional.normalize(b32.encoder(c), dim=-1) for c in (lines[:, order], lines)
        )
    assert torch.allclose(b32.encode_shape(lines), shuffled, atol=1e-5)
    assert torch.allclose(kept.encode_shape(lines), in_lines, atol=1e-5)
    assert (shuffled - in_lines).abs().max() > 1e-3
    few = b32._prepare(whole[None, :3000])
    assert few.shape == (1, 10_000, 6) and len(few[0, :3000].unique(dim=0)) == 3000


def test_settings_without_meaning_are_refused_and_others_act(files, models):
    for setting in ({"groups": 64}, {"radius": 0.2}):
        with pytest.raises(ValueError, match=f"has no {next(iter(setting))}: its anchors"):
            load_published(files["ulip/pointmlp"], **setting)
    for setting in ({"sampling": "nearest"}, {"ties": "last"}):
        with pytest.raises(ValueError, match="is none of"):
            load_published(files["uni3d/ti"], **setting)
    near = parity_clouds(10_000)["near origin"][None]
    with torch.no_grad():
        for name, setting in (
            ("openshape/vitb32", {"skip_below": 1e-3}),
            ("openshape/vitb32", {"ties": "pointnet2"}),
            ("uni3d/ti", {"radius": 0.1}),
            ("uni3d/ti", {"skip_below": None}),
        ):
            given = parity_clouds(10_000)["grid"][None] if "ties" in setting else near
            changed = load_published(files[name], **setting)
            assert (changed.encoder(given) - models[name].encoder(given)).abs().max() > 1e-3, setting
            copy = changed.encoder.network.fresh()
            copy.load_state_dict(changed.encoder.network.state_dict())
            assert torch.equal(copy.eval()(given), changed.encoder.network(given))


def test_strict_false_sets_tensors_aside_by_name(files, tmp_path):
    path = edited(
        files["cg3d/point_transformer"], tmp_path, lambda c: c["base_model"].update(extra_head=torch.ones(3))
    )
    with pytest.raises(ValueError, match="unexpected tensor 'base_model.extra_head'"):
        load_published(path)
    unused = load_published(path, strict=False).report.unused.set_index("tensor")
    assert unused.loc["base_model.extra_head", "role"] == "unexpected, set aside by strict=False"
    path = edited(files["cg3d/point_transformer"], tmp_path, lambda c: c["base_model"].pop("norm.weight"))
    with pytest.raises(ValueError, match="norm.weight"):
        load_published(path, strict=False)


def test_colorless_ulip2_is_not_ulip(tmp_path):
    model = load_published(write_layout(tmp_path / "unnamed.pt", "ulip2/pointbert-xyz"))
    assert model.report.family == "ulip2" and model.contract.model == "ulip2/pointbert-xyz"
    assert (model.contract.points, model.contract.channels, model.encoder.dim) == (10_000, 3, 1280)
    assert model.config.clip == "ViT-bigG-14" and "10,000 points assumed" in str(model.report)
    os.rename(tmp_path / "unnamed.pt", tmp_path / "ULIP-2-PointBERT-8k-xyz-pc-vit_g.pt")
    named = load_published(tmp_path / "ULIP-2-PointBERT-8k-xyz-pc-vit_g.pt")
    assert named.contract.points == 8192 and not named.report.notes


def parameters(layout):
    shapes = published_layouts()[layout]["module"]
    return sum(
        torch.Size(shape).numel()
        for name, shape in shapes.items()
        if not re.search("running_|num_batches", name)
    )


def test_layouts_have_the_published_sizes(tmp_path):
    "Parameter counts of Uni3D and bytes of OpenShape's files as the hub states them; read in November 2026."
    counts = {"ti": 6_384_449, "s": 22_823_681, "b": 88_960_617, "l": 307_350_313, "g": 1_017_358_057}
    assert {size: parameters(f"uni3d/{size}") for size in counts} == counts
    assert [round(payload(f"uni3d/{size}") / 1e6, 1) for size in ("ti", "s")] == [12.8, 45.6]
    for layout, size in {
        "openshape/vitb32": 101_260_675,
        "openshape/vitl14": 102_839_295,
        "openshape/scaling1": 61_323_833,
    }.items():
        assert 0 < size - payload(layout) < 0.002 * size, layout
    bigg = published_layouts()["openshape/bigG"]
    with_moments = 4 * sum(torch.Size(s).numel() for t in with_adam(bigg).values() for s in t.values())
    assert 0 < 388_091_433 - with_moments < 0.002 * 388_091_433
    written = write_layout(tmp_path / "model.pt", "openshape/scaling1")
    assert abs(written.stat().st_size - 61_323_833) < 0.001 * 61_323_833
    model = load_published(written)
    assert model.contract.model == "openshape/scaling1" and model.encoder.config.heads == 4
    assert set(model.report.unused.role) == {"training state"}
    assert abs(write_layout(tmp_path / "ti.pt", "uni3d/ti").stat().st_size - 12.8e6) < 0.05e6


def test_half_precision_files_without_a_head(models):
    table = models["uni3d/ti"].report.table.set_index("tensor")
    assert set(table.dtype) == {"float16", "int64"} and not any("head" in name for name in table.index)
    assert {p.dtype for p in models["uni3d/ti"].encoder.parameters()} == {torch.float32}


def test_parity_with_a_reference_and_through_files(files, models, tmp_path):
    model = models["openshape/vitb32"]
    tensors = bare_tensors(files["openshape/vitb32"])
    table = parity(model, lambda x: REFERENCES["openshape/vitb32"](tensors, x[0])[None])
    assert list(table.index) == ["generic", "grid", "near origin"]
    assert (
        (table.difference < 2e-5).all() and (table["1 - cosine"] < 1e-6).all() and (table["size"] > 1).all()
    )
    clouds = np.load(write_clouds(model, tmp_path / "clouds.npz"))
    assert {name: clouds[name].shape for name in clouds.files} == dict.fromkeys(table.index, (1, 10_000, 6))
    np.savez(tmp_path / "theirs.npz", **{name: np.zeros((1, 512), np.float32) for name in table.index})
    zeros = parity(model, outputs=read_outputs(tmp_path / "theirs.npz"))
    assert np.allclose(zeros.difference, zeros["size"])
    np.savez(tmp_path / "pickle.npz", generic=np.array([{}], object))
    (tmp_path / "text.npz").write_text("no zip")
    for bad in ("pickle.npz", "text.npz"):
        with pytest.raises(ValueError, match=bad):
            read_outputs(tmp_path / bad)
    with pytest.raises(ValueError, match=r"returns \(3,\) numbers, this model \(512,\)"):
        parity(model, outputs=dict.fromkeys(table.index, torch.ones(3)))
    with pytest.raises(ValueError, match="lack the cloud 'grid'; they have generic"):
        parity(model, outputs={"generic": torch.ones(512)})
    with pytest.raises(ValueError, match="not both"):
        parity(model, lambda x: x, outputs={})
    with pytest.raises(ValueError, match="written as .npz"):
        write_clouds(model, tmp_path / "clouds.npy")


def test_the_published_score_is_the_raw_surface_in_one_gray(models, tmp_path):
    mesh = trimesh.creation.box((3, 2, 1))
    mesh.apply_translation((5, 0, 0))
    mesh.export(tmp_path / "box.glb")
    uni3d = models["uni3d/ti"]
    xyz, _ = read_points(tmp_path / "box.glb", 8192, seed=3)
    assert xyz[:, 0].min() > 3.49 and np.ptp(xyz[:, 0]) > 2.9
    gray = np.concatenate([xyz, np.full_like(xyz, 100 / 255)], 1).astype(np.float32)
    with torch.no_grad():
        want = torch.nn.functional.normalize(uni3d.encoder.network(torch.from_numpy(gray)[None]), dim=-1)[0]
    assert torch.allclose(
        shape_embedding(uni3d, tmp_path / "box.glb", "as-published", seed=3), want, atol=1e-6
    )
    assert shape_embedding(uni3d, tmp_path / "box.glb", "contract", seed=3) @ want < 0.999
    trimesh.PointCloud(xyz[:100]).export(tmp_path / "cloud.ply")
    with pytest.raises(ValueError, match="cloud of 100 points"):
        shape_embedding(uni3d, tmp_path / "cloud.ply", "as-published")
