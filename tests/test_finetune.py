"""Fine-tuning, scarce labels, linear probe and few-shot: through modules, files and the job notebook."""

import ast
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from published_layouts import write_layout
from torch import nn

from cg3d.core.config import settings_from
from cg3d.core.errors import Diverged
from cg3d.evaluation.linear_probe import cached_features, few_shot, linear_probe
from cg3d.evaluation.transfer import paired_gain, split_examples, summarize_runs, transfer_study
from cg3d.io.collection import Collection, Packed, write_collection
from cg3d.models.registry import create_encoder
from cg3d.training.finetune import (
    Classifier,
    FineTuneConfig,
    features,
    fine_tune,
    load_classifier,
    resample_clouds,
)
from cg3d.training.init import (
    InitialWeights,
    check_test,
    examples,
    fresh_copy,
    hold_out,
    load_init,
    nested_subset,
    random_init,
    with_settings,
)

ROOT = Path(__file__).parent.parent
TINY = "point_transformer_small width=32 heads=2 depth=1 groups=8 neighbors=8"
LABELS = ("ball", "plate", "pole")


def toys(each=10, seed=0, labels=LABELS, split=None):
    """Balls, plates and poles: what tells them apart is their form alone."""
    random = np.random.default_rng(seed)
    stretch = {"ball": (1, 1, 1), "plate": (1, 0.1, 1), "pole": (0.1, 1, 0.1)}
    names = [label for label in labels for _ in range(each)]
    xyz = np.stack(
        [random.normal(size=(128, 3)) * stretch[name] * random.uniform(0.8, 1.2, 3) for name in names]
    )
    xyz -= xyz.mean(1, keepdims=True)
    xyz /= np.linalg.norm(xyz, axis=2).max(1)[:, None, None]
    arrays = {
        "points": np.rint(xyz * 32767).astype(np.int16),
        "colors": np.zeros((len(names), 128, 3), np.uint8),
        "has_color": np.zeros(len(names), bool),
    }
    table = pd.DataFrame({"name": names, "category": names, "split": split or "train"})
    return Collection(table, Packed(None, len(names), arrays), np.arange(len(names)), "toys")


def tiny(seed=0):
    torch.manual_seed(seed)
    return create_encoder(
        "point_transformer_small", dim=16, width=32, heads=2, depth=1, groups=8, neighbors=8
    ).eval()


class Spread(nn.Module):
    """Width, height and depth of a cloud: a foreign encoder that knows the toys by heart."""

    def forward(self, points):
        return points[..., :3].std(1)


CONFIG = FineTuneConfig(
    points=64,
    epochs=3,
    head_epochs=30,
    min_steps=12,
    batch_size=8,
    seeds=2,
    watch=1,
    fractions="0.3, 1",
    device="cpu",
)


@pytest.mark.parametrize(
    "name,value,error,words",
    [
        ("fractions", "0.1, 0", ValueError, "0.0 is no share"),
        ("fractions", "1.5", ValueError, "1.5 is no share"),
        ("fractions", "nan", ValueError, "nan is no share"),
        ("fractions", "", ValueError, "no share"),
        ("mode", "both", ValueError, "choose from head, full"),
        ("epochs", 0, ValueError, "at least 1"),
        ("epochs", "5", TypeError, "takes a int"),
        ("lr_head", float("nan"), ValueError, "must be at least"),
        ("holdout", 1.0, ValueError, "at most 0.9"),
        ("patience", 2, ValueError, "needs holdout"),
        ("start", "", ValueError, "start is empty"),
    ],
)
def test_wrong_settings(name, value, error, words):
    with pytest.raises(error, match=words):
        FineTuneConfig(**{name: value})


def test_unknown_setting_lists_the_known():
    with pytest.raises(ValueError, match="unknown parameter fraction; known are start, mode"):
        settings_from(FineTuneConfig, {"fraction": 0.1})


