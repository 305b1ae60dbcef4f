"""Every published layout in small: what is read, the traps, and what is said of broken files."""

import json
import os
import pickle
import re
import shutil

import miniatures as mini
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from cg3d.cli.app import app
from cg3d.core.errors import InputError
from cg3d.core.paths import data_dir
from cg3d.core.safe_pickle import load_pickle
from cg3d.data.furniture import furniture
from cg3d.data.modelnet import MODELNET10, MODELNET40, SCANOBJECTNN
from cg3d.data.objaverse import read_neighbors
from cg3d.data.registry import check_data, list_layouts, read_dataset
from cg3d.data.shapenet import CG3D_CLASSES
from cg3d.data.triplets import Triplets
from cg3d.geometry.ops import MISSING_COLOR, check_points, normalize
from cg3d.training.pretrain import read_data

# layout -> writer, listed shapes, classes, id and category of row 0, seed of its cloud, points of it
LAYOUTS = {
    "cg3d": (mini.cg3d, 16, 55, "02691156-1a2b", "airplane", 0, 1100),
    "ulip": (mini.ulip, 12, 55, "02691156-1a2b", "airplane", 0, 1100),
    "modelnet40": (mini.modelnet_text, 6, 40, "airplane_0001", "airplane", 0, 64),
    "modelnet10": (mini.modelnet_text, 2, 10, "night_stand_0001", "night stand", 2, 64),
    "modelnet40_h5": (mini.modelnet_h5, 6, 40, "ply_data_train0-00000", "airplane", 0, 64),
    "modelnet_pickle": (mini.modelnet_pickle, 6, 40, "train-00000", "airplane", 0, 64),
    "modelnet40_openshape": (
        lambda root: mini.openshape_tests(root) / "modelnet40",
        3,
        40,
        "airplane_0002",
        "airplane",
        1,
        64,
    ),
    "modelnet40_ulip2": (mini.ulip2_modelnet, 3, 40, "airplane_0002", "airplane", 1, 64),
    "scanobjectnn_openshape": (
        lambda root: mini.openshape_tests(root) / "scanobjectnn",
        4,
        15,
        "00000",
        "bag",
        0,
        32,
    ),
    "scanobjectnn_obj_bg": (mini.scanobjectnn, 10, 15, "training_objectdataset-00000", "bag", 0, 32),
    "scanobjectnn_obj_only": (mini.scanobjectnn, 10, 15, "training_objectdataset-00000", "bag", 100, 32),
    "scanobjectnn_pb_t50_rs": (
        mini.scanobjectnn,
        10,
        15,
        "training_objectdataset_augmentedrot_scale75-00000",
        "bag",
        200,
        32,
    ),
    "modelnet_c": (mini.modelnet_c, 108, 40, "clean-00000", "airplane", 0, 32),
    "scanobjectnn_c_obj_bg": (mini.scanobjectnn_c, 72, 15, "clean-00000", "bag", 0, 32),
    "scanobjectnn_c_obj_only": (mini.scanobjectnn_c, 72, 15, "clean-00000", "bag", 0, 32),
    "scanobjectnn_c_hardest": (mini.scanobjectnn_c, 72, 15, "clean-00000", "bag", 0, 32),
    "modelnet40_c": (mini.modelnet40_c, 228, 40, "data_original-00000", "airplane", 0, 32),
    "omniobject3d": (mini.omniobject3d, 9, 2, "1024/anise_001", "anise", 0, 1024),
    "pointda_modelnet": (mini.pointda_modelnet, 4, 10, "bathtub/bathtub_0001", "bathtub", None, 2048),
    "pointda_shapenet": (mini.pointda_shapenet, 4, 10, "bathtub/bathtub_0001", "bathtub", 0, 2048),
    "pointda_scannet": (mini.pointda_scannet, 4, 10, "train_0-00000", "chair", 0, 2048),
    "sim2real": (mini.sim2real, 4, 2, "bed/bed_0001", "bed", 0, 2048),
    "openshape": (mini.objaverse, 6, 2, "aa11", "bat (animal)", 0, 90),
    "objaverse_lvis": (mini.uni3d_lvis, 3, 3, "aa11", "bat (animal)", 0, 90),
    "scannet": (mini.scannet, 2, 2, "scene0000_00/0", "cabinet", None, 8),
    "folder": (mini.folder, 3, 2, "a-box", "box", None, 2048),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request, tmp_path_factory):
    writer, *expected = LAYOUTS[request.param]
    return request.param, writer(tmp_path_factory.mktemp(request.param)), *expected


