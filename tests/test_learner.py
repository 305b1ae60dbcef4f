"""The learner on the real model (random tower weights, toy shapes): schedules, frozen towers, interrupt and resume."""

import os
import shutil
import signal
import weakref
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from cg3d.core.atomic import write_folder
from cg3d.core.config import settings_from
from cg3d.core.errors import InputError, PathTaken, UnsafeFile
from cg3d.io.collection import write_collection
from cg3d.io.shape import Shape
from cg3d.models.cg3d import CG3D, CG3DConfig
from cg3d.models.clip_backbone import load_backbone
from cg3d.models.layers import WarmBatchNorm1d
from cg3d.models.prompts import Prompts
from cg3d.pretrained.factory import load
from cg3d.training.config import TrainConfig, new_names, run_folder
from cg3d.training.grad_cache import grad_cache
from cg3d.training.learner import Callback, Learner, TowerCache, bf16_speedup, claim_device, use_bf16
from cg3d.training.losses import TriModalLoss
from cg3d.training.pretrain import ByteViews, make_learner, make_triplets, none_or_name, read_data


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
    chosen = {name: none_or_name(getattr(config, name)) for name in ("visual_prompt", "text_prompt")}
    model = CG3D.build(
        CG3DConfig(
            encoder=config.encoder, points=config.points, clip_weights="random", prompt_tokens=2, **chosen
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
        run = learner(
            replace(config, schedule="frozen", visual_prompt="none", epochs=4, overwrite=True), backbone
        )
        drawn = {text for epoch in range(4) for text in run.data.draw_texts(range(len(run.data)), epoch)}
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


def test_same_seed_same_run(config, backbone, tmp_path):
    one, two, other = (
        learner(replace(config, epochs=1, seed=seed, out=str(tmp_path / name)), backbone).fit()
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert one.logs == two.logs and one.logs != other.logs


def test_bf16_is_used_and_close_to_fp32(config, backbone):
    dtypes, losses = {}, {}
    for precision in ("fp32", "bf16"):
        run = learner(replace(config, precision=precision), backbone)
        linear = next(module for module in run.model.encoder.modules() if isinstance(module, nn.Linear))
        linear.register_forward_hook(lambda *call, key=precision: dtypes.update({key: call[2].dtype}))
        run.model.train()
        run.one_step()
        losses[precision] = run.logs["loss"]
        assert all(value.dtype == torch.float32 for value in run.model.encoder.parameters())
    assert dtypes == {"fp32": torch.float32, "bf16": torch.bfloat16}
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.01)


@pytest.mark.parametrize("speedup, chosen", [(1.7, True), (1.05, False), (0.6, False)])
def test_auto_takes_bf16_on_a_cpu_only_where_it_is_faster(monkeypatch, speedup, chosen):
    cpu = torch.device("cpu")
    monkeypatch.setattr("cg3d.training.learner.bf16_speedup", lambda: speedup)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert use_bf16("auto", cpu) == chosen
    assert use_bf16("bf16", cpu) and not use_bf16("fp32", cpu)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert not use_bf16("auto", cpu), "without the instructions nothing is measured"


def test_measuring_leaves_random_numbers_and_gradients_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with torch.no_grad():
        assert 0.01 < bf16_speedup.__wrapped__() < 100
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.rand(3), expected)


def test_the_private_functions_of_torch_are_there():
    assert callable(torch.cpu._is_avx512_bf16_supported) and callable(torch.cpu._is_amx_tile_supported)


class HostCopies(TorchFunctionMode):
    """Counts what copies numbers to the host, where a GPU would have to be waited for."""

    READERS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "numpy", "cpu"}

    def __init__(self):
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in self.READERS and args and isinstance(args[0], torch.Tensor):
            self.found.append((name, tuple(args[0].shape)))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("schedule", ["joint", "frozen"])
def test_a_step_copies_two_results_to_the_host(config, backbone, schedule):
    visual = "none" if schedule == "frozen" else "deep"
    config = replace(config, epochs=20, batch_size=8, schedule=schedule, visual_prompt=visual, augment="none")
    run = learner(config, backbone)
    run.model.train()
    for _ in range(12):  # towers are cached, batch norm has its usual momentum
        run.one_step()
    batch = run.batch()
    run.batch = lambda: batch  # the batch is of the CPU, before it goes to the device
    with HostCopies() as copies:
        run.one_step()
    rows_and_views = [("tolist", (8,))] * (2 if schedule == "joint" else 0)  # of the batch, on the CPU
    found = [call for call in copies.found if call not in rows_and_views]
    assert len(found) == 2 and found[-1] == ("tolist", (len(run.logs),)), copies.found