@pytest.mark.parametrize("seed", range(4))
def test_subsets_are_stratified_nested_and_seeded(seed):
    target = torch.tensor([0] * 40 + [1] * 7 + [2] * 2)[
        torch.randperm(49, generator=torch.Generator().manual_seed(9))
    ]
    shares = (0.01, 0.1, 0.2, 0.3, 0.5, 0.99, 1.0)
    drawn = [nested_subset(target, share, seed) for share in shares]
    for share, rows, more in zip(shares, drawn, drawn[1:] + [torch.arange(49)]):
        assert set(rows.tolist()) <= set(more.tolist()) and len(set(rows.tolist())) == len(rows)
        assert torch.bincount(target[rows], minlength=3).tolist() == [
            max(1, round(share * n)) for n in (40, 7, 2)
        ]
    assert len(drawn[-1]) == 49 and not torch.equal(drawn[1], nested_subset(target, 0.1, seed + 100))


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, float("nan"), float("inf")])
def test_a_fraction_outside_is_refused(fraction):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        nested_subset(torch.tensor([0, 1]), fraction)


def test_hold_out_leaves_every_label_something():
    target = torch.tensor([0] * 10 + [1] * 2 + [2])
    kept, held = hold_out(target, 0.25, 0)
    assert sorted(kept.tolist() + held.tolist()) == list(range(13)) and torch.bincount(
        target[held], minlength=3
    ).tolist() == [2, 1, 0]
    with pytest.raises(ValueError, match="nothing can be held out"):
        hold_out(torch.arange(3), 0.5)


def test_bad_labels():
    shapes = toys(4)
    with pytest.raises(ValueError, match="no column 'class' in the table; it has name, category, split"):
        examples(shapes, column="class")
    shapes.table["category"] = ["ball"] * 4 + [None] * 4 + ["pole"] * 3 + [" "]
    assert torch.bincount(examples(shapes).target).tolist() == [4, 3] and examples(shapes).labels == (
        "ball",
        "pole",
    )
    shapes.table["category"] = ""
    with pytest.raises(ValueError, match="at least two different labels"):
        examples(shapes)
    lonely = toys(2).select(np.array([True, True, True, True, True, False]))
    with pytest.raises(ValueError, match="'pole' has 1.*at least 2"):
        split_examples(lonely, replace(CONFIG, labels=", ".join(LABELS), test_share=0.5, start="scratch"))
    with pytest.raises(ValueError, match="'pole' has 1.*at least 2"):
        linear_probe(Spread(), lonely, lonely)
    with pytest.raises(ValueError, match="never saw: 'pole'"):
        check_test(["ball", "plate"], examples(toys()))
    with pytest.raises(ValueError, match="never saw: 'pole'"):
        linear_probe(Spread(), toys(labels=LABELS[:2]), toys())
    learned = fine_tune(Spread(), examples(toys(labels=LABELS[:2])), CONFIG, "head").classifier
    with pytest.raises(ValueError, match="never saw: 'pole'"):
        learned.score(examples(toys()))


def test_unknown_and_unfit_starts(tmp_path):
    with pytest.raises(ValueError, match="unknown start 'unicorn': it is neither nano nor scratch"):
        load_init("unicorn")
    with pytest.raises(TypeError, match="got str"):
        fine_tune("nano", examples(toys()), CONFIG)
    with pytest.raises(ValueError, match="another architecture than encoder='point_transformer_small'"):
        with_settings(tiny(), "point_transformer_small", "mine")
    Classifier(tiny(), LABELS, 64).save(tmp_path)
    with pytest.raises(ValueError, match="fine-tuned already"):
        load_init(str(tmp_path))
    with pytest.raises(ValueError, match="another architecture"):
        load_classifier(tmp_path, create_encoder("pointnet", dim=16))
    with pytest.raises(FileNotFoundError, match="classifier.json is not there"):
        load_classifier(tmp_path / "nowhere")