def test_every_layout_has_a_miniature():
    assert set(LAYOUTS) | {"packed", "shards"} == set(
        list_layouts()
    )  # these two are written by cg3d, see test_shapes.py and test_shards.py


def test_layout_yields_the_contract(layout):
    name, root, count, classes, first, category, seed, points = layout
    data = read_dataset(root, layout=name)
    assert len(data) == count and len(data.labels) == classes and data.points_per_shape == points
    assert data.table["id"].iat[0] == first
    named = data.table["category"] != ""
    assert (
        category in set(data.table["category"])
        and [data.labels[label] for label in data.table["label"][named]]
        == data.table["category"][named].tolist()
    )
    clouds = data.points()
    check_points(clouds)
    assert clouds.shape == (count, points, 6) and clouds.dtype == torch.float32
    assert torch.allclose(clouds[..., :3].mean(1), torch.zeros(count, 3), atol=1e-4) and torch.allclose(
        clouds[..., :3].norm(dim=-1).amax(1), torch.ones(count), atol=1e-4
    )
    if seed is not None:
        assert torch.allclose(
            clouds[0, :, :3], normalize(torch.from_numpy(mini.cloud(seed, points))), atol=2e-4
        )  # same points, same order, same axes
    if name not in ("openshape", "objaverse_lvis", "scannet", "modelnet40_openshape"):
        assert (clouds[0, :, 3:] == MISSING_COLOR).all()


def test_layout_is_recognized_or_asks(layout):
    """What lies alone is recognized; several layouts side by side are named, never chosen from in silence."""
    name, root, *_ = layout
    found = check_data(root).layout.split(" + ")
    assert name in found or (name, found) == (
        "modelnet10",
        ["modelnet40"],
    )  # they share a folder; 10 has to be asked for
    if len(found) == 1:
        assert read_dataset(root).layout == found[0]
    else:
        with pytest.raises(ValueError, match="say which with layout="):
            read_dataset(root)


def test_check_data_counts(layout):
    name, root, count, *_ = layout
    report = check_data(root, layout=name)
    assert report.table["listed"].sum() == count == report.table["found"].sum() and report.ok, str(report)


def test_ids_may_hold_hyphens(tmp_path):
    data = read_dataset(mini.ulip(tmp_path))
    row = data.table["id"].tolist().index("02691156-3c-4d-5e")
    assert (
        data.table["model"].iat[row] == "3c-4d-5e" and len(data.view_files(row)) == 30
    )  # depth renders are left out
    cg3d = read_dataset(mini.cg3d(tmp_path / "cg3d"), split="train")
    assert len(cg3d.view_files(cg3d.table["id"].tolist().index("02691156-3c-4d-5e"))) == 5


def test_leaks_are_reported(tmp_path):
    problems = "\n".join(check_data(mini.cg3d(tmp_path)).problems)
    assert (
        "3 of the 4 shapes of split 'val' are in 'train'" in problems
        and "1 of the 4 shapes of split 'val' are in 'test'" in problems
    )
    assert "ShapeNet55/test.txt are in train_img.txt" in problems


def test_classes_stand_in_published_order(tmp_path):
    data = read_dataset(mini.cg3d(tmp_path / "a"))
    assert (
        data.labels == CG3D_CLASSES
        and data.labels[0] == "mug"
        and data.labels[-1] == "monitor"
        and {"monitor", "ship"} <= set(data.table["category"])
    )
    assert (
        read_dataset(mini.modelnet_text(tmp_path / "b"), layout="modelnet40", names="verbatim").labels
        == MODELNET40
    )
    assert (
        read_dataset(mini.modelnet_pickle(tmp_path / "c", number="10"), names="verbatim").labels == MODELNET10
    )
    assert (
        read_dataset(mini.scanobjectnn(tmp_path / "d"), layout="scanobjectnn_obj_bg", names="verbatim").labels
        == SCANOBJECTNN
    )
    assert read_dataset(mini.uni3d_lvis(tmp_path / "e"), names="verbatim").labels == [
        "CD_player",
        "bat_(sports_equipment)",
        "bat_(animal)",
    ]  # by the list's numbers