class Bytes:
    """Bytes that autograd keeps for backward passes: now, and at most."""

    def __enter__(self):
        self.now = self.most = 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda entry: entry.value)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def pack(self, value):
        size = value.numel() * value.element_size()
        self.now += size
        self.most = max(self.most, self.now)
        entry = Entry(value)
        weakref.finalize(entry, self.release, size)
        return entry

    def release(self, size):
        self.now -= size


class Entry:
    def __init__(self, value):
        self.value = value


class Many:
    """512 random shapes."""

    def __len__(self):
        return 512

    def batch(self, rows, epoch):
        generator = torch.Generator().manual_seed(0)
        return {
            "points": torch.rand(512, 64, 6, generator=generator)[rows],
            "images": torch.rand(512, 3, 32, 32, generator=generator)[rows],
            "texts": [f"thing {row}" for row in rows],
            "name": [f"thing {row}" for row in rows],
            "id": [str(row) for row in rows],
            "row": torch.tensor(rows),
            "view": torch.zeros(len(rows), dtype=torch.int64),
        }


@pytest.mark.parametrize("schedule", ["joint", "frozen"])
def test_a_batch_in_parts_has_the_memory_of_one_part(config, backbone, schedule):
    """Under `joint` the towers' graphs of all parts used to stay alive."""
    visual = "none" if schedule == "frozen" else "deep"
    most = {}
    for count, part in ((64, 0), (512, 64)):
        options = replace(
            config, schedule=schedule, visual_prompt=visual, batch_size=count, part=part, epochs=1
        )
        model = learner(options, backbone).model
        loss = TriModalLoss((1, 1, 1 if schedule == "joint" else 0))
        run = Learner(model, loss, Many(), options)
        model.train()
        with Bytes() as kept:
            losses, backward = run.losses(run.batch(), run.phases[0])
            backward()
        run.reader.shutdown()
        del losses, backward
        most[count] = kept.most
    assert most[512] < 1.3 * most[64], most


def test_the_first_pass_in_parts_has_no_gradients(config, backbone):
    run = learner(replace(config, part=2, text_prompt="context"), backbone)
    run.model.train()
    batch = run.batch()
    with torch.no_grad():
        assert not any(side.requires_grad for side in run.features(batch, run.phases[0]))
    _, backward = run.losses(batch, run.phases[0])
    backward()
    assert all(value.grad.abs().sum() > 0 for value in run.model.prompts.parameters())


def test_running_averages_in_ten_parts_are_sequential():
    """Plain means of the first batches (`WarmBatchNorm1d`), although each part is encoded twice."""
    torch.manual_seed(0)
    parts = list((torch.randn(40, 3) + torch.arange(40)[:, None]).split(4))
    parted, sequential = WarmBatchNorm1d(3).train(), WarmBatchNorm1d(3).train()
    (embeddings,), backward = grad_cache(lambda part: (parted(part),), parts, parted)
    embeddings.square().sum().backward()
    backward()
    for part in parts:
        sequential(part)
    torch.testing.assert_close(parted.running_mean, sequential.running_mean)
    torch.testing.assert_close(parted.running_mean, torch.cat(parts).mean(0))
    assert parted.warm == sequential.warm and int(parted.num_batches_tracked) == 10


def test_a_skipped_step_leaves_batch_norm_as_it_was(config, backbone):
    config = replace(config, augment="none", max_skipped=20, epochs=20)
    run = learner(config, backbone)
    norm = next(module for module in run.model.encoder.modules() if isinstance(module, WarmBatchNorm1d))
    run.model.train()
    batch = run.batch()
    run.batch = lambda: dict(batch)
    points = batch["points"]
    run.one_step()
    after_one = norm.running_mean.clone()
    batch["points"] = points * torch.nan
    for _ in range(12):
        run.one_step()
    assert run.skipped == 12 and int(norm.num_batches_tracked) == 1
    assert torch.equal(norm.running_mean, after_one)
    batch["points"] = points
    run.one_step()
    assert norm.momentum == 0.5  # the second batch counts as much as the first