def test_scratch_is_the_same_architecture_with_other_weights():
    known = tiny(1)
    fresh = fresh_copy(known, 5)
    assert fresh.config == known.config and [v.shape for v in fresh.state_dict().values()] == [
        v.shape for v in known.state_dict().values()
    ]
    assert not any(
        torch.equal(a, b)
        for (name, a), b in zip(known.named_parameters(), fresh.parameters())
        if name.endswith("qkv.weight") or name == "projection.weight"
    )
    foreign = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    with torch.no_grad():
        foreign[1].weight.fill_(7)
    assert fresh_copy(foreign)[1].weight.tolist() == [1] * 4 and not torch.equal(
        fresh_copy(foreign)[0].weight, foreign[0].weight
    )


@pytest.mark.parametrize("mode", ["head", "full"])
def test_a_run_learns_and_leaves_its_start_alone(mode):
    encoder, train, test = tiny(), examples(toys(12)), examples(toys(8, seed=1))
    before = [value.clone() for value in encoder.state_dict().values()]
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    tuned = fine_tune(
        encoder, train, replace(CONFIG, min_steps=60, lr_encoder=1e-3, augment="none"), mode, watch=test
    )
    assert torch.equal(torch.rand(2), expected), "the caller's random state is left alone"
    assert all(torch.equal(a, b) for a, b in zip(before, encoder.state_dict().values()))
    same = all(torch.equal(a, b) for a, b in zip(before, tuned.classifier.encoder.state_dict().values()))
    assert same == (mode == "head")
    assert (
        tuned.classifier.score(test)["accuracy"] > 60
        and tuned.history["loss"].iloc[-1] < tuned.history["loss"].iloc[0]
    )
    assert tuned.history["test"].iloc[-1] == pytest.approx(tuned.classifier.score(test)["accuracy"])


def test_the_encoder_has_its_own_rate():
    train = examples(toys(8))
    still = fine_tune(
        tiny(), train, replace(CONFIG, lr_encoder=0.0, epochs=1, min_steps=1), "full"
    ).classifier
    assert torch.equal(still.encoder.projection.weight, tiny().projection.weight)
    slow, fast = (
        fine_tune(
            InitialWeights("scratch", tiny(), 64),
            train,
            replace(CONFIG, lr_encoder=1e-5, lr_scratch=rate, epochs=1, min_steps=1),
            "full",
        ).classifier.encoder.projection.weight
        - tiny().projection.weight
        for rate in (0.0, 1e-3)
    )
    assert 0 < slow.norm() < 0.1 * fast.norm()


def test_selection_sees_only_the_held_out_part_of_train():
    train, config = examples(toys(12)), replace(CONFIG, holdout=0.3, patience=3, epochs=8)
    wrong = examples(toys(8, seed=1))
    wrong = replace(wrong, target=(wrong.target + 1) % 3)
    one, other = (fine_tune(tiny(), train, config, "full", watch=watch) for watch in (None, wrong))
    assert one.best == other.best and all(
        torch.equal(a, b)
        for a, b in zip(one.classifier.state_dict().values(), other.classifier.state_dict().values())
    )
    assert (
        one.history["held_out"].max() == one.history["held_out"][one.best - 1]
        and len(one.history) <= one.best + 3
    )