@pytest.mark.parametrize(
    "names,words",
    [
        ("cleaned", ["bat (animal)", "bat (sports equipment)", "CD player"]),
        ("verbatim", ["bat_(animal)", "bat_(sports_equipment)", "CD_player"]),
    ],
)
@pytest.mark.parametrize("writer", [mini.uni3d_lvis, mini.ulip_lvis])
def test_lvis_names_verbatim_or_cleaned(tmp_path, writer, names, words):
    assert read_dataset(writer(tmp_path), names=names).table["category"].tolist() == words


def test_scanobjectnn_is_normalized_and_says_so(tmp_path):
    root = mini.scanobjectnn(tmp_path)
    data = read_dataset(root, layout="scanobjectnn_pb_t50_rs", split="test")
    assert np.linalg.norm(data[0].points, axis=1).min() > 2  # the file's own meters
    assert data.points()[..., :3].norm(dim=-1).amax() <= 1 + 1e-5
    assert any(
        "neither centered nor scaled" in note and "PB_T50_RS" in note
        for note in check_data(root, layout="scanobjectnn_pb_t50_rs").notes
    )


def test_scannet_turns_z_up(tmp_path):
    data = read_dataset(mini.scannet(tmp_path))
    tall, bench = data[0].points, data[1].points
    assert np.allclose(np.ptp(tall, 0), [0.5, 2, 0.5]) and np.allclose(np.ptp(bench, 0), [1, 0.4, 0.4])


def test_sidecar_filters_names_and_features_survive(tmp_path):
    data = read_dataset(mini.objaverse(tmp_path), layout="openshape", split="train_all")
    assert data[0].name == "" and data[1].name == "raw bb22" and data[0].caption == "blip aa11"
    assert data.features(0)["image_feat"].shape == (12, 1280)
    np.save(
        tmp_path / "point_feat_knn.npy",
        np.array({"name": ["aa11", "bb22", "cc33"], "index": {"aa11": [0, 2], "bb22": [1, 0]}}, object),
        allow_pickle=True,
    )
    assert read_neighbors(tmp_path / "point_feat_knn.npy") == {
        "aa11": ["aa11", "cc33"],
        "bb22": ["bb22", "aa11"],
    }


def test_folder_without_a_table(tmp_path):
    data = read_dataset(mini.folder(tmp_path / "mine", table=False))
    assert data.table["id"].tolist() == ["a-box", "cloud", "sub/ball"] and any(
        "no .csv" in problem for problem in check_data(tmp_path / "mine").problems
    )


def test_surfaces_are_sampled_with_as_many_points_as_asked(tmp_path):
    """4,096 points of a mesh are 4,096 different ones; a cloud keeps its own number."""
    root = mini.folder(tmp_path / "mine")
    for options in ({"mesh_points": 4096}, {"points": 4096}):
        data = read_dataset(root, **options)
        assert data.points_per_shape == 4096
        assert len(torch.unique(data.points([0])[0, :, :3], dim=0)) == 4096
        assert [len(data.record(row).xyz) for row in range(3)] == [4096, 4096, 400]
    assert read_dataset(root, mesh_points=100).points_per_shape == 100
    training = read_data(str(root), points=4096)
    assert Triplets(training.select(split="train"), points=4096, views=0).points == 4096
    assert read_data(str(root), points=256).points_per_shape == 2048
    with pytest.raises(ValueError, match="points=5000 but the clouds hold 4096: choose at most as many"):
        Triplets(training, points=5000, views=0)