def test_the_device_of_the_process_becomes_the_current_one(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert claim_device("auto") == claim_device("cuda") == torch.device("cuda:1")
    assert claim_device("cuda:0") == torch.device("cuda:0")
    assert current == [torch.device("cuda:1"), torch.device("cuda:1"), torch.device("cuda:0")]
    count = len(current)
    assert claim_device("cpu").type == "cpu" and len(current) == count


def test_views_may_come_as_bytes(config, backbone):
    run = learner(config, backbone)
    floats = run.batch()["images"]
    triplets = run.data
    triplets.cache = ByteViews(triplets.cache)
    run.prefetched = None
    assert triplets.batch([0, 1], 0)["images"].dtype == torch.uint8
    assert torch.equal(run.batch()["images"], floats)


@pytest.mark.parametrize("schedule", ["joint", "frozen"])
def test_several_views_and_texts_of_a_shape_in_one_step(config, backbone, schedule):
    several = replace(
        config,
        schedule=schedule,
        positives="decoupled",
        visual_prompt="none" if schedule == "frozen" else "deep",
        views_per_step=2,
        texts_per_step=2,
        part=3,
    )
    run = learner(several, backbone).fit()
    assert run.step == 6 and np.isfinite(run.logs["loss"]) and run.skipped == 0
    run.reader = type(run.reader)(1)
    batch = run.batch()
    run.reader.shutdown()
    points, image, text = run.features(batch, run.phases[0])
    assert points.shape[:1] == (4,) and image.shape[:2] == text.shape[:2] == (4, 2)
    assert all(len(group) == 2 for group in batch["texts"]) and batch["view"].shape == (4, 2)
    own = run.towers.text([batch["texts"][3][1]])[0]  # row 3, second text
    torch.testing.assert_close(text[3, 1], own)


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"views_per_step": 3}, "views_per_step=3, but a shape has views=2"),
        ({"texts_per_step": 2, "positives": "similar"}, "one view and one text"),
        ({"texts_per_step": 0}, "texts_per_step"),
    ],
)
def test_wrong_numbers_of_positives(config, wrong, words):
    with pytest.raises(ValueError, match=words):
        replace(config, **wrong)


def test_texts_keep_their_order(config, backbone):
    texts = ["a chair", "a bed", "a chair", "a lamp", "a bed"]
    for text_prompt in ("none", "context"):
        towers = learner(replace(config, text_prompt=text_prompt), backbone).towers
        with torch.no_grad():
            found = towers.text(texts)
            torch.testing.assert_close(found, torch.cat([towers.text([text]) for text in texts]))
        assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])


def test_the_frozen_model_is_hashed_once(config, backbone, monkeypatch):
    from cg3d.models import clip_backbone

    run = learner(config, backbone)
    hashed = []
    original = clip_backbone.update_hash
    monkeypatch.setattr(clip_backbone, "update_hash", lambda *a: hashed.append(1) or original(*a))
    run.fit()
    assert run.step == 6 and len(hashed) <= 1  # three epochs, each with a saved model


@pytest.mark.parametrize("epoch", [1, 3])
def test_a_run_killed_while_it_saves_can_be_continued(config, backbone, tmp_path, monkeypatch, epoch):
    """The checkpoint is written before the model: no moment leaves a model that cannot be continued."""
    whole = learner(replace(config, out=str(tmp_path / "whole")), backbone).fit()
    original, calls = CG3D.save, []

    def killed(model, folder, half=False):
        calls.append(folder)
        if len(calls) == epoch:
            raise SystemExit("killed")
        return original(model, folder, half)

    with monkeypatch.context() as patch:
        patch.setattr(CG3D, "save", killed)
        with pytest.raises(SystemExit):
            learner(config, backbone).fit()
    assert (tmp_path / "run/model.safetensors").exists() == (epoch > 1)
    again = learner(replace(config, resume=True), backbone).fit()
    assert again.step == whole.step
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(again).items())
    saved = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "run")]
    assert saved[0] == saved[1]


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
        ({"weight_3d_text": 0.0, "weight_3d_image": 0.0}, ValueError, "no loss would train"),
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
        settings_from(TrainConfig, {"lrr": 3})
    with pytest.raises(ValueError, match="no device"):
        claim_device("abacus")
    assert new_names({"x": 1}, {"x": 2, "_1": 0, "_i12": "", "Out": {}, "__doc__": ""}) == {"x": 2}


def test_a_run_goes_to_runs_of_the_working_folder(tmp_path, monkeypatch):
    """Wherever one stands: no search for a checkout above, and an absolute path that can be printed."""
    (tmp_path / "settings.ini").touch()
    (tmp_path / "nbs").mkdir()
    monkeypatch.chdir(tmp_path / "nbs")
    assert run_folder("a") == tmp_path / "nbs/runs/a"
    assert run_folder("../a") == tmp_path / "a" and run_folder(str(tmp_path)) == tmp_path


def test_a_finished_run_takes_more_epochs_and_is_not_replaced(config, backbone, capsys):
    first = learner(config, backbone).fit()
    with pytest.raises(PathTaken, match="overwrite=True"):
        learner(config, backbone)
    longer = replace(config, resume=True, epochs=config.epochs + 1)
    again = learner(longer, backbone).fit()
    assert again.step == first.step + first.steps_per_epoch
    assert f"{longer.epochs} epochs in place of {config.epochs}" in capsys.readouterr().out
    with pytest.raises(InputError, match="epochs was"):
        learner(replace(config, resume=True), backbone).fit()
    assert learner(replace(config, overwrite=True), backbone).step == 0