def test_classifier_round_trip(tmp_path):
    made = fine_tune(tiny(), examples(toys()), CONFIG, "full").classifier
    made.save(tmp_path, start="tiny", accuracy=50.0)
    back, shapes = Classifier.load(tmp_path), [toys()[0], toys()[29]]
    pd.testing.assert_frame_equal(back.classify(shapes, top=2), made.classify(shapes, top=2))
    assert (
        back.labels == LABELS
        and not back.training
        and list(back.classify(shapes[0]).columns) == ["row", "shape", "label", "probability"]
    )
    assert back.classify(shapes[0])["probability"].sum() == pytest.approx(1, abs=1e-5)
    assert json.loads((tmp_path / "classifier.json").read_text())["notes"] == {
        "start": "tiny",
        "accuracy": 50.0,
    }
    with pytest.raises(ValueError, match="top=0"):
        back.classify(shapes, top=0)
    bad = torch.rand(1, 64, 6)
    bad[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        back.classify(bad)


def test_the_head_does_not_care_about_scale():
    class Loud(Spread):
        def forward(self, points):
            return 1e4 * super().forward(points) + 5e3

    scores = [
        fine_tune(encoder, examples(toys(12)), CONFIG, "head").classifier.score(examples(toys(8, seed=1)))[
            "accuracy"
        ]
        for encoder in (Spread(), Loud())
    ]
    assert min(scores) > 90


def test_study_pairs_resumes_and_sums_up(tmp_path):
    both = toys(20)
    both.table["split"] = (["train"] * 14 + ["test"] * 6) * 3
    starts = {"tiny": InitialWeights("tiny", tiny(), 64), "scratch": None}
    config = replace(CONFIG, start="tiny, scratch", mode="head+full", labels=", ".join(LABELS))
    found = transfer_study(config, both, tmp_path, starts, progress=False)
    assert (
        len(found.results) == 1 + 2 * 2 * 2 * 2
        and not found.results.isna().any().any()
        and list(found.results["start"][:1]) == ["majority class"]
    )
    assert found.results["accuracy"][0] == pytest.approx(100 / 3, abs=0.01)
    assert {"start", "labels", "seed", "accuracy", "mean_class", "epochs", "seconds"} <= set(found.results)
    assert set(found.results["shapes"][1:]) == {12, 42} and {"loss", "train", "test"} <= set(found.curves)
    table = summarize_runs(found.results)
    row = table[(table["start"] == "tiny") & (table["mode"] == "full") & (table["labels"] == 100)].iloc[0]
    mine = found.results.query("start == 'tiny' and mode == 'full' and labels == 100")["accuracy"]
    assert row["accuracy"] == pytest.approx(mine.mean(), abs=0.01) and row["deviation"] == pytest.approx(
        mine.std(), abs=0.01
    )
    differences = paired_gain(found.results, "tiny")
    assert differences["seeds"].tolist() == [2] * 4
    stamp = pd.read_csv(tmp_path / "results.csv")
    cut = stamp.iloc[:-3]
    cut.to_csv(tmp_path / "results.csv", index=False)
    again = transfer_study(replace(config, resume=True), both, tmp_path, starts, progress=False)
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "results.csv").drop(columns="seconds"), stamp.drop(columns="seconds")
    )
    assert len(again.results) == len(stamp)
    with pytest.raises(ValueError, match="batch_size was 8, is 4"):
        transfer_study(replace(config, resume=True, batch_size=4), both, tmp_path, starts, progress=False)


def test_probe_and_few_shot_on_a_known_answer(tmp_path):
    train, test = toys(20), toys(10, seed=1)
    row = linear_probe(Spread(), train, test, points=64, cache=tmp_path).iloc[0]
    assert (
        row["accuracy"] >= 95
        and row["C"] in (0.0001, 0.001, 0.01, 0.1, 1.0)
        and (row["train"], row["test"], row["classes"], row["dim"]) == (60, 30, 3, 3)
    )
    table = few_shot(Spread(), train, test, shots=(1, 2, 16), seeds=5, points=64, cache=tmp_path)
    assert (
        table["shots"].tolist() == [1, 2, 16]
        and table["seeds"].tolist() == [5] * 3
        and table["accuracy"].iloc[-1] >= 90
        and table["deviation"].iloc[-1] < 10
    )
    with pytest.raises(ValueError, match="shots=32, but 'ball' has 20"):
        few_shot(Spread(), train, test, LABELS, shots=(1, 32), points=64, cache=tmp_path)
    with pytest.raises(ValueError, match="must be at least 1"):
        few_shot(Spread(), train, test, shots=(), points=64, cache=tmp_path)


