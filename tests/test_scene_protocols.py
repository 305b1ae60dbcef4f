"Protocols for scenes: every annotation file in miniature, and scores against calculations by hand."

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import miniatures
import numpy as np
import pandas as pd
import pytest
import torch

import cg3d.scenes.protocols as protocols
from cg3d.data.referring import read_referring
from cg3d.data.scannet_labels import (
    LABEL_FILE,
    SCANNET200,
    SCANNET200_GROUPS,
    instance_labels,
    read_label_map,
)
from cg3d.evaluation.conditions import CONDITIONS
from cg3d.io.scannet import scannet_alignment
from cg3d.io.scene import Scene
from cg3d.scenes.evaluation import SceneQueryConfig
from cg3d.scenes.instance_ap import LabeledInstance, ap_summary, instance_ap
from cg3d.scenes.protocols import (
    ScanFolder,
    box_iou,
    find_label_map,
    ground_expressions,
    instance_scores,
    recognize_instances,
)

ROOT = Path(__file__).parent.parent
NAMES = {0: "chair", 1: "office chair", 2: "table", 3: "lamp"}


def room(name="scene0000_00"):
    "Four boxes of 120 points in a row along x, 1 m apart; the last has 9 points, too few for a proposal."
    generator = np.random.default_rng(0)
    parts = [generator.random((120 if number < 3 else 9, 3)) * 0.5 + [number, 0, 0] for number in NAMES]
    instance = np.repeat(list(NAMES), [len(part) for part in parts])
    points = np.concatenate(parts)
    return Scene(points, up="z", unit="m", instance=instance, names=NAMES, name=name)


class Fixed:
    "A model whose best proposal of every text is written down: text -> instance."

    answers = {"the chair": 0, "left of the table": 0, "a table": 2, "chair in the middle": 1}
    logit_scale = torch.tensor(10.0)

    def fingerprint(self):
        return "fixed"

    class config:
        points = 8

    def encode_shape(self, clouds):
        return torch.nn.functional.one_hot(clouds[:, :, 0].mean(1).long(), 4).float()

    def encode_text(self, texts):
        rows = [self.answers.get(text.removeprefix("a ").removesuffix("."), None) for text in texts]
        rows = [self.answers.get(text, row) for text, row in zip(texts, rows)]
        return torch.stack([torch.zeros(4) if row is None else torch.eye(4)[row] for row in rows])

    def zero_shot_classifier(self, labels, templates=()):
        return torch.eye(4)[[["chair", "office chair", "table", "lamp"].index(label) for label in labels]]


@pytest.fixture
def answers(monkeypatch):
    "Queries are answered by `Fixed` with the whole sentence."

    def query(scene, text, model, source, progress=True):
        found = protocols.propose(scene, source)
        order = sorted(
            range(len(found)), key=lambda i: scene.instance[found.indices[i][0]] != Fixed.answers[text]
        )

        class result:
            table = pd.DataFrame({"proposal": order})

        return result

    monkeypatch.setattr(protocols, "query_scene", query)
    return Fixed()


SCANREFER = [
    ("scene0000_00", "0", "chair", "0", "the chair"),
    ("scene0000_00", "0", "chair", "1", "left of the table"),
    ("scene0000_00", "1", "office_chair", "0", "the chair"),
    ("scene0000_00", "2", "table", "0", "a table"),
    ("scene0000_00", "8", "door", "0", "a table"),
    ("scene0999_00", "2", "table", "0", "a table"),
]


def scanrefer(path, more=()):
    keys = ("scene_id", "object_id", "object_name", "ann_id", "description")
    entries = [dict(zip(keys, row)) | {"token": row[4].split()} for row in SCANREFER]
    path.write_text(json.dumps([entry | dict(more) for entry in entries]))
    return path


LABEL_ROWS = (
    "id\traw_category\tcategory\tcount\tnyu40id\teigen13id\tnyuClass\tnyu40class\teigen13class",
    "2\tchair\tchair\t4646\t5\t4\tchair\tchair\tChair",
    "10\toffice chair\toffice chair\t595\t5\t4\tchair\tchair\tChair",
    "4\ttable\ttable\t1170\t7\t10\ttable\ttable\tTable",
    "5\tdoor\tdoor\t1420\t8\t12\tdoor\tdoor\tWall",
    "28\tlamp\tlamp\t419\t35\t7\tlamp\tlamp\tObjects",
    "1\twall\twall\t8277\t1\t12\twall\twall\tWall",
)


