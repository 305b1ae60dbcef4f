"""Losses and metrics against independent oracles: torch's cross entropy, torchmetrics."""

import pytest
import torch
import torch.nn.functional as F

from cg3d.core import metrics
from cg3d.training import losses


def embeddings(seed=0, size=12, dim=8):
    generator = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(size, dim, generator=generator), dim=-1) for _ in range(3)]


def test_contrastive_is_clips_loss():
    a, b, _ = embeddings()
    logits, target = a @ b.T / 0.07, torch.arange(len(a))
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(losses.contrastive(5 * a, 3 * b), expected)


@pytest.mark.parametrize("positives", ["caption", "masked"])
def test_same_caption_is_never_a_negative(positives):
    """The loss equals one written out by hand, where an equal caption is a positive or absent."""
    points, image, text = embeddings()
    texts = ["chair"] * 2 + [f"thing {i}" for i in range(10)]
    loss = losses.TriModalLoss((1, 0, 0), positives=positives)
    scores = (points @ text.T / 0.07).requires_grad_()
    same = losses.same_caption(texts)
    targets = same / same.sum(-1, keepdim=True) if positives == "caption" else torch.eye(12)
    shown = scores.masked_fill(same & (targets == 0), -torch.inf)
    by_hand = (losses.soft_cross_entropy(shown, targets) + losses.soft_cross_entropy(shown.T, targets)) / 2
    by_hand.backward()
    if positives == "masked":
        assert scores.grad[0, 1] == 0
    torch.testing.assert_close(by_hand, loss(points, image, text, texts)["loss"])
    plain = losses.TriModalLoss((1, 0, 0), positives="diagonal")(points, image, text, texts)["loss"]
    assert not torch.isclose(plain, by_hand)


@pytest.mark.parametrize("positives", losses.POSITIVES)
@pytest.mark.parametrize("hard", [0.0, 0.5])
@pytest.mark.parametrize("texts", [["chair"] * 12, [str(i) for i in range(12)]])
def test_loss_is_finite_with_finite_gradients(positives, hard, texts):
    tensors = [t.clone().requires_grad_() for t in embeddings()]
    out = losses.TriModalLoss(positives=positives, hard_negatives=hard, learnable=True)(*tensors, texts)
    out["loss"].backward()
    assert out["loss"].isfinite() and all(t.grad.isfinite().all() for t in tensors)


def test_hard_negatives_push_the_hardest_more():
    points, image, text = embeddings()
    share = []
    for hard in (0.0, 0.8):
        scores = (points @ text.T / 0.07).requires_grad_()
        negative = ~torch.eye(12, dtype=torch.bool)
        losses.soft_cross_entropy(losses.reweight_negatives(scores, negative, hard), torch.eye(12)).backward()
        gradient = scores.grad.masked_fill(~negative, 0)
        share.append((gradient.amax(-1) / gradient.sum(-1)).mean())
    assert share[1] > share[0]


def test_decoupled_positives_do_not_compete():
    """Written out with loops over rows, positives and negatives, rows of equal text included."""
    generator = torch.Generator().manual_seed(5)
    points, image, text = (F.normalize(torch.randn(6, n, 8, generator=generator), dim=-1) for n in (1, 3, 2))
    texts = [["chair", "seat"], ["chair", "stool"], *([f"thing {i}", f"object {i}"] for i in range(4))]
    loss = losses.TriModalLoss(positives="decoupled")(points[:, 0], image, text, texts)

    def one_way(rows, columns, same_text):
        terms = []
        for i in range(6):
            for row_number, row in enumerate(rows[i]):
                others = [
                    (row @ columns[j, m] / 0.07).exp()
                    for j in range(6)
                    for m in range(columns.shape[1])
                    if j != i and not same_text(i, row_number, j, m)
                ]
                for column in columns[i]:
                    own = (row @ column / 0.07).exp()
                    terms.append(-(own / (own + sum(others))).log())
        return torch.stack(terms).mean()

    def either(i, _k, j, _m):
        return bool(set(texts[i]) & set(texts[j]))

    expected = {
        "3d_text": one_way(points, text, lambda i, k, j, m: texts[j][m] in texts[i])
        + one_way(text, points, lambda i, k, j, m: texts[i][k] in texts[j]),
        "3d_image": one_way(points, image, either) + one_way(image, points, either),
        "image_text": one_way(image, text, lambda i, k, j, m: texts[j][m] in texts[i])
        + one_way(text, image, lambda i, k, j, m: texts[i][k] in texts[j]),
    }
    for pair, value in expected.items():
        torch.testing.assert_close(loss[pair], value / 2)
    torch.testing.assert_close(loss["loss"], sum(expected.values()) / 2)


