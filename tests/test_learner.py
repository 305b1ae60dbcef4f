"""The learner on the real model (random tower weights, toy shapes): schedules, frozen towers, interrupt and resume."""

import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from cg3d.core.atomic import write_folder
from cg3d.core.errors import UnsafeFile
from cg3d.io.collection import write_collection
from cg3d.io.shape import Shape
from cg3d.models.cg3d import CG3D, CG3DConfig, load
from cg3d.models.clip_backbone import load_backbone
from cg3d.models.prompts import Prompts
from cg3d.training.config import TrainConfig, new_names, run_folder, settings
from cg3d.training.learner import Callback, TowerCache, pick_device
from cg3d.training.pretrain import make_learner, make_triplets, read_data


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """Eight boxes, balls and sticks, packed, with their views in a private cache."""
    folder, rng, shapes = tmp_path_factory.mktemp("toys"), np.random.default_rng(0), []
    for i in range(8):
        cloud = rng.normal(size=(200, 3)).astype(np.float32) * ((1, 1, 1), (3, 1, 1), (1, 3, 1))[i % 3]
        shapes.append(
            Shape(
                cloud,
                rng.uniform(0, 1, (200, 3)).astype(np.float32),
                name=("blob", "bar", "stick")[i % 3],
                id=str(i),
                source="toys",
            )
        )
    write_collection(folder / "toys", shapes, n=128, columns=pd.DataFrame({"split": ["train"] * 8}))
    os.environ["CG3D_CACHE"], before = str(folder / "cache"), os.environ.get("CG3D_CACHE")
    yield str(folder / "toys")
    if before is None:
        del os.environ["CG3D_CACHE"]
    else:
        os.environ["CG3D_CACHE"] = before


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return load_backbone("nano", "random")


@pytest.fixture
def config(toys, tmp_path):
    return TrainConfig(
        data=toys,
        encoder="pointnet",
        clip_weights="random",
        points=64,
        views=2,
        view_size=32,
        epochs=3,
        batch_size=4,
        augment="summary",
        device="cpu",
        precision="fp32",
        out=str(tmp_path / "run"),
    )


def learner(config, backbone, *callbacks):
    """A learner as the job builds it, on a backbone that is loaded already."""
    torch.manual_seed(config.seed)
    chosen = {
        name: None if (value := getattr(config, name)) == "none" else value
        for name in ("visual_prompt", "text_prompt")
    }
    model = CG3D.build(
        CG3DConfig(
            encoder="pointnet", points=config.points, clip_weights="random", prompt_tokens=2, **chosen
        ),
        backbone,
    )
    made = make_learner(
        config,
        config.out,
        make_triplets(read_data(config.data), config, progress=False),
        model,
        progress=False,
    )
    made.callbacks += callbacks
    return made


def weights(learner):
    return {
        name: value.clone()
        for part in ("encoder", "prompts")
        for name, value in getattr(learner.model, part).state_dict().items()
    }


class Strike(Callback):
    """Sends Ctrl-C, or raises it, after a step."""

    def __init__(self, at, raised=False):
        self.at, self.raised = at, raised

    def after_step(self, learner):
        if learner.step != self.at:
            return
        if self.raised:
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("schedule,ema,raised", [("joint", 0.0, False), ("alternate", 0.9, True)])
def test_resume_continues_to_identical_weights(config, backbone, tmp_path, schedule, ema, raised):
    config = replace(
        config,
        schedule=schedule,
        ema=ema,
        learnable_temperature=True,
        prompt_optimizer="sgd" if schedule == "alternate" else "same",
    )
    whole = learner(replace(config, out=str(tmp_path / "whole")), backbone).fit()
    half = learner(config, backbone, Strike(3, raised)).fit()
    assert half.step == 3 and half.stop and (tmp_path / "run/model.safetensors").exists()
    again = learner(replace(config, resume=True), backbone).fit()
    assert again.step == whole.step == 6
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(again).items())
    assert torch.equal(again.loss.log_scale, whole.loss.log_scale)
    saved = [
        load(folder, backbone=backbone).encoder.state_dict()
        for folder in (tmp_path / "whole", tmp_path / "run")
    ]
    assert all(torch.equal(value, saved[1][name]) for name, value in saved[0].items())
    assert not list((tmp_path / "run").glob("*.tmp"))
    assert pd.read_csv(tmp_path / "run/metrics.csv")["step"].tolist() == [2, 4, 6]


def test_interrupt_handler_is_put_back(config, backbone):
    before = signal.getsignal(signal.SIGINT)
    learner(config, backbone, Strike(1)).fit()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    "visual,text",
    [
        ("deep", "none"),
        ("shallow", "none"),
        ("pixel", "none"),
        ("pixel+deep", "context"),
        ("none", "context"),
    ],
)
def test_every_prompt_learns_and_the_backbone_does_not(config, backbone, visual, text):
    config, fingerprint = (
        replace(config, visual_prompt=visual, text_prompt=text, epochs=1),
        backbone.fingerprint(),
    )
    run = learner(config, backbone)
    start = weights(run)
    run.fit()
    assert backbone.fingerprint() == fingerprint
    prompts = dict(run.model.prompts.named_parameters())
    assert prompts and all(value.grad.abs().sum() > 0 for value in prompts.values())
    assert all(not torch.equal(value, start[name]) for name, value in prompts.items())
    assert all(value.grad is None for value in backbone.parameters())


