"""Functions on tensors, settings and bytes with inputs of Hypothesis: a correct result, or an error of cg3d."""

import contextlib
import json
import math
import pickle
from dataclasses import asdict, fields

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cg3d.cli.jobs import job_values
from cg3d.core.errors import Cg3dError, InputError
from cg3d.core.metrics import first_rank, iou, mean_average_precision, mean_class_accuracy, recall_at_k, top_k
from cg3d.core.safe_pickle import unpickle
from cg3d.geometry.augment import Augment
from cg3d.geometry.ops import ball_query, check_points, farthest_point_sample, knn, normalize
from cg3d.io.pcd import lzf_decompress
from cg3d.search.backends import exact_search, unit_rows
from cg3d.search.filters import Filter
from cg3d.training.config import TrainConfig, encoder_choice
from cg3d.training.losses import POSITIVES, TriModalLoss

settings.register_profile(
    "cg3d",
    max_examples=40,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("cg3d")

NUMBERS = st.floats(-1e4, 1e4, width=32)
ANYTHING = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.lists(st.integers(), max_size=2)
)


@st.composite
def clouds(draw, least=2, most=24):
    "Points (B, N, 3), of any size and place, some on top of each other"
    shape = draw(st.integers(1, 3)), draw(st.integers(least, most)), 3
    return torch.from_numpy(draw(arrays(np.float32, shape, elements=NUMBERS))) * draw(
        st.sampled_from([1e-3, 1.0, 1e3])
    )


@given(clouds())
def test_normalize(points):
    found = normalize(points)
    radius = found.norm(dim=-1).amax(-1)
    extent = (points - points[:, :1]).abs().amax((1, 2))
    assert found.shape == points.shape and found.isfinite().all()
    assert (radius - 1).abs()[extent > 1e-18].lt(1e-4).all(), "unit radius, unless squares underflow"
    assert radius[extent == 0].eq(0).all()
    assert found.mean(1).abs().max() < 1e-2


@given(clouds(), st.data())
def test_farthest_points_and_neighbors_are_those_of_the_naive_implementation(points, data):
    B, N, _ = points.shape
    k = data.draw(st.integers(1, N))
    taken = farthest_point_sample(points, k)
    apart = (points[:, :, None] - points[:, None]).square().sum(-1)
    for cloud in range(B):
        rows = [0]
        for step in range(1, k):  # the next one is a farthest of all that are left
            gap = apart[cloud][:, rows].amin(1)
            assert gap[taken[cloud, step]] >= gap.max() * (1 - 1e-4)
            rows.append(int(taken[cloud, step]))
        assert taken[cloud].tolist() == rows
    distance, near = knn(points, points, k)
    scale = float(points.square().sum(-1).max()) or 1.0
    assert (
        near.shape == (B, N, k)
        and (apart.gather(2, near).sort(-1).values - apart.sort(-1).values[..., :k]).abs().max()
        <= 1e-4 * scale
    )


@given(
    st.one_of(
        clouds(),
        arrays(np.float32, st.tuples(*[st.integers(0, 3)] * 3), elements=st.floats(width=32)).map(
            torch.from_numpy
        ),
        ANYTHING,
    )
)
def test_check_points(points):
    with contextlib.suppress(Cg3dError):
        assert (
            check_points(points) is points
            and points.isfinite().all()
            and points.numel()
            and points.shape[2] in (3, 6)
        )


@given(
    clouds(least=8),
    st.fixed_dictionaries(
        {},
        optional={
            field.name: st.booleans()
            if field.name == "scale_per_axis"
            else st.tuples(st.floats(), st.floats()) | st.tuples(st.floats(0.1, 1), st.floats(1, 3))
            if field.name in ("scale", "elevation")
            else st.floats(0, 1) | st.floats()
            for field in fields(Augment)
        },
    ),
    st.integers(0, 9),
)
def test_augmentations_keep_the_form(points, recipe, seed):
    try:
        augment = Augment(**recipe)
    except Cg3dError:
        return
    points = normalize(points)
    before, found = points.clone(), augment(points, torch.Generator().manual_seed(seed))
    assert found.shape == points.shape and torch.equal(points, before)
    if (
        all(abs(value) < 1e6 for value in recipe.values() if isinstance(value, float))
        and max(map(abs, recipe.get("scale", (1,)))) < 1e6
    ):
        assert found.isfinite().all()


@st.composite
def judged(draw):
    "Scores with many ties (Q, C), and what is right"
    shape = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    return torch.from_numpy(
        draw(
            arrays(
                np.float32,
                shape,
                elements=st.sampled_from([-1.0, 0.0, 0.5, 2.0, math.inf, math.nan]) | NUMBERS,
            )
        )
    ), torch.from_numpy(draw(arrays(bool, shape)))


@given(judged(), st.integers(-1, 9))
def test_ranks(scored, k):
    scores, relevant = scored
    if scores.isnan().any() or not relevant.any(1).all():
        for metric in (first_rank, mean_average_precision):
            with pytest.raises(InputError):
                metric(scores, relevant)
        return
    slow = [
        1
        + sum(
            float(score) >= max(float(s) for s, right in zip(row, rights) if right)
            for score, right in zip(row, rights)
            if not right
        )
        for row, rights in zip(scores, relevant)
    ]
    assert first_rank(scores, relevant).tolist() == slow
    assert 0 < mean_average_precision(scores, relevant) <= 1 + 1e-9
    if k < 1:
        with pytest.raises(InputError):
            recall_at_k(scores, relevant, k)
    else:
        assert recall_at_k(scores, relevant, k) == pytest.approx(sum(rank <= k for rank in slow) / len(slow))
    assert iou(relevant, relevant).eq(1).all() and 0 <= float(iou(relevant, scores > 0).min()) <= 1