def test_features_are_computed_once(tmp_path):
    class Counting(Spread):
        dim, calls = 3, 0

        def forward(self, points):
            Counting.calls += 1
            return super().forward(points)

    train, test = toys(6), toys(4, seed=1)
    linear_probe(Counting(), train, test, points=64, cache=tmp_path)
    few_shot(Counting(), train, test, shots=(1,), seeds=2, points=64, cache=tmp_path)
    assert Counting.calls == 2  # the training and the test clouds
    cached = cached_features(Counting(), train.points(), 64, tmp_path)
    assert Counting.calls == 2
    assert torch.equal(cached, features(Spread(), resample_clouds(train.points(), 64)))


class Fixed(Spread):
    """An encoder that may not be moved."""

    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(3))

    def forward(self, points):
        return super().forward(points) + self.offset

    def _apply(self, function, recurse=True):  # behind .to, .cpu, .cuda, .float
        raise AssertionError("the encoder of the caller was moved")


def test_features_leave_the_encoder_on_its_device(tmp_path):
    encoder, clouds = Fixed(), toys(4).points()[:, :64]
    assert torch.equal(features(encoder, clouds), Spread()(clouds))
    assert torch.equal(features(encoder, clouds, device="cpu"), Spread()(clouds))
    assert Classifier(encoder, LABELS, 64).dim == 3
    linear_probe(encoder, toys(6), toys(4, seed=1), points=64, cache=tmp_path)
    with pytest.raises(AssertionError, match="was moved"):
        encoder.to("cpu")


def test_features_on_another_device_are_those_of_a_copy():
    encoder = nn.Linear(6, 4)
    with pytest.raises(NotImplementedError):  # the copy is on `meta`, whose values cannot be read
        features(encoder, torch.rand(2, 6), device="meta")
    assert encoder.weight.device.type == "cpu"


def test_a_gradient_that_is_not_finite_ends_the_run_before_the_step():
    class Root(Spread):
        "The loss is finite, the gradient is 0 * inf."

        dim = 3

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, points):
            return super().forward(points) + (0 * self.weight).sqrt()

    with pytest.raises(Diverged, match="norm of the gradient nan in epoch 1; lower lr_head=0.001"):
        fine_tune(Root(), examples(toys()), CONFIG, "full")


def test_seeding_leaves_other_generators_alone(monkeypatch):
    """`torch.manual_seed` would reseed all GPUs of the caller."""
    encoder = tiny()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("all GPUs were reseeded"))
    fresh_copy(encoder, 5)
    random_init(None, TINY, 5)
    fine_tune(Spread(), examples(toys()), replace(CONFIG, head_epochs=1), "head")


def test_the_shipped_model_is_a_start():
    start = load_init("nano", "point_transformer_small groups=16")
    assert start.encoder.config.groups == 16 and start.points == 1024 and start.model is not None
    tuned = fine_tune(start, examples(toys(6)), replace(CONFIG, points=128), "head")
    assert (
        tuned.classifier.dim == start.model.config.dim
        and tuned.classifier.score(examples(toys(6, seed=1)))["accuracy"] > 60
    )