def label_file(folder):
    (folder / LABEL_FILE).write_text("\n".join(LABEL_ROWS) + "\n")
    return folder


def test_scanrefer(tmp_path, answers):
    found = read_referring(scanrefer(tmp_path / "ScanRefer_filtered_val.json"))
    assert (found.dataset, found.protocol, found.groups) == ("ScanRefer", "boxes", ("uniqueness",))
    assert found.table["category"].tolist()[2] == "office chair" and found.table["target"].tolist()[3] == 2
    assert found.table["uniqueness"].tolist() == ["unique"] * 6
    classes = read_label_map(label_file(tmp_path), "scannet20")
    assert classes == {
        "chair": "chair",
        "office chair": "chair",
        "table": "table",
        "door": "door",
        "wall": "wall",
    }
    found = read_referring(tmp_path / "ScanRefer_filtered_val.json", classes=classes)
    assert found.table["uniqueness"].tolist() == ["multiple"] * 3 + ["unique"] * 3
    table = ground_expressions(answers, found, {"scene0000_00": room()}, "instances").set_index("group")
    assert table["N"].to_dict() == {
        "all": 4,
        "multiple": 3,
        "unique": 1,
        "left out: of scans that are not there": 1,
        "left out: whose target has no points in the scan": 1,
    }
    assert (
        table["Acc@0.25"].round(3).tolist()[:3] == [75, 66.667, 100] == table["Acc@0.5"].round(3).tolist()[:3]
    )
    assert np.allclose(table["chance@0.25"][:3], 100 / 3)


def test_boxes_count_from_the_threshold_on(answers):
    "A box that shares exactly half of the union counts for 0.5, as ScanRefer compares."
    cubes = np.array([[[0, 2], [0, 1], [0, 1]], [[0, 1], [0, 1], [0, 1]], [[0, 0.5], [0, 1], [0, 1]]])
    assert np.allclose(box_iou(cubes[:1], cubes)[0], [1, 0.5, 0.25])
    row = type("result", (), {"table": pd.DataFrame({"proposal": [0]})})
    points = np.array([[0, 0, 0], [1, 1, 1], [5, 5, 5], [6, 6, 6]], float)
    proposals = type(
        "proposals", (), {"indices": [[0, 1], [2, 3]], "scene": type("s", (), {"points": points})}
    )
    scores = protocols._score_boxes(row, proposals, cubes[0])
    assert scores == {"Acc@0.25": 1.0, "Acc@0.5": 1.0, "chance@0.25": 0.5, "chance@0.5": 0.5}


def test_locate3d(tmp_path, answers):
    boxes = [[[5, 6]] * 3, [[0, 0.5], [0, 0.5], [0, 0.5]], [[2, 2.5], [0, 0.5], [0, 0.5]]]
    more = {"entities": [[[0], ["0_chair"]]], "scene_dataset": "ARKitScenes", "primary_key": "1"}
    path = scanrefer(tmp_path / "arkitscenes_val.json", more)
    entries = json.loads(path.read_text())[:4]
    path.write_text(
        json.dumps([entry | {"object_id": int(entry["object_id"]), "gt_boxes": boxes} for entry in entries])
    )
    found = read_referring(path)
    assert found.dataset == "Locate-3D" and found.groups == ("scans",)
    table = ground_expressions(answers, found, {"scene0000_00": room()}, "instances")
    assert (
        table["group"].tolist() == ["all", "ARKitScenes"] and table["Acc@0.25"][0] == 50
    )  # boxes 1 and 2 are found
    assert read_referring(scanrefer(tmp_path / "x.json", {"entities": []})).dataset == "ScanEnts3D"
    path.write_text(json.dumps([entries[0] | {"object_id": 7, "gt_boxes": boxes}]))
    with pytest.raises(ValueError, match="no .3, 2. box number 7"):
        read_referring(path)


NR3D = [  # utterance, tokens, stimulus, names the class
    ("the chair", ["the", "chair"], "scene0000_00-chair-2-0-1", True),
    ("left of the table", ["left", "of", "the", "table"], "scene0000_00-chair-3-1-0-2", True),
    ("a table", ["a", "table"], "scene0000_00-table-2-2-3", True),
    ("chair in the middle", ["it"], "scene0000_00-chair-2-0-1", False),
    ("a table", ["a", "table"], "scene0000_00-table-1-2", True),
    ("a table", ["a"] * 25, "scene0000_00-table-2-2-0", True),
    ("the chair", ["the", "chair"], "scene0000_00-lamp-2-3-0", True),
    ("a table", ["a", "table"], "scene0001_00-table-2-2-0", True),
]