@pytest.mark.parametrize(
    "layout,writer,victim,count",
    [
        ("cg3d", mini.cg3d, "ShapeNet55/shapenet_pc/03001627-1a2b.npy", 2),
        ("ulip", mini.ulip, "shapenet_pc/02691156-1a2b.npy", 1),
        ("modelnet40", mini.modelnet_text, "airplane/airplane_0001.txt", 1),
        ("modelnet40_h5", mini.modelnet_h5, "ply_data_test0.h5", 1),
        ("scanobjectnn_obj_only", mini.scanobjectnn, "main_split_nobg/test_objectdataset.h5", 1),
        ("openshape", mini.objaverse, "Objaverse/000-001/aa11.npy", 2),
        ("objaverse_lvis", mini.uni3d_lvis, "objaverse/000-001/aa11.npy", 1),
        ("folder", mini.folder, "a-box.stl", 1),
    ],
)
def test_missing_files_are_named(tmp_path, layout, writer, victim, count):
    root, name = writer(tmp_path), victim.rpartition("/")[2]
    (root / victim).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        read_dataset(root, layout=layout)
    whole = len(read_dataset(root, layout=layout, missing="skip"))
    report = check_data(root, layout=layout)
    assert (
        not report.ok
        and report.table["missing"].sum() == count
        and whole == report.table["found"].sum()
        and name in str(report)
    )


def test_lost_views_are_named(tmp_path):
    root = mini.cg3d(tmp_path)
    shutil.rmtree(root / "shapenet_render/img/03001627/3c-4d-5e")
    assert any(
        "1 of 8 shapes have no views, first '03001627-3c-4d-5e'" in problem
        for problem in check_data(root).problems
    )
    data = read_dataset(root, split="train")
    with pytest.raises(FileNotFoundError, match="03001627-3c-4d-5e"):
        data.view_files(data.table["id"].tolist().index("03001627-3c-4d-5e"))
    shutil.rmtree(root / "shapenet_render/img")
    assert (
        any("no views" in problem for problem in check_data(root).problems)
        and not read_dataset(root).has_views
    )


def test_a_broken_variant_does_not_hide_the_others(tmp_path):
    root = mini.scanobjectnn(tmp_path)
    (root / "main_split_nobg/test_objectdataset.h5").write_bytes(b"not hdf5")
    report = check_data(root)
    assert (
        not report.ok
        and report.table["found"].sum() == 20
        and any(
            "main_split_nobg/test_objectdataset.h5: not a sound HDF5 file" in problem
            for problem in report.problems
        )
    )


def test_ids_that_look_like_numbers(tmp_path):
    root = mini.folder(tmp_path / "mine")
    (root / "a-box.stl").rename(root / "007.stl"), (root / "cloud.npy").rename(root / "0010.npy")
    (root / "names.csv").write_text("id,name\n007,box\n0010,cigar\n")
    data = read_dataset(root)
    assert data.table["id"].tolist() == ["007", "0010"] and data[0].id == "007"


def test_hdf5_names_beside_the_parts(tmp_path):
    root = mini.modelnet_h5(tmp_path)
    (root / "ply_data_train_0_id2file.json").write_text(
        json.dumps(["airplane/airplane_0001.ply", "night_stand/night_stand_0001.ply"])
    )
    assert read_dataset(root, split="train").table["id"].tolist() == [
        "airplane_0001",
        "night_stand_0001",
        "ply_data_train1-00000",
    ]
    assert read_dataset(root / "ply_data_test1.h5").table[["split", "category"]].values.tolist() == [
        ["test", "tv stand"]
    ]


@pytest.mark.parametrize(
    "writer,file,content,words",
    [
        (
            mini.ulip,
            "train.txt",
            "02691156_x.npy\n",
            "train.txt: '02691156_x.npy' is not <synset>-<model>.npy",
        ),
        (mini.ulip, "train.txt", "99999999-x.npy\n", "train.txt: synset '99999999'"),
        (mini.ulip, "taxonomy.json", "{", "taxonomy.json: not JSON"),
        (mini.cg3d, "ShapeNet55/shapenet_pc/02691156-1a2b.npy", "short", "02691156-1a2b.npy"),
        (
            mini.uni3d_lvis,
            "lvis_testset.txt",
            "a,b,c\n",
            "lvis_testset.txt: 'a,b,c' is not cate_id,cate_name,model_id,relpath",
        ),
        (mini.uni3d_lvis, "objaverse/000-001/aa11.npy", "", "aa11.npy: the file is empty"),
        (
            mini.scannet,
            "scans/scene0000_00/scene0000_00_vh_clean_2.0.010000.segs.json",
            '{"segIndices": [1]}',
            "1 segIndices for 24 vertices",
        ),
        (
            mini.scannet,
            "scans/scene0000_00/scene0000_00.aggregation.json",
            '{"groups": []}',
            "no key 'segGroups'; it has groups",
        ),
        (mini.folder, "a-box.stl", "this is text", "a-box.stl"),
        (
            mini.folder,
            "names.csv",
            "length,width\n1,2\n",
            "names.csv: no column file, path, filename, id or name",
        ),
    ],
)
def test_broken_files_are_named(tmp_path, writer, file, content, words):
    root = writer(tmp_path / "set")
    next(path for path in (root / file, tmp_path / "set" / file) if path.exists()).write_text(content)
    with pytest.raises(ValueError, match=re.escape(words)):
        read_dataset(root).points()