@given(judged(), st.lists(st.integers(-2, 9), min_size=1, max_size=6))
def test_accuracies(scored, target):
    try:
        found = top_k(scored[0], torch.tensor(target)), mean_class_accuracy(scored[0], torch.tensor(target))
    except InputError:
        return
    assert 0 <= found[0][1] <= found[0][3] <= found[0][5] <= 1 and 0 <= found[1] <= 1


@given(
    st.integers(2, 6),
    st.sampled_from(POSITIVES),
    st.floats(0, 1),
    st.tuples(*[st.floats(0, 3)] * 3),
    st.floats(0.01, 1),
    st.integers(0, 99),
    st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_losses(count, positives, hard, weights, temperature, seed, size):
    generator = torch.Generator().manual_seed(seed)
    sides, texts = (
        (size * torch.randn(3, count, 8, generator=generator)).requires_grad_(),
        [f"thing {number}" for number in torch.randint(3, (count,), generator=generator).tolist()],
    )
    loss = TriModalLoss(weights, temperature, positives=positives, hard_negatives=hard)
    out = loss(*sides, texts)
    out["loss"].backward() if out["loss"].requires_grad else None
    order = torch.randperm(count, generator=generator)
    again = loss(*sides[:, order], [texts[i] for i in order])["loss"]
    assert (
        out["loss"] >= -1e-5
        and out["loss"].isfinite()
        and (sides.grad is None or sides.grad.isfinite().all())
    )
    assert out["loss"].item() == pytest.approx(
        again.item(), rel=1e-3, abs=1e-4
    )  # the order of a batch means nothing
    assert out["loss"].item() == pytest.approx(
        sum(loss.weights[pair] * value.item() for pair, value in out.items() if pair != "loss"),
        rel=1e-4,
        abs=1e-5,
    )


@given(
    st.dictionaries(
        st.sampled_from([field.name for field in fields(TrainConfig)]),
        ANYTHING | st.sampled_from(["joint", "frozen", "none", "deep", "adam"]),
        max_size=3,
    )
)
def test_settings_are_kept_or_refused(values):
    try:
        config = TrainConfig(**values)
    except Cg3dError:
        return
    assert TrainConfig(**json.loads(json.dumps(asdict(config)))) == config and all(
        getattr(config, name) == value for name, value in values.items()
    )


@given(
    st.lists(
        st.tuples(st.sampled_from(["epochs", "lr", "color", "out", "nothing", ""]), st.text(max_size=8)),
        max_size=3,
    ),
    st.text(max_size=20),
)
def test_words_of_the_shell(pairs, encoder):
    with contextlib.suppress(Cg3dError):
        job_values("train", pairs=pairs)
    with contextlib.suppress(Cg3dError):
        encoder_choice(encoder)


WORDS = st.lists(
    st.sampled_from(
        [
            "a",
            "name",
            "`a b`",
            "==",
            "<",
            "and",
            "or",
            "not",
            "in",
            "(",
            ")",
            "[",
            "]",
            "1",
            "-",
            "'x'",
            "**",
            "9" * 30,
            ".",
            "lambda",
            ":",
            "@",
            "import",
            "None",
            "+",
            ",",
        ]
    ),
    max_size=8,
).map(" ".join)


@given(WORDS | st.text(max_size=12))
def test_filters(where):
    table = pd.DataFrame({"a": [1, 2, 3], "name": ["x", "y", None], "a b": [0.5, np.nan, 2]})
    with contextlib.suppress(Cg3dError):
        rows = Filter(where, table).mask()
        assert rows.dtype == bool and rows.shape == (3,)


@given(st.binary(max_size=200), st.integers(0, 300))
def test_lzf(data, size):
    literal = b"".join(
        bytes([len(part) - 1]) + part for part in (data[i : i + 32] for i in range(0, len(data), 32))
    )
    assert lzf_decompress(literal, len(data)) == data
    with contextlib.suppress(Cg3dError):
        assert len(lzf_decompress(data, size)) == size


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.tuples(inner, inner)
    ),
    max_leaves=8,
)


@given(PLAIN, st.integers(0, 4), st.binary(max_size=40), st.integers(0, 60))
def test_pickles(value, protocol, junk, at):
    whole = pickle.dumps(value, protocol)
    if protocol > 2:
        assert unpickle(whole) == value  # older ones write bytes as text of Python 2
    for data in (junk, whole[:at] + junk + whole[at:], whole[:at]):
        with contextlib.suppress(Cg3dError):
            unpickle(data)


@given(
    arrays(np.float32, st.tuples(st.integers(0, 6), st.integers(0, 4)), elements=st.floats(width=32)),
    st.integers(1, 8),
)
def test_nearest_rows(matrix, k):
    try:
        unit = unit_rows(matrix)
    except Cg3dError:
        return
    assert unit.shape == matrix.shape and np.allclose(
        np.linalg.norm(unit.astype(np.float64), axis=1), 1, atol=1e-3
    )
    for (scores, rows), slow in zip(exact_search(unit, unit, k), unit.astype(np.float64) @ unit.T):
        assert len(rows) == min(k, len(unit)) and np.allclose(scores, np.sort(slow)[::-1][:k], atol=1e-5)


@given(clouds(), st.floats(1e-3, 1e3), st.integers(1, 8))
def test_balls(points, radius, k):
    found = ball_query(points, points, radius, k)
    assert (
        found.shape == (*points.shape[:2], k) and 0 <= int(found.min()) and int(found.max()) < points.shape[1]
    )