def nr3d(path, sr3d=False):
    rows = []
    for number, (utterance, tokens, stimulus, named) in enumerate(NR3D):
        scene, label, _, target, *others = stimulus.split("-")
        row = {"assignmentid": number, "stimulus_id": stimulus, "utterance": utterance, "correct_guess": True}
        row |= {
            "speaker_id": 1,
            "listener_id": 2,
            "scan_id": scene,
            "instance_type": label,
            "target_id": target,
        }
        row |= {"tokens": str(tokens), "dataset": "sr3d" if sr3d else "nr3d", "mentions_target_class": named}
        if sr3d:
            row |= {
                "reference_type": "closest",
                "coarse_reference_type": "horizontal",
                "distractor_ids": str(others),
            }
            row |= {"anchors_types": "['table']", "anchor_ids": "[2]"}
        else:
            row |= {f"uses_{kind}_lang": True for kind in ("object", "spatial", "color", "shape")}
        rows.append(row)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("sr3d", [False, True])
def test_referit3d(tmp_path, answers, sr3d):
    found = read_referring(nr3d(tmp_path / "file.csv", sr3d), scenes=["scene0000_00"])
    assert (found.dataset, found.protocol) == ("Sr3D" if sr3d else "Nr3D", "choice")
    assert found.left_out == {
        "of other scenes": 1,
        "that do not name the class": 1,
        "of more than 24 tokens": 1,
        "with the only object of its class": 1,
    }
    assert found.table["difficulty"].tolist() == ["easy", "hard", "easy", "easy"]
    assert found.table["view"].tolist() == ["view-independent", "view-dependent"] + ["view-independent"] * 2
    table = ground_expressions(answers, found, {"scene0000_00": room()}).set_index("group")
    assert table["N"]["left out: whose target is not among the objects of the scan"] == 1  # 9 points
    assert table["accuracy"].round(2)[:5].to_dict() == {
        "all": 66.67,  # the second sentence chooses object 0, its target is 1
        "easy": 100,
        "hard": 0,
        "view-dependent": 0,
        "view-independent": 100,
    }
    assert np.isclose(table["chance"]["all"], 100 / 3)
    assert np.isclose(table["chance among class"]["all"], 100 * (1 / 2 + 1 / 3 + 1) / 3)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", '[{"scene_id": "s"}]', "entry 0 has no object_id, object_name, description"),
        ("a.json", "[]", "no sentence to score"),
        ("a.json", '{"scene_id": 1}', "list"),
        ("a.csv", "scan_id,utterance\n", "no column target_id, instance_type"),
    ],
)
def test_other_files_are_refused(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=words):
        read_referring(tmp_path / name)


@pytest.mark.parametrize("stimulus", ["scene-chair-3-1-0", "scene-chair", "scene-chair-two-1-0"])
def test_a_wrong_stimulus_is_refused(tmp_path, stimulus):
    rows = nr3d(tmp_path / "file.csv").read_text().replace("scene0000_00-chair-2-0-1", stimulus)
    (tmp_path / "file.csv").write_text(rows)
    with pytest.raises(ValueError, match="is not scene-class-number-target"):
        read_referring(tmp_path / "file.csv")


def test_labels_of_scannet():
    assert [len(SCANNET200_GROUPS[name]) for name in ("head", "common", "tail")] == [66, 68, 66]
    assert SCANNET200[1] == "wall" and SCANNET200[22] == "book" and SCANNET200[1191] == "mattress"
    assert len(instance_labels("scannet20")) == 18 and len(instance_labels("scannet200")) == 198
    with pytest.raises(ValueError, match="labels='nyu40' is not one of scannet20, scannet200"):
        instance_labels("nyu40")