def test_other_keys_in_hdf5(tmp_path):
    import h5py

    root = mini.scanobjectnn(tmp_path)
    file = root / "main_split/test_objectdataset.h5"
    with h5py.File(file, "w") as opened:
        opened["cloud"] = np.zeros((2, 8, 3))
    with pytest.raises(ValueError, match="no key 'data'; it has cloud"):
        read_dataset(root, layout="scanobjectnn_obj_bg")
    answer = CliRunner().invoke(app, ["check-data", str(root), "--layout", "scanobjectnn_obj_bg"])
    assert answer.exit_code == 2 and "no key 'data'; it has cloud" in answer.output
    file.write_bytes(b"not hdf5")
    with pytest.raises(ValueError, match="test_objectdataset.h5: not a sound HDF5 file"):
        read_dataset(root, layout="scanobjectnn_obj_bg")


class Burglar:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, protocol):
    file = tmp_path / "modelnet40_train_8192pts_fps.dat"
    file.write_bytes(pickle.dumps([[Burglar(tmp_path / "inside")], [0]], protocol))
    with pytest.raises(ValueError, match="mkdir"):
        read_dataset(tmp_path)
    with pytest.raises(ValueError, match="mkdir"):
        load_pickle(file)
    root = mini.uni3d_lvis(tmp_path / "lvis")
    np.save(
        root / "objaverse/000-001/aa11.npy",
        np.array({"xyz": Burglar(tmp_path / "inside")}, object),
        allow_pickle=True,
    )
    with pytest.raises(ValueError, match="aa11.npy.*mkdir"):
        read_dataset(root)
    assert not (tmp_path / "inside").exists()


def test_names_that_are_not_known(tmp_path):
    root = mini.modelnet_text(tmp_path)
    with pytest.raises(ValueError, match="layout='modelnet41' is unknown; known are cg3d"):
        read_dataset(root, layout="modelnet41")
    with pytest.raises(ValueError, match="'val'|val"):
        read_dataset(root, layout="modelnet40", split="val")
    with pytest.raises(ValueError, match="no known layout"):
        read_dataset(tmp_path.parent / tmp_path.name / "modelnet40_normal_resampled/airplane")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        read_dataset(tmp_path / "nowhere")
    (root / "modelnet40_test.txt").write_text("aeroplane_0001\n")
    with pytest.raises(ValueError, match="'aeroplane_0001' belongs to none of the 40 classes"):
        read_dataset(root, layout="modelnet40")


def test_the_command_says_what_it_found(tmp_path):
    root, run = mini.ulip(tmp_path), CliRunner().invoke
    (root / "shapenet_pc/02691156-6f70.npy").unlink()
    answer = run(app, ["check-data", str(root), "--json"])
    report = json.loads(answer.stdout)
    assert report["layout"] == "ulip" and {
        row["split"]: (row["listed"], row["missing"]) for row in report["splits"]
    } == {"train": (8, 0), "test": (4, 1)}
    assert "02691156-6f70.npy" in answer.stdout and answer.exit_code != 0