def papermill(out, *parameters):
    """The job in a process of its own."""
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable,
        "-m",
        "papermill",
        "--no-progress-bar",
        str(ROOT / "nbs/finetune.ipynb"),
        str(out / "finetune.ipynb"),
        *map(str, parameters),
    ]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def test_the_job(tmp_path):
    both = toys(12)
    columns = pd.DataFrame({"split": (["train"] * 8 + ["test"] * 4) * 3})
    write_collection(tmp_path / "toys", list(both), 128, columns)
    done = papermill(
        tmp_path,
        "-p",
        "start",
        "scratch",
        "-p",
        "encoder",
        TINY,
        "-p",
        "mode",
        "head+full",
        "-p",
        "data",
        tmp_path / "toys",
        "-p",
        "points",
        64,
        "-p",
        "seeds",
        1,
        "-p",
        "epochs",
        2,
        "-p",
        "min_steps",
        2,
        "-p",
        "head_epochs",
        5,
        "-p",
        "fractions",
        "0.5, 1",
        "-p",
        "watch",
        1,
        "-p",
        "out",
        tmp_path / "run",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in (
        "finetune.json",
        "results.csv",
        "curves.csv",
        "summary.csv",
        "figures/labels.png",
        "figures/curves.png",
        "scratch-full/model.safetensors",
        "scratch-head/classifier.json",
    ):
        assert (tmp_path / "run" / name).stat().st_size > 0, name
    assert len(pd.read_csv(tmp_path / "run/results.csv")) == 1 + 4
    assert load_classifier(tmp_path / "run/scratch-full").labels == LABELS


@pytest.mark.parametrize(
    "name,value,words",
    [
        ("fraction", 0.1, "unknown parameter fraction"),
        ("seeds", "many", "seeds='many' is a str"),
        ("start", "unicorn", "unknown start 'unicorn'"),
    ],
)
def test_wrong_parameters_stop_the_job(tmp_path, name, value, words):
    done = papermill(tmp_path, "-p", name, value, "-p", "out", tmp_path / "run")
    assert done.returncode != 0 and words in done.stderr


def test_parameters_cell_is_the_table_of_settings():
    cells = json.loads((ROOT / "nbs/finetune.ipynb").read_text())["cells"]
    (cell,) = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    lines = [
        line for line in "".join(cell["source"]).splitlines() if line.strip() and not line.startswith("#")
    ]
    found = {node.target.id: ast.literal_eval(node.value) for node in ast.parse("\n".join(lines)).body}
    assert found == asdict(FineTuneConfig()) and all("  # " in line for line in lines)


@pytest.mark.parametrize(
    "layout", ["cg3d/point_transformer", "cg3d/pointmlp", "ulip/pointmlp", "openshape/vitb32", "uni3d/ti"]
)
def test_published_weights_are_a_start_and_have_a_fresh_counterpart(tmp_path, layout):
    file = write_layout(tmp_path / "weights.pth", layout, small_towers=True)
    start = load_init(str(file))
    before = {name: value.clone() for name, value in start.encoder.state_dict().items()}
    fresh, again = fresh_copy(start.encoder, 1), fresh_copy(start.encoder, 1)
    state, other = fresh.state_dict(), again.state_dict()
    assert {name: value.shape for name, value in state.items()} == {
        name: value.shape for name, value in before.items()
    }
    assert all(torch.equal(value, other[name]) for name, value in state.items()) and all(
        torch.equal(value, start.encoder.state_dict()[name]) for name, value in before.items()
    )
    matrices = [name for name, value in state.items() if value.ndim > 1 and name.endswith("weight")]
    assert matrices and not any(torch.equal(state[name], before[name]) for name in matrices)
    assert fresh.eval()(torch.rand(2, start.points, 6)).shape == (
        2,
        start.encoder(torch.rand(1, start.points, 6)).shape[1],
    )


def test_a_tuned_published_start_asks_for_its_encoder_again(tmp_path):
    start = load_init(
        str(write_layout(tmp_path / "weights.pth", "cg3d/point_transformer", small_towers=True))
    )
    tuned = fine_tune(start, examples(toys(3)), replace(CONFIG, points=0), "head")
    tuned.classifier.save(tmp_path / "tuned")
    with pytest.raises(ValueError, match="which cg3d cannot build; pass one as encoder="):
        load_classifier(tmp_path / "tuned")
    assert torch.equal(
        load_classifier(tmp_path / "tuned", start.encoder).scores(toys()[0]),
        tuned.classifier.scores(toys()[0]),
    )
