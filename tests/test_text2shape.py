"Text2Shape: its files in miniature, what is refused, and the published protocol against a calculation by hand."

import json
import pickle
from math import log2

import numpy as np
import pytest
import torch
import trimesh

from cg3d.core.metrics import ndcg_at_k
from cg3d.data.text2shape import read_captions, read_text2shape
from cg3d.evaluation.text_to_shape import text2shape_scores

WORDS = ["a", "brown", "chair", "table", "round", "\n"]
TUPLES = [
    (np.array([1, 2, 3, 0, 0]), "03001627", "aa.nrrd"),
    (np.array([1, 3, 6, 0, 0]), "03001627", "aa.nrrd"),
    (np.array([1, 5, 4, 0, 2]), "04379243", "bb.nrrd"),
    (np.array([1, 2, 4]), "04379243", "bb.nrrd"),
    (np.array([1, 4, 0]), "04379243", "cc.nrrd"),
]


@pytest.fixture
def folder(tmp_path):
    words = {"idx_to_word": {str(i + 1): word for i, word in enumerate(WORDS)}}
    (tmp_path / "shapenet.json").write_text(json.dumps(words))
    (tmp_path / "processed_captions_test.p").write_bytes(pickle.dumps({"caption_tuples": TUPLES}))
    mesh = tmp_path / "ShapeNetCore.v2" / "03001627" / "aa" / "models"
    mesh.mkdir(parents=True)
    trimesh.creation.box((1, 2, 1)).export(mesh / "model_normalized.obj")
    cloud = np.random.default_rng(0).random((50, 6), np.float32)
    np.save(tmp_path / "ShapeNetCore.v2" / "04379243-bb.npy", cloud)
    return tmp_path


def test_captions_and_shapes_of_both_forms(folder):
    data = read_text2shape(folder, folder / "ShapeNetCore.v2")
    assert data.captions.caption.tolist() == ["a brown chair", "a chair", "a round table", "a brown table"]
    assert data.captions["shape"].tolist() == [0, 0, 1, 1]
    assert data.shapes.id.tolist() == ["03001627-aa", "04379243-bb"] and len(data) == 2
    assert data.shapes.category.tolist() == ["chair", "table"]
    assert data.left_out == {"shapes": 1, "captions": 1}
    assert data.read(0, 300).points.shape == (300, 3) and np.ptp(data.read(0).points[:, 1]) > 1.9
    assert data.read(1).colors.shape == (50, 3)


def test_files_of_another_form_are_refused(folder):
    with pytest.raises(ValueError, match="split='dev' is none of train, val, test"):
        read_captions(folder, "dev")
    with pytest.raises(FileNotFoundError, match="processed_captions_val.p"):
        read_captions(folder, "val")
    with pytest.raises(FileNotFoundError, match="none of the 3 shapes of test.*03001627/aa/models"):
        read_text2shape(folder, folder / "nowhere")
    for content, words in (
        ({"captions": []}, "no list caption_tuples"),
        ({"caption_tuples": [(1, 2)]}, "not .token ids, synset, model"),
        ({"caption_tuples": [(np.array([99]), "x", "y")]}, "token 99 is no word"),
        ({"caption_tuples": []}, "no captions"),
    ):
        (folder / "processed_captions_test.p").write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=words):
            read_captions(folder)
    (folder / "shapenet.json").write_text("{}")
    with pytest.raises(ValueError, match="no table idx_to_word"):
        read_captions(folder)


class Fixed:
    "Embeddings that are written down: the first caption finds the wrong shape, the others the right one."

    texts = {"a brown chair": 1, "a chair": 0, "a round table": 1, "a brown table": 1}

    def encode_shape(self, shapes):
        return torch.eye(2)[: len(shapes)]

    def encode_text(self, texts):
        return torch.eye(2)[[self.texts[text] for text in texts]]


def test_scores_by_hand(folder):
    scores = text2shape_scores(Fixed(), read_text2shape(folder, folder / "ShapeNetCore.v2"))
    assert scores.loc["model", "RR@1"] == 75 and scores.loc["model", "RR@5"] == 100
    assert scores.loc["model", "NDCG@5"] == pytest.approx(100 * (3 + 1 / log2(3)) / 4)
    assert scores.loc["chance", "RR@1"] == 50 and scores.loc["chance", "NDCG@5"] == pytest.approx(
        100 * (1 + 1 / log2(3)) / 2
    )
    assert scores.loc["model", ["split", "templates", "up", "file"]].tolist() == [
        "test",
        "captions as they are",
        "y",
        "-",
    ]
    assert scores.loc["model", "queries"] == 4 and scores.loc["model", "left out"] == "1 shapes, 1 captions"


def test_ndcg_counts_ties_against_the_model_and_several_right_answers():
    right = torch.tensor([[True, False, True, False]])
    assert ndcg_at_k(torch.tensor([[4.0, 3, 2, 1]]), right, 5) == pytest.approx((1 + 0.5) / (1 + 1 / log2(3)))
    assert ndcg_at_k(torch.zeros(1, 4), right, 2) == 0
    with pytest.raises(ValueError, match="k=0"):
        ndcg_at_k(torch.zeros(1, 4), right, 0)