def test_furniture_set():
    shapes = furniture()
    counts = shapes.table["split"].value_counts().to_dict()
    assert len(shapes) == 790 and counts == {"train": 637, "test": 92, "val": 61}
    points = shapes.points(slice(0, 790, 40))
    assert points[..., :3].norm(dim=-1).amax(1).allclose(torch.ones(len(points)))
    assert points[..., 3:].amin() >= 0 and points[..., 3:].amax() <= 1
    assert (shapes.table["query"] == "").eq(shapes.table["split"] == "test").all()
    assert (shapes.table[["name", "id", "license", "creator", "caption"]] != "").all(axis=None)
    notes = (data_dir() / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert all(f"**{creator}**" in notes for creator in shapes.table["creator"].unique())


def test_ulip2s_colored_modelnet_is_not_replaced_by_the_colorless_one(tmp_path):
    """The colored file lies in the folder of the text files: the caller has to say which is meant."""
    text = mini.modelnet_text(tmp_path)
    assert read_dataset(text).layout == "modelnet40"
    mini.ulip2_modelnet(tmp_path)
    with pytest.raises(InputError, match="modelnet40, modelnet40_ulip2; say which with layout="):
        read_dataset(text)
    data = read_dataset(text, layout="modelnet40_ulip2")
    assert data.table["split"].unique().tolist() == ["test"] and data.labels[23] == "night stand"
    assert data.table["label"].tolist() == [0, 23, 36]
    assert (data.points()[..., 3:] == 0.4).all()  # the file holds 0.9; ULIP-2's loader writes 0.4
    stored = read_dataset(text, layout="modelnet40_ulip2", normalized=False)
    assert np.array_equal(stored.points()[0, :, :3], mini.cloud(1, 64))  # as stored, as ULIP-2 evaluates it
    (text / "modelnet40_test_split_10k_colored.json").write_text('[{"category": "airplane"}]')
    with pytest.raises(InputError, match="3 clouds for 1 rows of modelnet40_test_split_10k_colored.json"):
        read_dataset(text, layout="modelnet40_ulip2")


@pytest.mark.parametrize("layout", ["scanobjectnn_obj_bg", "scanobjectnn_obj_only"])
def test_scanobjectnn_as_cg3ds_loader_reads_it(tmp_path, layout):
    root = mini.scanobjectnn(tmp_path)
    data = read_dataset(root, layout=layout, split="test", normalized=False)
    unit = read_dataset(root, layout=layout, split="test")
    for row in range(len(data)):
        assert np.array_equal(data.points([row])[0, :, :3], data[row].points)  # meters, not centered
    assert (
        data.points()[..., :3].norm(dim=-1).amin() > 2 > 1 + 1e-5 > unit.points()[..., :3].norm(dim=-1).amax()
    )
    assert data.lazy_points().key != unit.lazy_points().key  # other coordinates, other views
    assert data.select([True] + [False] * 4).points().shape == (1, 32, 6)
    with pytest.raises(InputError, match="normalized=False"):
        read_dataset(data_dir() / "furniture", normalized=False)


def test_one_color_above_one_does_not_turn_a_cloud_black(tmp_path):
    root = mini.cg3d(tmp_path)
    file = root / "ShapeNet55/shapenet_pc/02691156-1a2b.npy"
    rgb = np.full((1100, 3), 0.5)
    rgb[7, 1] = 1.0000001
    np.save(file, np.hstack([mini.cloud(0), rgb]))
    colors = read_dataset(root)[0].colors
    assert (np.delete(colors, 7, 0) == 0.5).all() and colors.max() == 1
    for factor, largest in ((255, 1.0), (100, 100 / 255)):
        np.save(file, np.hstack([mini.cloud(0), np.full((1100, 3), factor)]))
        assert read_dataset(root)[0].colors.max() == pytest.approx(largest)
    np.save(file, np.hstack([mini.cloud(0), rgb * 1.4]))  # neither range
    with pytest.raises(InputError, match="02691156-1a2b.npy: the largest color is"):
        read_dataset(root)[0]


def test_colors_of_openshapes_scanobjectnn_have_one_range(tmp_path):
    """A nearly black cloud of a set in 0..255 stays black: the whole file decides the range, not one cloud."""
    root = mini.openshape_tests(tmp_path) / "scanobjectnn"
    data = np.load(root / "xyz_label.npy", allow_pickle=True).item()
    data["rgb"] = np.stack([np.full((32, 3), value, np.float32) for value in (1, 255, 0, 51)])
    np.save(root / "xyz_label.npy", data, allow_pickle=True)
    collection = read_dataset(root)
    colors = [float(collection[row].colors.max()) for row in range(4)]
    assert colors == pytest.approx([1 / 255, 1, 0, 0.2])


def drop_line(file, index):
    lines = file.read_text().splitlines()
    del lines[index]
    file.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    "layout,writer,file",
    [
        ("modelnet40", mini.modelnet_text, "modelnet40_shape_names.txt"),
        ("modelnet10", mini.modelnet_text, "modelnet10_shape_names.txt"),
        ("modelnet40_h5", mini.modelnet_h5, "shape_names.txt"),
        ("cg3d", mini.cg3d, "shapenet_render/shape_names.txt"),
    ],
)
def test_an_incomplete_class_list_does_not_renumber_the_classes(tmp_path, layout, writer, file):
    root = writer(tmp_path)
    before = read_dataset(root, layout=layout)
    drop_line(root / file, 1)
    with pytest.raises(InputError, match=f"{file.rpartition('/')[2]}: .* published classes, without"):
        read_dataset(root, layout=layout)
    (root / file).unlink()
    again = read_dataset(root, layout=layout)  # the published list
    assert again.labels == before.labels and again.table["label"].tolist() == before.table["label"].tolist()


