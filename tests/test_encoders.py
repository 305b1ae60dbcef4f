"""Every registered encoder keeps the same promises (in the manner of timm's registry tests)."""

import copy
import functools
import io
import subprocess
import sys

import pytest
import torch

from cg3d.models import layers
from cg3d.models.layers import WarmBatchNorm1d, compile_encoder, group_points, max_over_neighbors
from cg3d.models.registry import create_encoder, list_encoders

ENCODERS = list_encoders()
DIM = 32


def cloud(points=512, channels=6, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    xyz = torch.nn.functional.normalize(torch.randn(batch, points, 3, generator=generator), dim=-1)
    rgb = torch.rand(batch, points, 3, generator=generator)
    return torch.cat([xyz * (0.5 + 0.5 * rgb[..., :1]), rgb], dim=-1)[..., :channels]


@functools.cache
def encoder(name, in_channels=6):
    torch.manual_seed(0)
    return create_encoder(name, dim=DIM, in_channels=in_channels).eval()


def trainable(name):
    return copy.deepcopy(encoder(name))


def test_the_promised_encoders_are_there():
    promised = {
        "pointnet",
        "pointmlp",
        "pointmlp_elite",
        "pointmlp_small",
        "point_transformer",
        "point_transformer_small",
    }
    assert promised <= set(ENCODERS)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("reads", [3, 6])
def test_forward_shape_and_color(name, reads):
    model, full = encoder(name, in_channels=reads), cloud(channels=6)
    gray = torch.cat([full[..., :3], torch.full_like(full[..., 3:], 0.4)], dim=-1)
    with torch.no_grad():
        colored, plain, filled = model(full), model(full[..., :3]), model(gray)
    assert colored.shape == plain.shape == (2, DIM) and colored.isfinite().all()
    assert torch.equal(plain, filled)  # no color means 0.4 gray
    assert torch.equal(colored, plain) == (reads == 3)  # color is seen by those that read it, and by no other
    assert not torch.allclose(colored[0], colored[1], atol=1e-5)  # two clouds, two answers


@pytest.mark.parametrize("name", ENCODERS)
def test_gradients_reach_every_parameter(name):
    model = trainable(name)
    weight = torch.randn(2, DIM, generator=torch.Generator().manual_seed(1))
    (model(cloud()) * weight).sum().backward()
    without = [
        n
        for n, p in model.named_parameters()
        if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()
    ]
    assert without == []


@pytest.mark.parametrize("name", ENCODERS)
def test_a_batch_of_one_trains_and_keeps_its_axis(name):
    model = trainable(name).train()
    out = model(cloud(batch=1))
    out.sum().backward()
    assert out.shape == (1, DIM) and all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", [n for n in ENCODERS if n not in ("pointmlp", "point_transformer")])
def test_evaluation_agrees_with_training_after_a_short_training(name):
    """Running averages are right from the first batches on, also for the small numbers within a patch."""
    model, clouds = trainable(name).train(), cloud(batch=4)
    for module in model.modules():
        if hasattr(module, "rate"):
            module.rate = 0.0  # no drop path: only batch norm may differ
    with torch.no_grad():
        for _ in range(3):
            trained = model(clouds)
        assert torch.nn.functional.cosine_similarity(model.eval()(clouds), trained).min() > 0.99


@pytest.mark.parametrize("name", ENCODERS)
def test_state_dict_round_trip(name):
    model, file = encoder(name), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    torch.manual_seed(1)
    other = create_encoder(name, dim=DIM).eval()
    with torch.no_grad():
        expected, before = model(cloud()), other(cloud())
        other.load_state_dict(torch.load(file, weights_only=True))
        assert not torch.allclose(before, expected, atol=1e-4) and torch.equal(other(cloud()), expected)


@pytest.mark.parametrize("name", ENCODERS)
def test_evaluation_is_deterministic_and_clouds_do_not_mix(name):
    model, clouds = encoder(name), cloud()
    with torch.no_grad():
        together = model(clouds)
        assert torch.equal(together, model(clouds))
        assert torch.allclose(together[1:], model(clouds[1:]), atol=1e-4)


@pytest.mark.parametrize("name", ENCODERS)
def test_order_of_the_points_does_not_matter(name):
    """Exactly so for PointNet; elsewhere sampling starts at the first point, so that one stays in place."""
    model, clouds = encoder(name), cloud()
    order = torch.randperm(512, generator=torch.Generator().manual_seed(0))
    if name != "pointnet":
        order = torch.cat([order.new_zeros(1), order[order != 0]])
    with torch.no_grad():
        assert torch.allclose(model(clouds), model(clouds[:, order]), atol=1e-4)


@pytest.mark.parametrize("name", ENCODERS)
def test_bfloat16_autocast(name):
    model = trainable(name)
    with torch.no_grad():
        exact = model(cloud())
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(cloud())
        rough.float().sum().backward()
    assert rough.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters())
    assert torch.nn.functional.cosine_similarity(rough.float(), exact).min() > 0.99