@pytest.mark.parametrize("schedule,expected", [("joint", {"encoder", "prompts"}), ("alternate", {"encoder"})])
def test_first_step_of_a_schedule(config, backbone, schedule, expected):
    run = learner(replace(config, schedule=schedule), backbone)
    moved = []
    for _ in range(2):
        start = {
            part: [value.clone() for value in getattr(run.model, part).parameters()]
            for part in ("encoder", "prompts")
        }
        run.model.train()
        run.one_step()
        moved.append(
            {
                part
                for part, values in start.items()
                if any(not torch.equal(a, b) for a, b in zip(values, getattr(run.model, part).parameters()))
            }
        )
    assert moved == [expected, {"encoder", "prompts"} if schedule == "joint" else {"prompts"}]


def test_frozen_schedule_asks_the_towers_once(config, backbone, monkeypatch, tmp_path):
    seen, said, see, say = [], [], backbone.encode_image, backbone.encode_text
    monkeypatch.setattr(
        type(backbone), "encode_image", lambda self, images: seen.append(len(images)) or see(images)
    )
    monkeypatch.setattr(type(backbone), "encode_text", lambda self, texts: said.extend(texts) or say(texts))
    monkeypatch.setenv("CG3D_CACHE", str(tmp_path))
    for _ in range(2):  # the second run finds the answers of the first
        run = learner(replace(config, schedule="frozen", visual_prompt="none", epochs=4), backbone)
        drawn = {text for epoch in range(4) for text in run.data.texts_of(range(len(run.data)), epoch)}
        run.fit()
        assert sum(seen) == 16  # eight shapes, two views each, although there are four epochs
        assert sorted(said) == sorted(drawn)


@pytest.mark.parametrize("visual", ["none", "deep"])
def test_remembered_views_equal_computed_ones(config, backbone, visual):
    run = learner(replace(config, visual_prompt=visual), backbone)
    batch = run.batch()
    run.model.eval()
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(
                run.towers.image(batch), run.model.prompts.encode_image(batch["images"]), atol=2e-3, rtol=2e-3
            )
            torch.testing.assert_close(
                run.towers.text(batch["texts"]), backbone.encode_text(batch["texts"]), atol=1e-4, rtol=1e-4
            )


def test_memory_limit(backbone):
    towers = TowerCache(
        type("Model", (), {"backbone": backbone, "prompts": Prompts(backbone, None)}), limit=1
    )
    first = towers.text(["a chair", "a table"])
    assert (
        torch.equal(first[:1], towers.text(["a chair"])) and towers.text(["a bed"]).shape == first[:1].shape
    )
    assert ("text", "a bed") not in towers.memory


def test_same_seed_same_run_and_bf16_runs(config, backbone, tmp_path):
    one, two, other = (
        learner(replace(config, epochs=1, seed=seed, out=str(tmp_path / name)), backbone).fit()
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert one.logs == two.logs and one.logs != other.logs
    low = learner(replace(config, epochs=1, precision="bf16", out=str(tmp_path / "d")), backbone).fit()
    assert abs(low.logs["loss"] - one.logs["loss"]) < 0.5


def test_bad_checkpoints(config, backbone, tmp_path):
    with pytest.raises(FileNotFoundError, match="run once without resume"):
        learner(replace(config, resume=True), backbone).fit()
    learner(replace(config, epochs=1), backbone).fit()
    with pytest.raises(ValueError, match="lr was 0.001, is 0.5"):
        learner(replace(config, epochs=1, resume=True, lr=0.5), backbone).fit()

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)

    shutil.rmtree(tmp_path / "run/checkpoints")
    write_folder(
        tmp_path / "run/checkpoints/00000001",
        {"state.pt": lambda path: torch.save({"step": Evil()}, path)},
        {},
    )
    with pytest.raises(UnsafeFile, match="more than tensors"):
        learner(replace(config, epochs=1, resume=True), backbone).fit()
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "bad,error,words",
    [
        ({"epochs": "true"}, TypeError, "epochs='true' is a str"),
        ({"resume": "true"}, TypeError, "it takes a bool"),
        ({"epochs": True}, TypeError, "bool"),
        ({"epochs": 2.5}, TypeError, "float"),
        ({"batch_size": 1}, ValueError, "batch_size=1"),
        ({"lr": float("nan")}, ValueError, "lr"),
        ({"lr": float("inf")}, ValueError, "lr"),
        ({"schedule": "both"}, ValueError, "joint, alternate, frozen"),
        ({"visual_prompt": "deep+wide"}, ValueError, "shallow"),
        ({"schedule": "frozen"}, ValueError, "visual_prompt='none'"),
        ({"schedule": "alternate", "visual_prompt": "none"}, ValueError, "prompt"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"hard_negatives": 2.0}, ValueError, "hard_negatives"),
        ({"out": " "}, ValueError, "out"),
        ({"weight_3d_text": 0.0, "weight_3d_image": 0.0}, ValueError, "nothing would teach"),
        ({"encoder": "pointnet depth:4"}, ValueError, "no setting 'depth:4'"),
        ({"encoder": "depth=4"}, ValueError, "name of an encoder"),
        ({"prompt_optimizer": "sgd"}, ValueError, "alternate"),
        ({"augment": "strong"}, ValueError, "sensor"),
    ],
)
def test_bad_settings_are_refused(bad, error, words):
    with pytest.raises(error, match=words):
        TrainConfig(**bad)


def test_unknown_settings_and_devices():
    with pytest.raises(ValueError, match="unknown parameter lrr; known are data"):
        settings(TrainConfig, {"lrr": 3})
    with pytest.raises(ValueError, match="no device"):
        pick_device("abacus")
    assert new_names({"x": 1}, {"x": 2, "_1": 0, "_i12": "", "Out": {}, "__doc__": ""}) == {"x": 2}


def test_runs_go_to_the_top_of_the_checkout(tmp_path):
    (tmp_path / "settings.ini").touch(), (tmp_path / "nbs").mkdir()
    assert run_folder("a", tmp_path / "nbs") == run_folder("a", tmp_path) == tmp_path / "runs/a"