def test_an_lvis_list_that_lacks_classes_does_not_renumber_the_others(tmp_path):
    root = mini.uni3d_lvis(tmp_path / "uni3d")
    drop_line(root / "lvis_testset.txt", 1)
    with pytest.raises(InputError, match="lvis_testset.txt: class 1 has no row"):
        read_dataset(root)
    numbers = {"CD_player": 0, "bat_(sports_equipment)": 1, "bat_(animal)": 2}
    (root / "objaverse_lvis_metadata.json").write_text(json.dumps({"key_to_id": numbers}))
    data = read_dataset(root, names="verbatim")
    assert data.labels == list(numbers) and data.table["label"].tolist() == [2, 0]
    ulip = mini.ulip_lvis(tmp_path / "ulip")
    paths = json.loads((ulip / "lvis.json").read_text())
    del paths["bb22"]
    (ulip / "lvis.json").write_text(json.dumps(paths))
    data = read_dataset(ulip, names="verbatim")
    assert data.labels == [category for _, category, _ in mini.LVIS] and data.table["label"].tolist() == [
        0,
        2,
    ]


def test_another_number_of_lvis_classes_is_a_warning(tmp_path):
    root = mini.objaverse(tmp_path)
    with pytest.warns(UserWarning, match="2 classes, Objaverse-LVIS has 1,156"):
        read_dataset(root / "meta_data/split/lvis.json")
    assert any("Objaverse-LVIS has 1,156" in problem for problem in check_data(root, "openshape").problems)


def test_labels_of_ulip_are_the_55_synsets(tmp_path):
    data = read_dataset(mini.ulip(tmp_path))
    assert data.labels[0] == "airplane" and data.labels[8] == "bookshelf" and data.labels[-1] == "washer"
    assert "display" in data.labels and len(set(data.labels)) == 55


def test_digits_stay_text(tmp_path):
    root = mini.folder(tmp_path / "mine")
    header = "file,id,name,category,split,caption,tags\n"
    (root / "names.csv").write_text(header + "a-box.stl,007,0010,02691156,01,100,00\n")
    data = read_dataset(root)
    shape = data[0]
    assert (shape.id, shape.name, shape.category, shape.caption) == ("007", "0010", "02691156", "100")
    assert shape.tags == ("00",) and data.labels == ["02691156"] and data.table["split"].tolist() == ["01"]
    assert len(data.select(category="02691156")) == 1


def test_a_collection_survives_pickling(tmp_path):
    """Workers of Ray receive collections."""
    cloudpickle = pytest.importorskip("cloudpickle")
    data = read_dataset(mini.ulip(tmp_path), points=64)
    again = pickle.loads(cloudpickle.dumps(data))
    assert torch.equal(again.points([3, 1]), data.points([3, 1])) and again.points_per_shape == 64
    assert again.lazy_points().key == data.lazy_points().key


# corrupted test sets