def test_a_scannet_folder_is_turned_and_numbered_by_object_id(tmp_path):
    root = miniatures.scannet(tmp_path)
    scene = root / "scans/scene0000_00"
    assert scannet_alignment(scene) is None
    listed = json.loads((scene / "scene0000_00.aggregation.json").read_text())
    listed["segGroups"].reverse()  # the bench, objectId 1, is listed first
    (scene / "scene0000_00.aggregation.json").write_text(json.dumps(listed))
    plain = ScanFolder(root)["scene0000_00"]
    assert plain.names == {1: "bench", 0: "cabinet"} and any(
        "no axisAlignment" in note for note in plain.notes
    )
    (scene / "scene0000_00.txt").write_text(
        "appVersion = 1\naxisAlignment = 0 -1 0 5 1 0 0 0 0 0 1 0 0 0 0 1\n"
    )
    turned = ScanFolder(root / "scans")["scene0000_00"]
    assert np.allclose(turned.points[:, 0], 5 - plain.points[:, 1], atol=1e-5)
    assert np.allclose(turned.points[:, 1], plain.points[:, 0], atol=1e-5)
    (scene / "scene0000_00.txt").write_text("axisAlignment = 1 2 3\n")
    with pytest.raises(ValueError, match="axisAlignment must be 16 numbers"):
        scannet_alignment(scene)
    assert list(ScanFolder(scene)) == ["scene0000_00"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no ScanNet scene and no scan"):
        ScanFolder(tmp_path / "empty")


def test_recognition_of_known_instances():
    labels = ["chair", "table", "office chair"]
    table = recognize_instances(Fixed(), {"room": room()}, labels).set_index("group")
    assert table.loc["model", ["N", "top-1", "top-5", "mean class"]].tolist() == [3, 100, 100, 100]
    assert np.isclose(table.loc["chance", "top-1"], 100 / 3) and table.loc["chance", "top-5"] == 100
    assert table["N"]["left out: below 10 points"] == 1
    swapped = recognize_instances(
        Fixed(), {"room": room()}, ["chair", "table"], {"office chair": "chair", "table": "table"}
    )
    table = swapped.set_index("group")
    # both classes tie for the office chair, and a tie counts as wrong; the chair has no class in this map
    assert table.loc["model", ["N", "top-1", "mean class"]].tolist() == [2, 50, 50]
    assert table["N"]["left out: of no class"] == 1
    with pytest.raises(ValueError, match="no instance has one of the 1 classes"):
        recognize_instances(Fixed(), {"room": room()}, ["lamp"])


def blocks(sizes, names):
    instance = np.repeat(np.arange(len(sizes)), sizes)
    points = np.random.default_rng(0).random((len(instance), 3))
    return Scene(points, up="z", unit="m", instance=instance, names=dict(enumerate(names)))


def test_ap_of_two_scenes_by_hand():
    "Precision and recall run over all scenes: 0.9 right, 0.8 wrong, 0.7 right, one of three missed."
    scenes = [blocks([100, 100], ["chair", "wall"]), blocks([100, 100], ["chair", "chair"])]
    found = [
        [LabeledInstance(np.arange(100), "chair", 0.9)],
        [
            LabeledInstance(np.arange(50, 150), "chair", 0.8),
            LabeledInstance(np.arange(100, 200), "chair", 0.7),
        ],
    ]
    table = instance_ap(scenes, found, ["chair"])
    assert np.allclose(table[["AP", "AP50"]].iloc[0], 100 * 19 / 36)  # the area of the notebook's example
    # at 0.25 the object at 50 is taken by 0.8 (IoU 1/3); the other one sees 0.7 (IoU 1) alone: all are right
    assert np.isclose(table["AP25"][0], 100)


def test_ap_leaves_out_small_and_ignored():
    scene = blocks([99, 120, 150], ["chair", "mug", "chair"])
    small = LabeledInstance(np.arange(99), "chair", 0.99)  # below 100 points: no prediction
    on_mug = LabeledInstance(np.arange(99, 219), "chair", 0.95)  # on points of no class: ignored
    mixed = LabeledInstance(np.arange(0, 219), "chair", 0.95)  # on a small object and no class: ignored
    right = LabeledInstance(np.arange(219, 369), "chair", 0.5)
    table = instance_ap([scene], [[small, on_mug, mixed, right]], ["chair", "sofa"])
    assert table.loc[0, ["AP", "AP50", "AP25", "objects", "predictions"]].tolist() == [100, 100, 100, 1, 3]
    twice = instance_ap([scene], [[right, LabeledInstance(right.indices, "chair", 0.9)]], ["chair"])
    # the surer one counts, the other is a false positive behind it: (1/2, 1), (1, 1), (1, 0)
    assert np.isclose(twice["AP"][0], 100 * (0.5 * 0 + 1 * 0.5 + 1 * 0.5))
    assert instance_ap([scene], [[small]], ["chair"])["AP"][0] == 0
    summary = ap_summary(table, {"head": ["chair"], "tail": ["sofa"]}).set_index("group")
    assert summary["AP"].tolist()[:2] == [100, 100] and np.isnan(summary["AP"]["tail"])
    assert summary["classes"].tolist() == [1, 1, 0]
    with pytest.raises(ValueError, match="1 scenes, but predictions of 2"):
        instance_ap([scene], [[], []], ["chair"])


def test_scores_of_scannet200_have_its_groups():
    class Model(Fixed):
        def zero_shot_classifier(self, labels, templates=()):
            rows = torch.zeros(len(labels), 4)
            for number, name in NAMES.items():
                rows[labels.index(name), number] = 1
            return rows

    table = instance_scores(Model(), {"room": room()}, instance_labels("scannet200"), "instances").set_index(
        "group"
    )
    assert table.loc["all", ["N", "AP", "classes"]].tolist() == [3, 100, 3]
    assert table["classes"][:4].to_dict() == {"all": 3, "head": 3, "common": 0, "tail": 0}
    assert table["N"]["left out: objects below 100 points"] == 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"annotations": "a.json"}, "annotations needs scans"),
        ({"labels": "scannet20"}, "labels needs scans"),
        ({"scans": "s"}, "grounding in scans needs annotations"),
        ({"scans": "s", "scene": "x", "annotations": "a"}, "scene and scans are both given"),
        ({"protocols": "panoptic"}, "panoptic"),
    ],
)
def test_settings_of_the_job(values, words):
    with pytest.raises(ValueError, match=words):
        SceneQueryConfig(**values)