def test_one_positive_is_the_loss_with_equal_captions_left_out():
    sides, texts = embeddings(), ["chair"] * 3 + [f"thing {i}" for i in range(9)]
    decoupled, masked = (
        losses.TriModalLoss(positives=kind, hard_negatives=0.3)(*sides, texts)
        for kind in ("decoupled", "masked")
    )
    for name, value in decoupled.items():
        torch.testing.assert_close(value, masked[name])


@pytest.mark.parametrize("positives", ["caption", "masked", "diagonal", "decoupled"])
@pytest.mark.parametrize(
    "texts", [[("chair", "seat")] * 5, [(f"thing {i}", f"object {i}") for i in range(5)]]
)
def test_several_positives_have_finite_gradients(positives, texts):
    generator = torch.Generator().manual_seed(1)
    points, image, text = (
        torch.randn(5, *shape, generator=generator).requires_grad_() for shape in ((8,), (3, 8), (2, 8))
    )
    out = losses.TriModalLoss(positives=positives, hard_negatives=0.4)(points, image, text, texts)
    out["loss"].backward()
    assert out["loss"].isfinite() and all(side.grad.isfinite().all() for side in (points, image, text))


def test_similar_texts_take_one_positive():
    points, image, text = torch.randn(4, 8), torch.randn(4, 2, 8), torch.randn(4, 8)
    with pytest.raises(ValueError, match="takes one view and one text"):
        losses.TriModalLoss(positives="similar")(points, image, text, ["a", "b", "c", "d"])


def test_ranks_match_torchmetrics():
    retrieval = pytest.importorskip("torchmetrics.functional.retrieval")
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_jaccard_index

    generator = torch.Generator().manual_seed(3)
    scores, relevant = torch.rand(40, 30, generator=generator), torch.rand(40, 30, generator=generator) < 0.1
    relevant[:, 0] = True
    pairs = list(zip(scores, relevant))
    assert metrics.mean_average_precision(scores, relevant) == pytest.approx(
        torch.stack([retrieval.retrieval_average_precision(s, r) for s, r in pairs]).mean().item(), abs=1e-6
    )
    for k in (1, 5):
        assert metrics.recall_at_k(scores, relevant, k) == pytest.approx(
            torch.stack([retrieval.retrieval_hit_rate(s, r, top_k=k) for s, r in pairs]).mean().item(),
            abs=1e-6,
        )
    reciprocal = torch.stack([retrieval.retrieval_reciprocal_rank(s, r) for s, r in pairs])
    torch.testing.assert_close(1 / metrics.first_rank(scores, relevant), reciprocal, check_dtype=False)

    logits, target = (
        torch.randn(200, 7, generator=generator),
        torch.randint(0, 6, (200,), generator=generator),
    )
    for k, value in metrics.top_k(logits, target).items():
        assert value == pytest.approx(
            multiclass_accuracy(logits, target, 7, average="micro", top_k=k).item(), abs=1e-6
        )
    present = multiclass_accuracy(logits, target, 7, average=None)[:6]
    assert metrics.mean_class_accuracy(logits, target) == pytest.approx(present.mean().item(), abs=1e-6)
    mask, truth = torch.rand(500, generator=generator) < 0.4, torch.rand(500, generator=generator) < 0.3
    assert metrics.iou(mask, truth).item() == pytest.approx(
        multiclass_jaccard_index(mask.long(), truth.long(), 2, average=None)[1].item(), abs=1e-6
    )