def test_corruptions_and_levels_are_columns(tmp_path):
    data = read_dataset(mini.modelnet_c(tmp_path))
    kinds = {kind.replace("dropout", "drop") for kind in mini.H5_CORRUPTIONS}
    assert set(data.table["corruption"]) == {"clean", *kinds}
    assert data.table.groupby("corruption")["level"].agg(set).drop("clean").map(len).eq(5).all()
    clean = data.select(split="test")
    assert clean.table["category"].tolist() == ["airplane", "night stand", "vase"]
    assert clean.table["level"].tolist() == [0, 0, 0]
    dropped = data.select(split="drop_global_5")
    assert dropped.table["level"].eq(5).all() and len(dropped.record(0).xyz) == 32 - 20
    assert len(data.select(split="add_local_1").record(0).xyz) == 33
    forty = read_dataset(mini.modelnet40_c(tmp_path))
    assert set(forty.table["corruption"]) == {"clean", *mini.NPY_CORRUPTIONS}
    assert len(forty.select(split="upsampling_3").record(0).xyz) == 35
    report = check_data(tmp_path / "modelnet40_c")
    assert report.ok and not report.problems and len(report.table) == 1 + 15 * 5


def test_variants_and_class_lists_of_corrupted_sets(tmp_path):
    root = mini.scanobjectnn_c(tmp_path)
    assert read_dataset(root / "hardest").layout == "scanobjectnn_c_hardest"
    with pytest.raises(InputError, match="scanobjectnn_c_hardest, scanobjectnn_c_obj_bg.*layout="):
        read_dataset(root)
    shapes = mini.modelnet_c(tmp_path)
    (shapes / "shape_names.txt").write_text("\n".join(f"class {i}" for i in range(55)))
    with pytest.raises(InputError, match="55"):
        mini_h5_with_label(shapes / "clean.h5", 55)
        read_dataset(shapes)


def mini_h5_with_label(file, label):
    import h5py

    with h5py.File(file, "r+") as opened:
        opened["label"][0, 0] = label


def test_damaged_corrupted_sets_are_named(tmp_path):
    root = mini.modelnet40_c(tmp_path)
    np.save(root / "data_shear_2.npy", np.zeros((2, 32, 3)))
    data = read_dataset(root)
    with pytest.raises(
        InputError, match=r"data_shear_2.npy: float64 \(2, 32, 3\), expected numbers \(3, N, 3\)"
    ):
        data.select(split="shear_2").points([0])
    (root / "data_original.npy").unlink()
    assert any("clean file is missing" in note for note in check_data(root).notes)
    np.save(root / "label.npy", np.array([0.5, 1, 2]))
    with pytest.raises(InputError, match="label.npy: float64 labels"):
        read_dataset(root)


def test_axes_of_pointda(tmp_path):
    "ModelNet is stored with z up, ShapeNet with y up except its plants, ScanNet with y up."
    turned = torch.from_numpy(mini.cloud(3, 2048)[:, [0, 2, 1]] * [1, 1, -1])
    modelnet = read_dataset(mini.pointda_modelnet(tmp_path / "a")).select(split="test", category="plant")
    shapenet = read_dataset(mini.pointda_shapenet(tmp_path / "b"))
    plant, bathtub = (
        shapenet.select(split="test", category="plant"),
        shapenet.select(split="test", category="bathtub"),
    )
    for data in (modelnet, plant):
        assert torch.allclose(data.points()[0, :, :3], normalize(turned.float()), atol=2e-4)
    stored = normalize(torch.from_numpy(mini.cloud(1, 2048)))
    assert torch.allclose(bathtub.points()[0, :, :3], stored, atol=2e-4)
    given = read_dataset(tmp_path / "b/PointDA_data/shapenet", up="y").select(split="test", category="plant")
    assert not torch.allclose(given.points()[0, :, :3], normalize(turned.float()), atol=0.1)


def test_omniobject3d_by_number_of_points(tmp_path):
    data = read_dataset(mini.omniobject3d(tmp_path))
    for count in (1024, 4096, 16384):
        part = data.select(split=str(count))
        assert len(part) == 3 and part.points_per_shape == count or part[0].points.shape == (count, 3)
        assert torch.allclose(
            part[2].cloud()[:, :3], normalize(torch.from_numpy(mini.cloud(2, count))), atol=2e-4
        )
    assert data.labels == ["anise", "toy car"]  # the empty folder is no class