def test_a_missing_label_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no scannetv2-labels.combined.tsv in or above it"):
        find_label_map(tmp_path, "scannet200")
    (label_file(tmp_path) / "scans").mkdir()
    assert find_label_map(tmp_path / "scans", "scannet200")["office chair"] == "office chair"
    (tmp_path / LABEL_FILE).write_text("raw\tclass\n")
    with pytest.raises(ValueError, match="no column id, raw_category, nyu40class"):
        find_label_map(tmp_path, "scannet20")


def test_the_job_on_scans_with_scanrefer_and_on_rooms(tmp_path):
    "One command each: a folder of scans with a file of ScanRefer, and furnished rooms."
    scans = label_file(tmp_path / "scans") if (tmp_path / "scans").mkdir() is None else None
    scene = room()
    np.savez(
        scans / "scene0000_00.npz",
        points=scene.points,
        instance=scene.instance,
        names=list(NAMES.values()),
        up="z",
    )
    annotations = scanrefer(tmp_path / "ScanRefer_filtered_val.json")
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def job(out, **parameters):
        command = [
            sys.executable,
            "-m",
            "papermill",
            "--no-progress-bar",
            str(ROOT / "nbs/scene_query.ipynb"),
        ]
        command.append(str(tmp_path / f"{out}.ipynb"))
        for name, value in (parameters | {"out": str(tmp_path / out), "ask": "a chair"}).items():
            command += ["-p", name, str(value)]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-2000:]
        tables = ("grounding", "recognition", "instances")
        return {name: pd.read_csv(tmp_path / out / f"{name}.csv").set_index("group") for name in tables}

    tables = job("scans_out", scans=scans, annotations=annotations, labels="scannet20", proposals="instances")
    assert (
        tables["grounding"]["N"]["all"] == 4
        and tables["grounding"]["N"]["left out: of scans that are not there"] == 1
    )
    assert set(tables["grounding"].index) >= {"unique", "multiple"}
    assert tables["recognition"]["N"].to_dict() == {
        "model": 3,
        "chance": 3,
        "left out: below 10 points": 1,
    }
    assert tables["instances"]["N"]["all"] == 3 and tables["recognition"]["classes"].iloc[0] == 18
    for table in tables.values():
        assert not table[list(CONDITIONS)].isna().any().any()
        assert set(table["color"]) == {"gray"}  # the scan has no colors
        assert table["file"].str.startswith("sha256:").all() and set(table["templates"]) == {"{} | a {}. (2)"}
    tables = job("rooms_out", rooms=1, views="full", queries="names", proposals="instances")
    assert tables["grounding"]["Acc@0.25"]["all"] > tables["grounding"]["chance@0.25"]["all"]
