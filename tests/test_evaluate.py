"""Evaluation: known answers, the protocol in every row, no selection on test rows, names of models, probes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from published_layouts import write_layout
from safetensors.torch import load_file, save_file
from torch import nn

import cg3d
from cg3d.core.atomic import file_hash
from cg3d.core.errors import InputError, MissingFile
from cg3d.data.furniture import furniture
from cg3d.evaluation.calibration import (
    Questions,
    ask_questions,
    calibrate,
    expected_calibration_error,
    fit_calibration,
    judge_calibration,
    reliability_table,
)
from cg3d.evaluation.comparison import (
    Protocol,
    compare_models,
    comparison_table,
    label_list,
    open_model,
    predict,
)
from cg3d.evaluation.conditions import CONDITIONS, conditions, file_mark, weights_mark
from cg3d.evaluation.embedding_benchmark import (
    evaluate_points,
    evaluate_towers,
    scored_categories,
    scored_rows,
)
from cg3d.evaluation.linear_probe import ViewEncoder, few_shot, linear_probe
from cg3d.evaluation.robustness import (
    corrupted_clouds,
    corruption_list,
    read_reference,
    robustness,
    robustness_summary,
)
from cg3d.evaluation.transfer import transfer_study
from cg3d.evaluation.zero_shot import (
    ENCODER,
    IMAGE_TOWER,
    MAJORITY,
    PROMPTED_TOWER,
    TEMPLATE_SETS,
    accuracy_table,
    confusion_table,
    parse_templates,
    published_templates,
    zero_shot,
    zero_shot_weights,
)
from cg3d.geometry.corruptions import CORRUPTIONS, LEVELS
from cg3d.io.collection import Collection, Packed, write_collection
from cg3d.models.calibration import Calibration
from cg3d.models.cg3d import CG3D
from cg3d.models.registry import create_encoder
from cg3d.pretrained.loading import load_published
from cg3d.search.retrieval import retrieval_scores
from cg3d.training.finetune import FineTuneConfig
from cg3d.training.init import InitialWeights

ROOT = Path(__file__).parent.parent
LABELS = ["ball", "cone", "cube", "disc"]
TRUE_LABELS = [0, 0, 0, 1, 1, 2, 3, 3, 3, 3]  # of the test rows
PROTOCOL_COLUMNS = ["templates", "text", "points", "up", "color", "seen", "views", "file", "weights"]


def toys(truth=TRUE_LABELS, splits=("train", "val", "test"), points=128, colored=True, names=LABELS):
    """Clouds whose color encodes the label: red channel (label + 1) / 10."""
    random, targets = np.random.default_rng(0), list(truth) * len(splits)
    n = len(targets)
    colors = np.repeat((np.array(targets)[:, None, None] + 1) * 25, points, 1).repeat(3, 2).astype(np.uint8)
    arrays = {
        "points": random.integers(-20000, 20000, (n, points, 3)).astype(np.int16),
        "colors": colors,
        "has_color": np.full(n, colored),
    }
    words = [names[i] for i in targets]
    table = pd.DataFrame(
        {
            "name": words,
            "category": words,
            "id": [f"s{i}" for i in range(n)],
            "split": np.repeat(splits, len(truth)),
        }
    )
    return Collection(table, Packed(None, n, arrays), np.arange(n))


@pytest.fixture(scope="module")
def untrained():
    torch.manual_seed(0)
    return CG3D.build(encoder="pointnet", clip="nano", clip_weights="random", points=64).eval()


class KnownAnswers:
    """A model with given predictions (label -> prediction). It wraps a real one for the towers and counts clouds."""

    def __init__(self, model, answers, labels=LABELS, templates="own"):
        self.model, self.answers, self.seen = model, torch.tensor(answers), 0
        self.words = zero_shot_weights(model.prompts, labels, parse_templates(templates))

    def __getattr__(self, name):
        return getattr(self.model, name)

    def encode_shape(self, points):
        self.seen += len(points)
        return self.words[self.answers[(points[:, 0, 3] * 10.2).round().long() - 1]]


def test_known_answers(untrained):
    perfect = predict(KnownAnswers(untrained, [0, 1, 2, 3]), toys(), LABELS).table.set_index("method")
    assert perfect.loc[ENCODER, ["top1", "top3", "mean_class"]].tolist() == [100, 100, 100] and perfect.loc[
        ENCODER, ["shapes", "classes"]
    ].tolist() == [10, 4]
    assert perfect.loc[MAJORITY, ["top1", "top3", "mean_class"]].tolist() == [
        40,
        90,
        25,
    ]  # disc 4 of 10, then ball 3, cone 2
    # the cube is predicted as disc, discs as balls: 5 of 10 correct, classes 1, 1, 0, 0
    one = predict(KnownAnswers(untrained, [0, 1, 3, 0]), toys(), LABELS)
    assert one.table.set_index("method").loc[ENCODER, ["top1", "mean_class"]].tolist() == [50, 50]
    table = one.per_class.set_index("label")
    assert table["shapes"].to_dict() == {"ball": 3, "cone": 2, "cube": 1, "disc": 4} and table[
        "top1"
    ].to_dict() == {"ball": 100, "cone": 100, "cube": 0, "disc": 0}
    assert (
        table.loc["cube", "taken for"] == "disc"
        and table.loc["disc", "taken for"] == "ball"
        and table.loc["ball", "taken for"] == ""
    )
    counts = confusion_table(one.scores[ENCODER], one.target, LABELS)
    assert (
        counts.loc["disc", "ball"] == 4
        and counts.loc["cube", "disc"] == 1
        and counts.to_numpy().sum() == 10
        and np.trace(counts.to_numpy()) == 5
    )
    predictions = one.predictions
    assert (
        predictions["true"].tolist() == [LABELS[i] for i in TRUE_LABELS]
        and (predictions["first"] == predictions["true"]).sum() == 5
        and predictions["id"].tolist() == [f"s{i}" for i in range(20, 30)]
    )


def test_accuracies_by_hand():
    scores = torch.tensor(
        [
            [0.9, 0.5, 0.4, 0.3, 0.2, 0.1],
            [0.5, 0.9, 0.4, 0.3, 0.2, 0.1],
            [0.9, 0.8, 0.7, 0.6, 0.5, 0.4],
            [0.1, 0.2, 0.3, 0.4, 0.5, 0.6],
        ]
    )
    row = accuracy_table({"x": scores}, torch.tensor([0, 0, 4, 0])).iloc[0]  # ranks 1, 2, 5, 6
    assert (row["top1"], row["top3"], row["top5"]) == (25, 50, 75) and row["mean_class"] == pytest.approx(
        100 / 6, abs=0.01
    )  # label 0: 1 of 3, label 4: 0 of 1


def test_corruption_errors_by_hand():
    "Errors in percent: reference 10 clean, 20 and 50 corrupted; model 20 clean, 30 and 45 corrupted."

    def rows(model, clean, jitter, rotate):
        records = [("clean", 0, clean)]
        records += [("jitter", level, jitter + 2 * (3 - level)) for level in LEVELS]
        records += [("rotate", level, rotate) for level in LEVELS]
        table = pd.DataFrame(records, columns=["corruption", "level", "top1"])
        protocol = {"data": "set", "split": "test", "shapes": 10, "classes": 4, "seed": 0}
        return table.assign(model=model, templates="own", normalize_text=True, **protocol)

    table = pd.concat([rows("reference", 90, 80, 50), rows("model", 80, 70, 55)])
    summary = robustness_summary(table).set_index("model")
    assert summary.loc["reference", ["mCE", "RmCE"]].tolist() == [1, 1]
    assert summary.loc["model", "mCE"] == pytest.approx((30 / 20 + 45 / 50) / 2)
    assert summary.loc["model", "RmCE"] == pytest.approx((10 / 10 + 25 / 40) / 2, abs=1e-3)
    assert summary.loc["model", ["clean", "jitter", "rotate"]].tolist() == [80, 70, 55]
    assert set(summary["reference"]) == {"reference"}


def test_robustness_has_every_corruption_and_level(untrained):
    table = robustness({"a": untrained}, {"toys": toys()}, corruption_list("all"), labels=LABELS)
    counts = table["corruption"].value_counts()
    assert set(counts.index) == {"clean", "one_sided", *CORRUPTIONS} and counts["clean"] == 1
    assert all(
        table.loc[table["corruption"] == kind, "level"].tolist() == list(LEVELS) for kind in CORRUPTIONS
    )
    assert set(table["shapes"]) == {10} and set(table["classes"]) == {4} and not table.isna().any().any()
    again = robustness({"a": untrained}, {"toys": toys()}, corruption_list("jitter"), labels=LABELS)
    both = table["corruption"].isin(["clean", "jitter"])
    assert again["top1"].tolist() == table.loc[both, "top1"].tolist()
    assert robustness_summary(table)["mCE"].item() == 1


def test_the_reference_of_errors_is_an_earlier_run_under_the_same_protocol(untrained, tmp_path):
    options = {"kinds": ("jitter",), "labels": LABELS}
    table = robustness({"old": untrained}, {"toys": toys()}, **options)
    table.to_csv(tmp_path / "corruptions.csv", index=False)
    earlier = read_reference(str(tmp_path))
    assert robustness_summary(table.assign(model="new", top1=100), earlier)[["mCE", "reference"]].iloc[
        0
    ].tolist() == [0, "old"]
    for changed in (
        table.assign(seed=1),
        table.assign(templates="single"),
        table.assign(corruption="rotate"),
    ):
        with pytest.raises(InputError, match="the reference has no accuracy"):
            robustness_summary(changed, earlier)
    stored = read_reference("nano-0.1.0")
    assert robustness_summary(stored, stored)[["clean", "mCE", "RmCE"]].iloc[0].tolist() == [56, 1, 1]
    assert len(stored) == 37 and read_reference("") is None
    with pytest.raises(MissingFile, match="evaluate the reference first"):
        read_reference(str(tmp_path / "gone"))


def test_clouds_are_reduced_before_they_are_corrupted():
    points = torch.rand(2, 2048, 6)
    assert corrupted_clouds(points, "drop_global", 5).shape[1] == 256
    assert corrupted_clouds(points, "add_global", 1).shape[1] == 1034
    clean = corrupted_clouds(points, "clean")
    assert clean.shape == (2, 1024, 6) and len(torch.cat([points[0], clean[0]]).unique(dim=0)) == 2048


def test_reliability_of_predictions(untrained):
    result = predict(untrained, toys(), LABELS)
    table = result.reliability(5)
    confidence = (untrained.logit_scale * result.scores[ENCODER]).softmax(-1).amax(-1)
    assert table["answers"].sum() == 10 and table["low"].between(0, 0.8).all()
    mean = (table["confidence"] * table["answers"]).sum() / 10
    assert mean == pytest.approx(confidence.mean().item(), abs=1e-6)
    right = (table["accuracy"] * table["answers"]).sum() / 10
    assert 100 * right == pytest.approx(result.table["top1"][0], abs=1e-6)


def test_one_table_of_models_sets_and_protocols(untrained, tmp_path):
    other = CG3D.build(
        encoder="pointnet",
        clip="nano",
        clip_weights="random",
        points=256,
        in_channels=3,
        visual_prompt="shallow",
    ).eval()
    sets = {"toys": toys(), "gray": toys(colored=False)}
    answers = compare_models(
        {"a": untrained, "b": other},
        sets,
        [Protocol(), Protocol("single", normalize_text=False, one_sided=True, seed=3, views=2)],
        labels=LABELS,
    )
    comparison_table(answers).to_csv(tmp_path / "results.csv", index=False)
    table = pd.read_csv(tmp_path / "results.csv")
    assert len(answers) == 8 and not table.isna().any().any()  # nothing about a number is left empty
    assert table.groupby("data")["method"].apply(lambda column: (column == MAJORITY).sum()).to_dict() == {
        "toys": 1,
        "gray": 1,
    }
    for method in (ENCODER, IMAGE_TOWER):
        assert (table["method"] == method).sum() == 8
    assert set(table["split"]) == {"test"} and set(table["shapes"]) == {10} and set(table["classes"]) == {4}
    row = table.set_index(["model", "data", "templates", "method"]).sort_index()
    assert row.loc[("a", "toys", "own (16)", ENCODER), PROTOCOL_COLUMNS[1:]].tolist() == [
        "normalized",
        "64 of 128",
        "y",
        "colored",
        "whole",
        0,
        "-",
        weights_mark(untrained),
    ]
    assert row.loc[("a", "toys", "single (1)", ENCODER), PROTOCOL_COLUMNS[1:]].tolist() == [
        "as it is",
        "64 of 128",
        "y",
        "colored",
        "one side (seed 3)",
        0,
        "-",
        weights_mark(untrained),
    ]
    assert weights_mark(untrained) == f"sha256:{untrained.fingerprint()[:12]}" != weights_mark(other)
    assert row.loc[("a", "toys", "single (1)", IMAGE_TOWER), PROTOCOL_COLUMNS[1:]].tolist() == [
        "as it is",
        "128 of 128",
        "y",
        "colored",
        "whole",
        2,
        "-",
        weights_mark(untrained.backbone),
    ]
    assert (
        row.loc[("b", "toys", "own (16)", ENCODER), "color"] == "none"
        and row.loc[("b", "toys", "own (16)", ENCODER), "points"] == "256 of 128, repeated"
    )
    assert row.loc[("a", "gray", "own (16)", ENCODER), "color"] == "gray"
    prompted = row.loc[
        ("b", "toys", "own (16)", PROMPTED_TOWER)
    ]  # its prompts are the model's, it sees colors
    assert prompted[["color", "weights"]].tolist() == ["colored", weights_mark(other)]
    same = compare_models({"a": untrained}, {"toys": toys()}, labels=LABELS)[0]
    assert torch.equal(same.scores[ENCODER], answers[0].scores[ENCODER])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "A model that was opened from a file."
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved")
    CG3D.build(encoder="pointnet", clip="nano", points=64).save(folder)
    return cg3d.load(folder, device="cpu")


STUDY = FineTuneConfig(
    start="a",
    mode="head",
    fractions="1",
    seeds=1,
    head_epochs=1,
    min_steps=1,
    points=64,
    device="cpu",
    labels=", ".join(LABELS),
)
TABLES = {  # name -> table of a model and a whole set
    "zero_shot": lambda model, data: zero_shot(model, data.select(split="test"), LABELS),
    "comparison": lambda model, data: predict(model, data, LABELS).table,
    "per_class": lambda model, data: predict(model, data, LABELS).per_class,
    "predictions": lambda model, data: predict(model, data, LABELS).predictions,
    "robustness": lambda model, data: robustness({"a": model}, {"toys": data}, ["jitter"], labels=LABELS),
    "robustness_summary": lambda model, data: robustness_summary(TABLES["robustness"](model, data)),
    "linear_probe": lambda model, data: linear_probe(
        model, data.select(split="train"), data.select(split="test"), penalties=[1.0], folds=2
    ),
    "few_shot": lambda model, data: few_shot(
        model, data.select(split="train"), data.select(split="test"), shots=(1,), seeds=1
    ),
    "evaluate_towers": lambda model, data: evaluate_towers(model.backbone, data, views=1),
    "evaluate_points": lambda model, data: evaluate_points(model, data),
    "calibrate": lambda model, data: calibrate(model, data, "test")[1],
    "retrieval": lambda model, data: retrieval_scores(model, data.select(split="test"), "text -> shape"),
    "transfer_study": lambda model, data: (
        transfer_study(
            STUDY, data, None, {"a": InitialWeights("a", model.encoder, 64, model)}, progress=False
        ).results
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_every_table_states_the_conditions(saved, name, tmp_path, monkeypatch):
    monkeypatch.setenv("CG3D_CACHE", str(tmp_path))
    data = toys([0, 0, 1, 1, 2, 2, 3, 3], splits=("train", "test"))
    data.table["caption"] = data.table["category"]
    table = TABLES[name](saved, data)
    assert not table[list(CONDITIONS)].isna().any().any() and set(table["split"]) == {"test"}
    measured = conditions(saved.backbone if name == "evaluate_towers" else saved, data)
    rows = table[table["weights"] == measured["weights"]]
    for column in ("up", "color", "file"):
        assert set(rows[column]) == {measured[column]} != {"-"}, column
    others = table[table["weights"] != measured["weights"]]
    assert others.empty or set(others["weights"]) <= {"-", weights_mark(saved.backbone)}
    counts = {"shapes", "questions", "queries", "test", "true"}  # N, or one row a shape
    assert counts & set(table.columns) and set(table["templates"]) != {"-"}


def test_marks_follow_file_and_weights(saved, tmp_path):
    saved.save(tmp_path, half=True)
    copy = cg3d.load(tmp_path, device="cpu")
    assert file_mark(copy) == f"sha256:{file_hash(tmp_path / 'model.safetensors')[:12]}" != file_mark(saved)
    before = weights_mark(copy), weights_mark(copy.encoder)
    with torch.no_grad():
        next(copy.encoder.parameters()).add_(1)
    assert before[0] != weights_mark(copy) and before[1] != weights_mark(copy.encoder)
    assert file_mark(saved.backbone) == f"sha256:{file_hash(saved.backbone.weights_file)[:12]}"
    (tmp_path / "model.safetensors").unlink()
    assert file_mark(copy) == file_mark(copy.encoder) == file_mark(object()) == weights_mark(object()) == "-"


def test_the_table_needs_results():
    with pytest.raises(ValueError, match="no results"):
        comparison_table([])


@pytest.mark.parametrize(
    "split,choose_on",
    [
        ("test", "test"),
        ("test", "all"),
        ("val", "val"),
        ("all", "val"),
        ("val", "test"),
        ("val", "Test"),
        ("val", "test_unseen"),
        ("train", "testing"),
    ],
)
def test_nothing_is_selected_on_evaluated_or_test_rows(untrained, split, choose_on):
    with pytest.raises(ValueError, match=f"choose_on='{choose_on}' would choose"):
        compare_models(
            {"a": untrained},
            {"toys": toys()},
            [Protocol(), Protocol("single")],
            split,
            LABELS,
            choose_on=choose_on,
        )


def test_the_selection_uses_validation_rows_alone(untrained):
    """Good on validation, bad on test is selected over the reverse; the other gets no test row."""
    good, bad = KnownAnswers(untrained, [0, 1, 2, 3]), KnownAnswers(untrained, [1, 2, 3, 0])
    shapes = toys()
    swapped = (
        shapes.table["split"].eq("test").to_numpy()
    )  # on test rows the labels are turned, so that `bad` is right there
    shapes.table.loc[swapped, "category"] = [
        LABELS[(LABELS.index(word) + 1) % 4] for word in shapes.table.loc[swapped, "category"]
    ]
    (one,) = compare_models({"bad": bad, "good": good}, {"toys": shapes}, labels=LABELS, choose_on="val")
    assert one.model == "good" and one.table["top1"].iloc[0] == 0 and (good.seen, bad.seen) == (20, 10)
    assert set(comparison_table([one]).loc[lambda table: table["method"] == ENCODER, "chosen on"]) == {"val"}


class Lengths(nn.Module):
    """Text vectors of very different lengths."""

    def encode_text(self, texts):
        return torch.stack(
            [
                {
                    "a p": torch.tensor([3.0, 0.0]),
                    "the p": torch.tensor([0.0, 1.0]),
                    "a q": torch.tensor([0.0, 2.0]),
                    "the q": torch.tensor([0.0, 2.0]),
                }[text]
                for text in texts
            ]
        )


def test_normalized_text_and_the_official_protocol():
    whole = zero_shot_weights(Lengths(), ["p", "q"], ["a {}", "the {}"])
    raw = zero_shot_weights(Lengths(), ["p", "q"], ["a {}", "the {}"], normalize=False)
    assert torch.allclose(whole, torch.tensor([[0.5**0.5, 0.5**0.5], [0, 1]])) and torch.equal(
        raw, torch.tensor([[1.5, 0.5], [0, 2]])
    )
    shape = F.normalize(torch.tensor([0.6, 0.8]), dim=0)
    assert (shape @ whole.T).argmax() == 0 and (shape @ raw.T).argmax() == 1  # the same shape, another answer


def test_template_sets():
    assert {name: len(sentences) for name, sentences in TEMPLATE_SETS.items()} == {
        "own": 16,
        "single": 1,
        "cg3d63": 63,
        "ulip64": 64,
    }
    for sentences in TEMPLATE_SETS.values():
        assert len(set(sentences)) == len(sentences) and all(
            sentence.count("{}") == 1 for sentence in sentences
        )
    assert TEMPLATE_SETS["ulip64"] == ("a point cloud model of {}.", *published_templates(False)) and not any(
        "point cloud" in sentence for sentence in TEMPLATE_SETS["cg3d63"]
    )
    assert parse_templates("a {} | the {}") == ("a {}", "the {}")
    with pytest.raises(ValueError, match="own, single, cg3d63, ulip64"):
        Protocol("ulip63")
    with pytest.raises(ValueError, match="views=0"):
        Protocol(views=0)


@pytest.mark.parametrize(
    "options,error,words",
    [
        (dict(split="exam"), ValueError, "split='exam'; there are test, train, val"),
        (dict(labels=["chair"]), ValueError, "no shape has|at least two"),
        (dict(labels=["ball"]), ValueError, "at least two labels"),
        (dict(labels=["ball", "ball"]), ValueError, "given 2 times"),
        (dict(labels=["ball", " "]), ValueError, "blank"),
        (dict(labels="ball"), TypeError, "single string"),
        (dict(labels=["sofa", "bed"]), ValueError, "no shape has one of the 2 labels"),
        (dict(column="kind"), ValueError, "no column 'kind'"),
        (dict(min_shapes=1000), ValueError, "lower min_shapes"),
        (dict(protocols=[]), ValueError, "at least one"),
    ],
)
def test_wrong_arguments(untrained, options, error, words):
    with pytest.raises(error, match=words):
        compare_models({"a": untrained}, {"toys": toys()}, **options)


def test_labels_are_the_given_the_official_or_the_frequent():
    assert label_list(toys(), ["disc", "ball"]) == ["disc", "ball"] and label_list(toys(), min_shapes=6) == [
        "ball",
        "cone",
        "disc",
    ]
    listed = toys()
    listed.labels = ["disc", "sofa", "ball"]
    assert label_list(listed) == ["disc", "sofa", "ball"]


def test_names_of_models(untrained, tmp_path, monkeypatch):
    assert open_model("nano").config.points == 1024
    monkeypatch.chdir(tmp_path)
    tiny = CG3D.build(encoder="pointnet", clip="nano", points=64).eval()
    tiny.save(tmp_path / "runs" / "mine")
    for name in ("mine", str(tmp_path / "runs" / "mine")):
        assert torch.allclose(
            open_model(name).encode_shape(toys().points([0])),
            tiny.encode_shape(toys().points([0])),
            atol=1e-3,
        )
    run = tmp_path / "runs" / "mine"
    whole, state = (run / "model.safetensors").read_bytes(), load_file(run / "model.safetensors")
    name = sorted(state)[0]
    save_file({key: value for key, value in state.items() if key != name}, run / "model.safetensors")
    with pytest.raises(ValueError, match=f"missing: {name}"):
        open_model("mine")
    save_file(state | {"encoder.more": torch.ones(1)}, run / "model.safetensors")
    with pytest.raises(ValueError, match="unknown: encoder.more"):
        open_model("mine")
    (run / "model.safetensors").write_bytes(whole[:1000])
    with pytest.raises(ValueError, match="cannot be read|damaged"):
        open_model("mine")
    (run / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors is not there"):
        open_model("mine")
    (run / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json is not there"):
        open_model(str(run))
    with pytest.raises(FileNotFoundError, match="no model 'runs/nobody'|nobody"):
        open_model("nobody")
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_model("./no/such.pt")


def test_published_weights_are_evaluated_under_their_contract(tmp_path):
    file = write_layout(tmp_path / "ulip.pt", "ulip/pointmlp", small_towers=True)
    model = open_model(str(file))
    assert model.report.family == "ulip"
    few = toys([0, 1], splits=("test",), points=model.contract.points // 2)
    answer = predict(model, few, LABELS, Protocol("single"))
    row = answer.table.iloc[0]
    assert (
        row["points"] == f"{model.contract.points} of {model.contract.points // 2}, repeated"
        and row["color"] == "none"
        and row["up"] == ("z" if model.contract.swap_yz else "y")
        and row["file"] == f"sha256:{file_hash(file)[:12]}"
    )
    assert answer.table["method"].tolist()[:3] == [ENCODER, MAJORITY, IMAGE_TOWER]
    with pytest.raises(ValueError, match="reads clouds of"):
        model.encoder(few.points())
    assert open_model(f"{file}?points=512").contract.points == 512
    with pytest.raises(ValueError, match="points=many is no number"):
        open_model(f"{file}?points=many")
    with pytest.raises(ValueError, match="no setting 'pints'"):
        open_model(f"{file}?pints=512")
    with pytest.raises(ValueError, match="name=value"):
        open_model(f"{file}?points")
    with pytest.raises((ValueError, TypeError), match="uni3d"):
        open_model(f"{file}?family=uni3d")
    start, probed = load_published(file, points=512), toys([0, 1] * 3, points=512)
    table = linear_probe(
        start, probed.select(split="train"), probed.select(split="test"), cache=tmp_path / "features"
    )
    assert table[["train", "test", "classes", "dim"]].iloc[0].tolist() == [6, 6, 2, start.encoder.dim]


class Color(nn.Module):
    """One-hot vector of the color, which encodes the label."""

    def forward(self, points):
        return F.one_hot((points[:, 0, 3] * 10.2).round().long(), 6).float() + 0.5


def test_labels_with_fewer_examples_than_shots(tmp_path):
    train, test = toys([0] * 6 + [1] * 6 + [2] * 3, splits=("train",)), toys([0, 1, 2], splits=("test",))
    options = dict(seeds=3, points=64, cache=tmp_path)
    table = few_shot(Color(), train, test.select(category=["ball", "cone"]), shots=(1, 4), **options)
    assert table["classes"].tolist() == [2, 2] and table["short"].tolist() == [
        0,
        0,
    ]  # the cube, which has three, is left out
    with pytest.raises(ValueError, match="'cube' has 3.*allow_fewer"):
        few_shot(Color(), train, test, LABELS[:3], shots=(1, 4), **options)
    table = few_shot(Color(), train, test, allow_fewer=True, shots=(1, 3, 4, 8), **options)
    assert (
        table["short"].tolist() == [0, 0, 1, 3]
        and table["classes"].tolist() == [3] * 4
        and table["accuracy"].tolist() == [100] * 4
        and table["deviation"].tolist() == [0] * 4
    )


def test_the_image_tower_is_evaluated_as_an_encoder(untrained, tmp_path):
    eye, two = ViewEncoder(untrained.backbone), ViewEncoder(untrained.backbone, 2)
    clouds = toys([0, 1], splits=("test",)).points()
    assert eye(clouds).shape == two(clouds).shape == (2, untrained.backbone.dim) and not torch.allclose(
        eye(clouds), two(clouds)
    )
    assert torch.allclose(
        eye(clouds)[1:], eye(clouds[1:]), atol=1e-5
    )  # one shape's features do not depend on its neighbors
    shapes = toys([0, 1] * 4, splits=("train", "test"))
    assert (
        linear_probe(
            eye, *(shapes.select(split=split) for split in ("train", "test")), points=128, cache=tmp_path
        )["dim"][0]
        == untrained.backbone.dim
    )


def test_an_untrained_encoder_is_between_chance_and_the_trained_one(tmp_path):
    labels = ["chair", "table", "person", "lamp"]
    train, test = (furniture().select(split=split, category=labels) for split in ("train", "test"))
    torch.manual_seed(0)
    options = {"points": 64, "cache": tmp_path}
    untrained = linear_probe(create_encoder("pointnet", dim=32), train, test, labels, **options).iloc[0]
    trained = linear_probe(cg3d.load("nano", device="cpu"), train, test, labels, **options).iloc[0]
    majority = 100 * test.table["category"].value_counts(normalize=True).max()
    assert untrained["classes"] == trained["classes"] == 4
    assert 25 < untrained["mean_class"] < trained["mean_class"]
    assert untrained["accuracy"] < trained["accuracy"] and trained["accuracy"] > majority


class Unmovable(Color):
    """An encoder that must stay on its device."""

    dim = 6

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def _apply(self, *arguments, **options):
        raise AssertionError("the encoder of the caller was moved")


def test_the_encoder_of_the_caller_is_not_moved(tmp_path):
    train, test = toys([0, 1, 2, 3] * 4, splits=("train",)), toys([0, 1, 2, 3], splits=("test",))
    encoder = Unmovable()
    assert linear_probe(encoder, train, test, points=64, cache=tmp_path)["accuracy"][0] == 100
    assert (
        few_shot(encoder, train, test, shots=(1,), seeds=1, points=64, cache=tmp_path)["accuracy"][0] == 100
    )


class ColorTower(nn.Module):
    """An image-text model with known answers: the darkest pixel of a view, which has half of the color, encodes the label."""

    def __init__(self, shift=0):
        super().__init__()
        self.shift = shift  # added to the label of a picture

    def encode_text(self, texts):
        return torch.stack([F.one_hot(torch.tensor(LABELS.index(text[2:])), 4).float() for text in texts])

    def encode_image(self, images):
        darkest = images.flatten(1).amin(1)
        return F.one_hot(((darkest * 20.4).round().long() - 1 + self.shift) % 4, 4).float()


@pytest.mark.parametrize("shift,top1,mean_class", [(0, 100, 100), (1, 0, 0)])
def test_towers_with_known_answers(shift, top1, mean_class):
    shapes = toys(points=512)
    shapes.table["judged"] = 1
    table = evaluate_towers(ColorTower(shift), shapes, views=2).set_index("measure")
    assert table.loc["one view -> noun, top-1 %", "value"] == top1
    assert table.loc["one view -> noun, mean class %", "value"] == mean_class
    assert table["questions"].tolist() == [10] * 3 and table["candidates"].tolist() == [4] * 3


def test_only_proof_read_rows_are_scored():
    shapes = toys()
    shapes.table["judged"] = (shapes.table["category"] != "disc").astype(int)
    assert scored_categories(shapes) == ["ball", "cone", "cube"]
    selected, target = scored_rows(shapes.select(split="test"), scored_categories(shapes))
    assert int(selected.sum()) == 6 and target.tolist() == [0, 0, 0, 1, 1, 2]


def test_the_job_evaluates_several_and_writes_all(tmp_path):
    """Two models, two data sets and two template sets: eight pictures, one table."""
    CG3D.build(encoder="pointnet", clip="nano", points=64).save(tmp_path / "run")
    write_collection(tmp_path / "toys", toys(), 128, toys().table[["category", "split"]])
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "cg3d.cli",
            "evaluate",
            "-p",
            "checkpoint",
            f"nano, {tmp_path / 'run'}",
            "-p",
            "data",
            f"{tmp_path / 'toys'}, {tmp_path / 'toys.npz'}",
            "-p",
            "min_shapes",
            "3",
            "-p",
            "templates",
            "single; a {} | the {}",
            "-p",
            "out",
            tmp_path / "out",
            "--notebook",
            tmp_path / "out.ipynb",
            "--json",
        ],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    table = pd.read_csv(tmp_path / "out" / "results.csv")
    assert (
        not table.isna().any().any()
        and len(table[table["method"] == ENCODER]) == 8
        and (table["method"] == MAJORITY).sum() == 2
        and set(PROTOCOL_COLUMNS) <= set(table.columns)
    )
    assert json.loads(done.stdout)["results"] == json.loads(table.to_json(orient="records"))
    assert len(list((tmp_path / "out" / "figures").glob("confusion*.png"))) == 8
    assert (
        len(pd.read_csv(tmp_path / "out" / "per_class.csv")) == 8 * 4
        and len(pd.read_csv(tmp_path / "out" / "predictions.csv")) == 8 * 10
    )


# calibration


def test_a_known_calibration_is_found_again():
    generator = torch.Generator().manual_seed(1)
    similarity, background = torch.randn(2, 20_000, 4, generator=generator) / 10
    similarity[:5000, 3] = background[::3, 0] = -torch.inf  # padding and synonyms
    truth = Calibration(15.0, -0.5)
    drawn = torch.multinomial(truth.logits(similarity, background).softmax(-1), 1, generator=generator)[:, 0]
    questions = Questions(similarity, background, torch.where(drawn == 4, -1, drawn))
    fitted = fit_calibration(questions)
    assert fitted.logit_scale == pytest.approx(15, rel=0.08) and fitted.none_bias == pytest.approx(
        -0.5, abs=0.15
    )
    assert judge_calibration(questions, fitted)["ECE"].item() < 0.02
    assert judge_calibration(questions, Calibration(60.0, -0.5))["ECE"].item() > 0.1


def test_reliability_by_hand():
    confidence, correct = torch.tensor([0.55, 0.58, 0.95, 1.0]), torch.tensor([True, False, True, False])
    table = reliability_table(confidence, correct)
    assert table["answers"].tolist() == [2, 2] and table["low"].tolist() == [0.5, 0.9]
    gap = (2 * abs(0.565 - 0.5) + 2 * abs(0.975 - 0.5)) / 4
    assert expected_calibration_error(table) == pytest.approx(gap, abs=1e-6)


def test_questions_offer_the_right_label_in_half_of_the_cases():
    weights = F.normalize(torch.randn(8, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    weights[1] = weights[0]  # a synonym
    questions = ask_questions(weights[[0, 5]], torch.tensor([0, 5]), weights, weights[:2], counts=(2, 4))
    assert questions.similarity.shape == (8, 4) and (questions.answer < 0).sum() == 4
    offered = questions.answer >= 0
    best = questions.similarity[offered].gather(1, questions.answer[offered, None])
    torch.testing.assert_close(best, torch.ones_like(best))
    assert questions.similarity[~offered].max() < 0.99, "neither the noun nor its synonym is offered"
    assert questions.background[:4][offered[:4]].eq(-torch.inf).all(), (
        "the background's synonyms are left out"
    )