@pytest.mark.parametrize("name", [n for n in ENCODERS if n != "pointnet"])
def test_too_few_points_are_refused_with_both_numbers(name):
    model = encoder(name)
    fewest = model.min_points
    with torch.no_grad():
        assert model(cloud(fewest)).shape == (2, DIM)
    with pytest.raises(ValueError, match=f"at least {fewest} points, got {fewest - 1}"):
        model(cloud(fewest - 1))


@pytest.mark.parametrize("name", ENCODERS)
def test_repeated_points_give_finite_answers(name):
    few = cloud(64).repeat(1, 8, 1)
    with torch.no_grad():
        assert encoder(name)(few).isfinite().all()


@pytest.mark.parametrize("name", ENCODERS)
def test_bad_clouds_and_settings_are_errors(name):
    model = encoder(name)
    for wrong in (cloud()[0], cloud()[..., :4], cloud().long()):
        with pytest.raises(ValueError, match="points must be float"):
            model(wrong)
    with pytest.raises(ValueError, match="no setting 'widht'"):
        create_encoder(name, widht=3)
    with pytest.raises(ValueError, match="in_channels=4 is unknown; choose from 3, 6"):
        create_encoder(name, in_channels=4)
    with pytest.raises(ValueError, match="dim=0 must be at least 1"):
        create_encoder(name, dim=0)


def test_zero_rates_are_allowed():
    assert create_encoder("point_transformer_small", drop_path=0).config.drop_path == 0


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="no encoder 'pointnext'; there are .*pointnet"):
        create_encoder("pointnext")


def test_parameter_names_of_published_point_transformer():
    """Keys of `base_model` in CG3D's files, its unused class head left out."""
    norm = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    both = {"weight", "bias"}
    expected = {"cls_token", "cls_pos"}
    expected |= {
        f"encoder.{conv}.{i}.{end}" for conv in ("first_conv", "second_conv") for i in (0, 3) for end in both
    }
    expected |= {f"encoder.{conv}.1.{end}" for conv in ("first_conv", "second_conv") for end in norm}
    expected |= {
        f"{part}.{end}"
        for part in ("reduce_dim", "pos_embed.0", "pos_embed.2", "norm", "projection")
        for end in both
    }
    for n in range(12):
        inner = ("norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        expected |= {f"blocks.blocks.{n}.{part}.{end}" for part in inner for end in both}
        expected.add(f"blocks.blocks.{n}.attn.qkv.weight")
    model = create_encoder("point_transformer", in_channels=3)
    assert set(model.state_dict()) == expected
    assert model.projection.weight.shape == (512, 768)
    assert 21.5e6 < sum(p.numel() for p in model.parameters()) < 22.5e6


def test_parameter_names_of_published_pointmlp():
    norm = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    layer = {"0.weight"} | {f"1.{end}" for end in norm}
    expected = {f"embedding.net.{end}" for end in layer} | {"projection.weight", "projection.bias"}
    for n in range(4):
        expected |= {f"local_grouper_list.{n}.affine_{end}" for end in ("alpha", "beta")}
        expected |= {f"pre_blocks_list.{n}.transfer.net.{end}" for end in layer}
        for half in ("pre", "pos"):
            expected |= {
                f"{half}_blocks_list.{n}.operation.{block}.net{i}.{end}"
                for block in (0, 1)
                for i in (1, 2)
                for end in layer
            }
    model = create_encoder("pointmlp", in_channels=3)
    assert set(model.state_dict()) == expected
    assert model.projection.weight.shape == (512, 1024, 1)


@pytest.mark.parametrize("name, millions", [("pointmlp", 13.2), ("pointmlp_elite", 0.7)])
def test_pointmlp_has_the_published_size_under_a_classifier(name, millions):
    model = create_encoder(name, in_channels=3)
    body = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("projection"))
    head = (model.channels + 1) * 512 + 2 * 512 + 513 * 256 + 2 * 256 + 257 * 40  # 512-256-40 with batch norm
    assert abs((body + head) / 1e6 - millions) < 0.05


def test_small_sizes():
    count = {name: sum(p.numel() for p in create_encoder(name).parameters()) / 1e6 for name in ENCODERS}
    assert count["point_transformer_small"] < 5.5 and 0.5 < count["pointmlp_small"] < 1.2


def test_architectures_are_imported_on_demand():
    code = (
        "import sys; from cg3d.models.registry import create_encoder\n"
        "assert 'cg3d.models.pointmlp' not in sys.modules\n"
        "create_encoder('pointnet', dim=4); assert 'cg3d.models.pointmlp' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["pointmlp_small", "point_transformer_small"])
def test_a_compiled_encoder_gives_the_same(name, monkeypatch):
    monkeypatch.setattr(
        torch, "compile", functools.partial(torch.compile, backend="eager")
    )  # traced as for a GPU, without generating code
    model = encoder(name)
    with torch.no_grad():
        assert torch.allclose(compile_encoder(model)(cloud()), model(cloud()), atol=1e-5)


@pytest.mark.parametrize("name", ["pointmlp_small", "point_transformer_small"])
def test_a_compiled_encoder_is_translated_once(name, monkeypatch):
    """Batch norm's momentum changes in each of the first ten steps; each would be translated anew, and after eight torch gives up."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=count))
    model, seen = encoder(name).train(), []
    quick = compile_encoder(model)
    for _ in range(14):
        quick(cloud()).sum().backward()
        seen.append(len(graphs))
    assert seen[:9] == [0] * 9 and seen[11] == seen[-1] == 1, "one graph without a break"


def test_compiling_leaves_the_search_alone():
    "compile_encoder rewrote a global of its module, for every encoder of the process."
    before = dict(vars(layers))
    compile_encoder(encoder("pointnet"))
    assert {name: value for name, value in vars(layers).items() if before.get(name) is not value} == {}


def test_neighborhoods_are_the_same_under_autocast():
    xyz = cloud(channels=3)
    centers, around = group_points(xyz, 64, 24)
    with torch.autocast("cpu", torch.bfloat16):
        low = group_points(xyz, 64, 24)
        assert torch.equal(low[0], centers) and torch.equal(low[1], around)
    low = group_points(xyz.bfloat16().float(), 64, 24)
    assert not torch.equal(low[1].sort(-1).values, around.sort(-1).values), "bfloat16 does change neighbors"


def test_searches_give_shapes_without_values():
    "What torch.compile and fake tensors see: sizes and types of the indices."
    for xyz in (torch.empty(3, 100, 3, device="meta"), torch.rand(3, 100, 3)):
        centers, around = group_points(xyz, 8, 5)
        assert centers.shape == (3, 8) and around.shape == (3, 8, 5) and centers.device == xyz.device
        assert centers.dtype == around.dtype == torch.int64
    with pytest.raises(ValueError, match="cannot take k=200 points from clouds of 100"):
        group_points(torch.rand(3, 100, 3), 200, 5)
    assert not group_points(torch.rand(3, 100, 3, requires_grad=True), 8, 5)[0].requires_grad


@pytest.mark.parametrize("parts", [2, 10, 16])
def test_batch_norm_is_restored_by_its_buffers(parts):
    """A step whose running statistics are put back and computed again, as gradient caching does: the second pass
    must not take the momentum of the tenth batch (3.25 instead of 4.96 with ten parts of mean 5)."""
    torch.manual_seed(0)
    batches = [torch.randn(64, 4) + 5 for _ in range(parts)]
    sequential, replayed = WarmBatchNorm1d(4), WarmBatchNorm1d(4)
    for batch in batches:
        sequential(batch)
    kept = [buffer.clone() for buffer in replayed.buffers()]
    for batch in batches:
        replayed(batch)
    for buffer, value in zip(replayed.buffers(), kept, strict=True):
        buffer.copy_(value)
    for batch in batches:
        replayed(batch)
    assert torch.equal(replayed.running_mean, sequential.running_mean)
    assert torch.equal(replayed.running_var, sequential.running_var)
    assert replayed.running_mean.mean() > 4.9


def test_batch_norm_goes_on_where_its_state_was_saved():
    torch.manual_seed(0)
    batches = [torch.randn(64, 4) + 5 for _ in range(6)]
    whole, first, second = WarmBatchNorm1d(4), WarmBatchNorm1d(4), WarmBatchNorm1d(4)
    for batch in batches:
        whole(batch)
    for batch in batches[:3]:
        first(batch)
    second.load_state_dict(first.state_dict())
    copied = copy.deepcopy(first)
    for batch in batches[3:]:
        second(batch)
        copied(batch)
    for resumed in (second, copied):
        assert torch.equal(resumed.running_mean, whole.running_mean) and resumed.batches_seen() == 6
    assert not whole.warm
    whole.num_batches_tracked.fill_(9)
    assert whole.warm
    assert set(whole.state_dict()) == set(torch.nn.BatchNorm1d(4).state_dict())


def test_batch_norm_reads_its_counter_only_when_it_was_changed():
    "int() of a tensor on a GPU waits for the GPU; it must not happen at every layer of every step."
    read = []

    class Counter(torch.Tensor):
        def __int__(self):
            read.append(1)
            return int(self.as_subclass(torch.Tensor))

    norm = WarmBatchNorm1d(4)
    norm._buffers["num_batches_tracked"] = torch.tensor(0).as_subclass(Counter)
    for _ in range(30):
        norm(torch.randn(8, 4))
    assert len(read) == 1 and norm.batches_seen() == 30
    norm.num_batches_tracked.fill_(3)
    assert norm.batches_seen() == 3 and len(read) == 2


def test_batch_norm_over_processes_by_device(monkeypatch):
    "PyTorch's SyncBatchNorm where it exists, the package's own on CPUs."
    used = []
    monkeypatch.setattr(layers, "world_size", lambda: 2)
    monkeypatch.setattr(torch.nn.SyncBatchNorm, "forward", lambda self, x: used.append("torch") or x)
    monkeypatch.setattr(WarmBatchNorm1d, "_across_cpus", lambda self, x: used.append("own") or x)
    norm = WarmBatchNorm1d(4)
    norm(torch.randn(8, 4))
    norm(torch.empty(8, 4, device="meta"))
    norm.eval()(torch.randn(8, 4))
    assert used == ["own", "torch", "torch"]


@pytest.mark.parametrize("compiling", [False, True])
def test_the_first_of_equal_maxima_takes_the_gradient(compiling, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)  # the way of other devices
    rows = torch.tensor([[1.0, 2], [3, 2], [3, 0]], requires_grad=True)
    out = max_over_neighbors(rows[None])
    assert out.tolist() == [[3, 2]]
    out.sum().backward()
    assert rows.grad.tolist() == [[0, 1], [1, 0], [0, 0]]
