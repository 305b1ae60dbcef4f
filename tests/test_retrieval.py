"""Retrieval from end to end: any query, filters, the life of an index, files that cannot be trusted, and the numbers."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from cg3d.core import atomic as folders_module
from cg3d.core.atomic import MANIFEST
from cg3d.core.errors import InputError
from cg3d.core.metrics import mean_average_precision, recall_at_k
from cg3d.evaluation.zero_shot import ENCODER, IMAGE_TOWER
from cg3d.io.collection import Collection, write_collection
from cg3d.io.shape import Shape
from cg3d.models.cg3d import CG3D
from cg3d.models.clip_backbone import load_backbone
from cg3d.search import backends as vectors_module
from cg3d.search import index as index_module
from cg3d.search.backends import (
    approximate_search,
    build_faiss,
    cell_count,
    choose_kind,
    exact_search,
    unit_rows,
)
from cg3d.search.encode import with_ids
from cg3d.search.filters import Filter
from cg3d.search.index import ShapeIndex
from cg3d.search.retrieval import (
    CHANCE,
    TASKS,
    RetrievalConfig,
    results_figure,
    results_image,
    retrieval_scores,
)

ROOT = Path(__file__).parent.parent
FINGERPRINT = "f" * 64


@pytest.fixture(scope="module")
def model() -> CG3D:
    torch.manual_seed(0)
    return CG3D.build(
        backbone=load_backbone("nano", "random"), encoder="pointnet", points=64, clip_weights="random"
    ).eval()


@pytest.fixture(scope="module")
def collection(tmp_path_factory) -> Collection:
    """Eight boxes and eight balls of other widths and colors."""
    rng, shapes = np.random.default_rng(0), []
    for i in range(16):
        points = rng.uniform(-1, 1, (128, 3)) * (1, 0.2 + i / 8, 1)
        if i % 2:
            points /= np.linalg.norm(points, axis=1, keepdims=True)
        shapes.append(
            Shape(
                points,
                np.broadcast_to(rng.random(3), (128, 3)),
                name="ball" if i % 2 else "box",
                category="ball" if i % 2 else "box",
                size=(1.0, 0.1 * i + 0.1, 1.0),
                id=f"shape/{i}",
                caption=f"a thing of number {i // 2}",
            )
        )
    return write_collection(tmp_path_factory.mktemp("set") / "set", shapes, n=128)


@pytest.fixture
def index(model, collection) -> ShapeIndex:
    return ShapeIndex.from_items(model, collection)


def random_index(count: int = 500, dim: int = 32, seed: int = 0, **options) -> ShapeIndex:
    rng = np.random.default_rng(seed)
    table = pd.DataFrame(
        {
            "name": [f"shape {i % 50}" for i in range(count)],
            "category": rng.choice(["chair", "table", "lamp"], count),
            "height": rng.random(count),
            "judged": rng.integers(0, 2, count),
        }
    )
    return ShapeIndex.from_embeddings(
        rng.normal(size=(count, dim)).astype("float32"), table, FINGERPRINT, **options
    )


# ------------------------------------------------------------------ search


@pytest.mark.parametrize("seed", range(5))
def test_exact_search_is_the_sorted_list_of_cosines(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    count, k = int(rng.integers(1, 300)), int(rng.integers(1, 40))
    vectors, queries = (
        unit_rows(rng.normal(size=(count, 8)).round(0) + 0.01),
        unit_rows(rng.normal(size=(5, 8))),
    )
    vectors[rng.integers(0, count, count // 3)] = vectors[0]  # many ties
    monkeypatch.setattr(vectors_module, "CHUNK_SIZE", int(rng.integers(1, 100)))
    rows = np.flatnonzero(rng.random(count) < 0.5)
    for allowed in (None, rows):
        for (score, row), query in zip(exact_search(vectors, queries, k, allowed), queries):
            there = range(count) if allowed is None else allowed.tolist()
            cosine = {i: float(np.dot(vectors[i].astype(float), query.astype(float))) for i in there}
            assert len(row) == min(k, len(cosine)) == len(set(row))
            np.testing.assert_allclose(score, sorted(cosine.values(), reverse=True)[:k], atol=1e-5)
            np.testing.assert_allclose(score, [cosine[i] for i in row], atol=1e-5)


def test_ties_stand_in_row_order():
    index = ShapeIndex.from_embeddings(
        np.ones((10, 4), "float32"), pd.DataFrame({"name": list("abcdefghij")}), FINGERPRINT
    )
    assert index.search(np.ones(4), k=4)["row"].tolist() == [0, 1, 2, 3]


def test_every_kind_of_query(index, model, collection):
    view = torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(0))
    picture = Image.fromarray((255 * view).byte().permute(1, 2, 0).numpy())
    asked = {
        "text": ("a box", model.encode_text("a box")),
        "texts": (["a box", "a ball"], model.encode_text(["a box", "a ball"])),
        "shape": (collection[3], model.encode_shape(collection[3])),
        "shapes": ([collection[3], collection[4]], model.encode_shape([collection[3], collection[4]])),
        "picture": (picture, model.encode_image(picture)),
        "pictures": ([picture, picture], model.encode_image([picture, picture])),
        "tensor": (view, model.encode_image(view)),
        "clouds": (collection.points(slice(3)), model.encode_shape(collection.points(slice(3)))),
        "vector": (index.vectors[2], torch.from_numpy(index.vectors[2:3])),
        "vectors": (torch.from_numpy(index.vectors[2:5]), torch.from_numpy(index.vectors[2:5])),
    }
    for kind, (query, vectors) in asked.items():
        found, cosine = index.search(query, k=4), vectors.numpy() @ index.vectors.T
        assert len(found) == 4 * len(vectors) and found["rank"].tolist() == [1, 2, 3, 4] * len(vectors), kind
        np.testing.assert_allclose(
            found["score"].to_numpy().reshape(-1, 4), -np.sort(-cosine)[:, :4], atol=1e-5, err_msg=kind
        )
    assert list(index.search("a box").columns[:6]) == ["query", "rank", "score", "row", "id", "name"]
    assert index.search(["a box", "a ball"], k=1)["query"].tolist() == ["a box", "a ball"]
    assert index.search(collection[3], k=1)["id"].tolist() == ["shape/3"], "a shape finds itself"
    assert len(index.search("a box", k=99)) == 16


def test_words_answer_a_shape(model, collection):
    words = ShapeIndex.from_items(model, ["a box", "a ball"])
    assert set(words.search(collection[0])["name"]) == {"a box", "a ball"} and words.content == "text"
    captions = ShapeIndex.from_items(model, collection, content="caption")
    cosine = model.encode_text(collection.table["caption"].tolist()) @ model.encode_shape(collection[0])[0]
    np.testing.assert_allclose(captions.search(collection[0], k=1)["score"], cosine.max(), atol=1e-5)
    with pytest.raises(ValueError, match="content='captoin' is neither.*caption"):
        ShapeIndex.from_items(model, collection, content="captoin")


def test_texts_of_a_table_are_in_one_piece(tmp_path):
    """Rows taken out of a pyarrow array of several pieces cost a copy of the whole column."""

    def pieces(index):
        return [getattr(index.table[name].array, "_pa_array", None) for name in ("id", "name", "category")]

    index = ShapeIndex.load(random_index(300_000, 2).save(tmp_path / "index"))
    assert all(piece is None or piece.num_chunks == 1 for piece in pieces(index))
    before = index.search(np.ones(2), k=3)
    index.add(-np.ones((1, 2), "float32"), pd.DataFrame({"name": ["far"]}), fingerprint=FINGERPRINT)
    assert (
        all(piece is None or piece.num_chunks == 1 for piece in pieces(index))
        and index.search(np.ones(2), k=3)["id"].tolist() == before["id"].tolist()
    )


def test_columns_of_the_table_that_have_the_names_of_results_are_kept():
    index = ShapeIndex.from_embeddings(
        np.eye(3, dtype="float32"),
        pd.DataFrame({"name": list("abc"), "query": list("xyz"), "rank": [7, 8, 9]}),
        FINGERPRINT,
    )
    found = index.search(np.eye(3)[1], k=1)
    assert found[["rank", "query_", "rank_", "name"]].to_numpy().tolist() == [[1, "y", 8, "b"]]


# ------------------------------------------------------------------ filters


@pytest.mark.parametrize(
    "where",
    [
        "category == 'chair'",
        "height < 0.3 and judged == 1",
        "height < 0.3 & judged == 1 | category == 'lamp'",
        "category in ['chair', 'lamp'] and not height > 0.5",
        "name.str.contains('1')",
        "0.2 <= height < 0.4",
        "height * 2 - judged > 0.5",
        "category != 'chair' and height.between(0.1, 0.2)",
    ],
)
def test_filters_are_what_pandas_says(where):
    index = random_index()
    assert Filter(where, index.table).mask().tolist() == index.table.eval(where, engine="python").tolist()
    found = index.search(index.vectors[0], k=500, where=where)
    assert (
        set(found["row"]) == set(index.table.query(where, engine="python").index)
        and found["score"].is_monotonic_decreasing
    )


def test_a_filter_that_nothing_matches_gives_an_empty_table(index):
    found = index.search(["a box", "a ball"], where="height > 99")
    assert found.empty and {"query", "rank", "score", "id", "name", "category"} <= set(found)


@pytest.mark.parametrize(
    "where,words",
    [
        ("@index", "not an expression"),
        ("category", "true or false for every row"),
        ("color == 1", "no column 'color'; there are .*height"),
        ("open('x')", "not allowed"),
        ("().__class__", "not allowed"),
        ("name.values.tofile('x')", "'tofile' is not allowed"),
        ("category.apply(print)", "'apply' is not allowed"),
        ("index == 3", "no column 'index'"),
        ("", "blank"),
        ("height <", "not an expression"),
        ("height.__init__()", "not allowed"),
        ("name.str.contains(name)", "must be constants"),
        ("height > 'a'", "does not fit"),
        ("a := 3", "not an expression"),
        ("x" * 3000, "2,000"),
        ("name.str", "not allowed"),
    ],
)
def test_filters_run_no_code(where, words):
    with pytest.raises(ValueError, match=words):
        random_index(20).search(np.ones(32), where=where)


# ------------------------------------------------------------------ bad queries


@pytest.mark.parametrize(
    "query,error,words",
    [
        ("", ValueError, "empty"),
        ("   ", ValueError, "blank"),
        (["a box", "\t"], ValueError, "query 1 is blank"),
        ([], ValueError, "list is empty"),
        ("!!", ValueError, "no word"),
        (["a box", None], TypeError, "one kind|NoneType"),
        (7, TypeError, "a query is"),
        (None, TypeError, "a query is"),
        (np.zeros(384), ValueError, "no direction"),
        (np.full(384, np.nan), ValueError, "NaN"),
        (np.ones(5), ValueError, "length 5 does not fit an index of length 384"),
        (np.ones((0, 384)), ValueError, "empty"),
        (np.arange(384), TypeError, "floats"),
    ],
)
def test_queries_that_ask_for_nothing(index, query, error, words):
    with pytest.raises(error, match=words):
        index.search(query)


@pytest.mark.parametrize("k", [0, -1, 2.5, True, "3"])
def test_k_is_a_count(index, k):
    with pytest.raises(ValueError, match="k="):
        index.search("a box", k=k)


@pytest.mark.parametrize(
    "query,script",
    [
        ("красный стул", "cyrillic"),
        ("赤い椅子", "cjk|hiragana"),
        ("كرسي أحمر", "arabic"),
        ("κόκκινη καρέκλα", "greek"),
        ("의자", "hangul"),
    ],
)
def test_another_script_is_answered_with_a_warning(index, query, script):
    with pytest.warns(UserWarning, match=f"{script} script.*nano.*English"):
        found = index.search(query, k=3)
    assert len(found) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        index.search(["ein Stuhl für zwei", "π chair", "café table"])


# ------------------------------------------------------------------ fingerprints


def test_another_model_is_refused(index, model, collection, tmp_path):
    torch.manual_seed(1)
    stranger = CG3D.build(backbone=model.backbone, encoder="pointnet", points=64)
    folder = index.save(tmp_path / "index")
    opened = ShapeIndex.load(folder)
    for work in (
        lambda: ShapeIndex.load(folder, stranger),
        lambda: opened.search("a box", model=stranger),
        lambda: opened.search(opened.vectors[0], model=stranger),
        lambda: opened.add(collection[0], model=stranger),
        lambda: opened.add(
            np.eye(384, dtype="float32")[:1],
            pd.DataFrame({"name": ["x"]}),
            fingerprint=stranger.fingerprint(),
        ),
    ):
        with pytest.raises(ValueError, match="another model.*fingerprint"):
            work()
    with pytest.raises(ValueError, match="pass the model="):
        opened.search("a box")
    pd.testing.assert_frame_equal(opened.search("a box", model=model), index.search("a box"))
    pd.testing.assert_frame_equal(opened.search("a box"), index.search("a box"))  # bound by now


def test_a_bound_model_that_learns_on_is_noticed(collection):
    torch.manual_seed(0)
    model = CG3D.build(
        backbone=load_backbone("nano", "random"), encoder="pointnet", points=64, clip_weights="random"
    ).eval()
    index = ShapeIndex.from_items(model, collection)
    optimizer = torch.optim.SGD(model.encoder.parameters(), lr=0.1)
    model.encoder(collection.points(slice(2), n=64)).sum().backward()
    index.search("a box")
    optimizer.step()
    with pytest.raises(ValueError, match="another model"):
        index.search("a box")


def test_fingerprint_is_of_the_weights(model, tmp_path):
    from cg3d.pretrained.factory import load

    model.save(tmp_path / "model")
    assert load(tmp_path / "model", backbone=model.backbone).fingerprint() == model.fingerprint()
    with pytest.raises(TypeError, match="CG3D model.*got Linear"):
        ShapeIndex.from_embeddings(np.eye(3), pd.DataFrame({"name": list("abc")}), "f").attach_model(
            torch.nn.Linear(2, 2)
        )
    with pytest.raises(ValueError, match="fingerprint"):
        ShapeIndex.from_embeddings(np.eye(3), pd.DataFrame({"name": list("abc")}), "")


# ------------------------------------------------------------------ add and remove


def test_add_and_remove_are_building_anew(index, model, collection):
    part = collection.select(np.arange(16) < 10)
    grown = ShapeIndex.from_items(model, part).add(collection.select(np.arange(16) >= 10))
    np.testing.assert_allclose(grown.vectors, index.vectors, atol=1e-5)
    assert grown.table["id"].tolist() == index.table["id"].tolist()
    assert (
        grown.delete(["shape/0", "shape/15"]) == 2
        and grown.delete(where="category == 'ball'") == 7
        and len(grown) == 7
    )
    assert set(grown.search("a ball", k=99)["category"]) == {"box"} and "shape/0" not in set(
        grown.table["id"]
    )
    with pytest.raises(ValueError, match="'shape/0'"):
        grown.delete("shape/0")
    with pytest.raises(ValueError, match="'shape/2' is in the index already"):
        grown.add(collection[2])
    with pytest.raises(ValueError, match="ids or where"):
        grown.delete()
    assert grown.delete(where="height > 0") == 7
    with pytest.raises(ValueError, match="index is empty"):
        grown.search("a box")
    grown.add([Shape(np.eye(3), name="mine"), Shape(np.eye(3), name="mine")])
    assert grown.table["id"].tolist() == ["mine", "mine#2"]


def test_ids_are_given_where_they_are_missing():
    table = with_ids(pd.DataFrame({"name": ["a", "a", "b", None], "id": ["", "7", None, ""]}), used=["a"])
    assert table["id"].tolist() == ["a#2", "7", "b", "shape"] and table["name"].tolist() == [
        "a",
        "a",
        "b",
        "",
    ]
    with pytest.raises(ValueError, match="no column 'name'"):
        with_ids(pd.DataFrame({"title": ["x"]}))


@pytest.mark.parametrize(
    "matrix,table,error,words",
    [
        (np.ones((2, 3)), ["a"], ValueError, "2 embeddings but 1 rows"),
        (np.ones((0, 3)), [], ValueError, "nothing to index"),
        (np.ones((1, 3), int), ["a"], TypeError, "floats"),
        (np.array([[1.0, np.inf]]), ["a"], ValueError, "row 0"),
        (np.zeros((1, 3)), ["a"], ValueError, "row 0"),
        (np.ones(3), ["a"] * 3, ValueError, r"\(N, D\)"),
    ],
)
def test_embeddings_that_are_none(matrix, table, error, words):
    with pytest.raises(error, match=words):
        ShapeIndex.from_embeddings(matrix, pd.DataFrame({"name": table}), FINGERPRINT)


# ------------------------------------------------------------------ files


def test_save_and_open_keep_everything(tmp_path):
    index = random_index()
    index.table = index.table.assign(
        when=pd.Timestamp("2026-01-01"),
        kind=pd.Categorical(index.table["category"]),
        blank="",
        small=np.int8(3),
        note=["x", None] * 250,
    )
    opened = ShapeIndex.load(index.save(tmp_path / "deep" / "index"))
    pd.testing.assert_frame_equal(opened.table, index.table)
    assert isinstance(opened.vectors, np.memmap) and np.array_equal(opened.vectors, index.vectors)
    assert (opened.fingerprint, opened.model, opened.content, opened.kind) == (
        index.fingerprint,
        index.model,
        index.content,
        index.kind,
    )
    opened.verify()
    opened.delete(where="height < 0.5")
    assert len(ShapeIndex.load(opened.save(tmp_path / "deep" / "index"))) == len(opened) < 500
    assert (
        len(list((tmp_path / "deep" / "index").iterdir())) == 3
        and len(list((tmp_path / "deep").iterdir())) == 1
    ), "nothing old is left"
    with pytest.raises(ValueError, match="in memory"):
        index.verify()


@pytest.mark.parametrize("name", ["vectors", "table", "faiss", MANIFEST])
@pytest.mark.parametrize("left", [0, 0.5, -1])
def test_a_file_cut_short_is_refused_at_opening(tmp_path, name, left):
    pytest.importorskip("faiss")
    folder = random_index(kind="hnsw").save(tmp_path / "index")
    (path,) = folder.glob(f"{name}*")
    data = path.read_bytes()
    path.write_bytes(
        data[: int(left * len(data))] if left >= 0 else data[:-1] if name != MANIFEST else data[:-3]
    )
    with pytest.raises(ValueError, match="cut short"):
        ShapeIndex.load(folder)


def test_a_changed_byte_and_a_missing_file_are_found(tmp_path):
    folder = random_index().save(tmp_path / "index")
    (path,) = folder.glob("vectors*")
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    opened = ShapeIndex.load(folder)
    with pytest.raises(ValueError, match="SHA-256"):
        opened.verify()
    path.unlink()
    with pytest.raises(FileNotFoundError, match="missing"):
        ShapeIndex.load(folder)
    with pytest.raises(FileNotFoundError, match="no manifest.json"):
        ShapeIndex.load(tmp_path)
    (folder / MANIFEST).write_text(
        json.dumps(json.loads((folder / MANIFEST).read_text()) | {"format": "other", "files": {}})
    )
    with pytest.raises(ValueError, match="vectors.npy"):
        ShapeIndex.load(folder)


def test_a_damaged_faiss_file_is_not_given_to_faiss(tmp_path):
    pytest.importorskip("faiss")
    folder = random_index(kind="hnsw").save(tmp_path / "index")
    (path,) = folder.glob("faiss*")
    path.write_bytes(bytes(len(path.read_bytes())))
    with pytest.raises(ValueError, match="SHA-256"):
        ShapeIndex.load(folder).search(np.ones(32))


@pytest.mark.parametrize("step", ["save vectors", "save table", "move", "manifest"])
def test_a_save_that_fails_leaves_the_old_index(tmp_path, monkeypatch, step):
    old, new, folder = random_index(seed=0), random_index(400, seed=1), tmp_path / "index"

    def fail(*_, **__):
        raise OSError("no space left on device")

    replace = os.replace
    failing_name = {"move": "vectors", "manifest": MANIFEST}.get(step)

    def failing_replace(source, target):
        if failing_name and Path(target).name.startswith(failing_name):
            fail()
        replace(source, target)

    for there in (False, True):
        if there:
            old.save(folder)
        with monkeypatch.context() as patch:
            if step == "save vectors":
                patch.setattr(index_module.np, "save", fail)
            if step == "save table":
                patch.setattr(pd.DataFrame, "to_parquet", fail)
            if step in ("move", "manifest"):
                patch.setattr(folders_module.os, "replace", failing_replace if there else fail)
            with pytest.raises(OSError, match="no space"):
                new.save(folder)
        assert [path.name for path in tmp_path.iterdir()] == ["index"] * there, "no scratch is left"
        if there:
            np.testing.assert_array_equal(ShapeIndex.load(folder).vectors, old.vectors)
            ShapeIndex.load(folder).verify()
    np.testing.assert_array_equal(ShapeIndex.load(new.save(folder)).vectors, new.vectors)


def test_a_folder_with_other_things_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="did not write it"):
        random_index(20).save(tmp_path)
    with pytest.raises(FileExistsError, match="did not write it"):
        random_index(20).save(tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "x"


def test_an_open_index_may_be_saved_over_itself(tmp_path):
    index = random_index()
    opened, reader = ShapeIndex.load(index.save(tmp_path / "index")), ShapeIndex.load(tmp_path / "index")
    before = reader.search(index.vectors[3])
    opened.add(-index.vectors[:5], pd.DataFrame({"name": ["new"] * 5}), fingerprint=FINGERPRINT).save(
        tmp_path / "index"
    )
    assert len(ShapeIndex.load(tmp_path / "index")) == 505
    pd.testing.assert_frame_equal(reader.search(index.vectors[3]), before)  # the old files are still mapped


LOAD_LARGE = """
import resource, sys
import numpy as np
from cg3d.search.index import ShapeIndex
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
index = ShapeIndex.load(sys.argv[1])
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(type(index.vectors).__name__, "table" in vars(index), index._faiss_index is None, grown, len(index))
"""


def test_loading_reads_neither_vectors_nor_table(tmp_path):
    """A file of 400 MB (sparse on the disk) is memory-mapped: the memory of the process does not grow by it."""
    folder = random_index(100, 128).save(tmp_path / "index")
    facts = json.loads((folder / MANIFEST).read_text())
    (path,) = folder.glob("vectors*")
    huge = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(800_000, 128))
    del huge
    facts["count"], facts["files"]["vectors.npy"]["bytes"] = 800_000, path.stat().st_size
    (folder / MANIFEST).write_text(json.dumps(facts))
    command = [sys.executable, "-c", LOAD_LARGE, str(folder)]
    output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    assert output[:3] == ["memmap", "False", "True"] and int(output[4]) == 800_000
    assert int(output[3]) < 20_000, "kilobytes"


def test_another_format_is_refused_with_the_remedy(tmp_path):
    folder = random_index().save(tmp_path / "index")
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"format": "cg3d-index-0"}))
    with pytest.raises(InputError, match="'cg3d-index-0'.*reads 'cg3d-index-1'; build the index again"):
        ShapeIndex.load(folder)


def test_an_index_written_before_the_renaming_is_read(tmp_path):
    """The manifest of format 1 as it was first written, key by key."""
    index = random_index(20, kind="exact", content="caption", model="nano")
    folder = index.save(tmp_path / "index")
    manifest = json.loads((folder / MANIFEST).read_text())
    assert {key: value for key, value in manifest.items() if key != "files"} == {
        "format": "cg3d-index-1",
        "kind": "exact",
        "count": 20,
        "dim": 32,
        "of": "caption",
        "model": "nano",
        "fingerprint": FINGERPRINT,
    }
    assert sorted(manifest["files"]) == ["table.parquet", "vectors.npy"]
    assert ShapeIndex.load(folder).content == "caption"


# ------------------------------------------------------------------ approximate search


def grouped(count: int, dim: int = 32, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return unit_rows(
        (
            rng.normal(size=(60, dim))[rng.integers(60, size=count)] + 0.3 * rng.normal(size=(count, dim))
        ).astype("float32")
    )


@pytest.mark.parametrize("kind,least", [("flat", 1.0), ("hnsw", 0.95), ("ivfpq", 0.9)])
def test_faiss_finds_what_the_scan_finds(tmp_path, kind, least):
    pytest.importorskip("faiss")
    data = grouped(3050)
    rows, queries = data[:3000], data[3000:]
    table = pd.DataFrame({"name": [str(i) for i in range(3000)], "even": np.arange(3000) % 2 == 0})
    index, exact = (
        ShapeIndex.from_embeddings(rows, table, FINGERPRINT, kind=name) for name in (kind, "exact")
    )
    truth = exact.search(queries, k=10)

    def share(found):
        return np.mean(
            [
                len(set(a) & set(b)) / 10
                for a, b in zip(
                    found["row"].to_numpy().reshape(-1, 10), truth["row"].to_numpy().reshape(-1, 10)
                )
            ]
        )

    found = index.search(queries, k=10)
    assert index.kind == kind and share(found) >= least
    np.testing.assert_allclose(
        found["score"], (rows[found["row"]] * np.repeat(queries, 10, 0)).sum(1), atol=1e-5
    )
    opened = ShapeIndex.load(index.save(tmp_path / "index"))
    pd.testing.assert_frame_equal(opened.search(queries, k=10), found)
    pd.testing.assert_frame_equal(
        opened.search(queries, k=10, where="even"), exact.search(queries, k=10, where="even")
    )
    opened.add(
        queries,
        pd.DataFrame({"name": [f"query {i}" for i in range(50)], "even": True}),
        fingerprint=FINGERPRINT,
    )
    assert opened.search(queries, k=1)["name"].tolist() == [f"query {i}" for i in range(50)], (
        "added rows are found"
    )
    opened.delete(where="name.str.startswith('query')")
    assert share(opened.search(queries, k=10)) >= least and opened.search(queries, k=10)["row"].max() < 3000


def test_the_kind_is_chosen_by_size_or_name(monkeypatch):
    pytest.importorskip("faiss")
    assert [choose_kind("auto", count) for count in (10, 99_999, 100_000, 10_000_000)] == [
        "exact",
        "exact",
        "ivfpq",
        "ivfpq",
    ]
    assert [cell_count(count) for count in (1_000, 100_000, 1_000_000, 10_000_000)] == [
        16,
        512,
        2048,
        8192,
    ], "about the root of the rows"
    assert choose_kind("flat", 10) == "flat"
    with pytest.raises(ValueError, match="'hsnw' is unknown; choose from auto, exact, flat, hnsw, ivfpq"):
        random_index(kind="hsnw")
    with pytest.raises(ValueError, match="at least 1,000 rows"):
        random_index(kind="ivfpq").search(np.ones(32))
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"pip install '.*\[search\]'"):
        random_index(kind="hnsw").search(np.ones(32))
    assert random_index().search(np.ones(32), k=3)["rank"].tolist() == [1, 2, 3], "the scan needs no faiss"


@pytest.fixture(scope="module")
def many() -> tuple[np.ndarray, np.ndarray, list[set]]:
    """20,000 rows of 128 numbers that lie near a plane of 12, as embeddings do; queries near them, and queries as far as texts are from shapes."""
    rng = np.random.default_rng(0)
    plane = rng.normal(size=(12, 128))
    rows = unit_rows(
        (rng.normal(size=(20_000, 12)) @ plane + 0.5 * rng.normal(size=(20_000, 128))).astype("float32")
    )
    queries = unit_rows(
        np.concatenate(
            [
                rows[:100] + 0.02 * rng.normal(size=(100, 128)),
                rng.normal(size=(100, 12)) @ plane + 8 * rng.normal(size=(100, 128)),
            ]
        ).astype("float32")
    )
    assert (queries[100:] @ rows.T).max(1).mean() < 0.6 < 0.9 < (queries[:100] @ rows.T).max(1).mean()
    return rows, queries, [set(row) for _, row in exact_search(rows, queries, 10)]


@pytest.mark.parametrize(
    "kind,least,most", [("flat", 1, 513), ("hnsw", 0.99, 128 + 300), ("ivfpq", 0.9, 16 + 8 + 20)]
)
def test_recall_and_size_of_each_kind(many, tmp_path, kind, least, most):
    """Near and far queries; bytes a vector of the file: vectors, 8 bits a number and links, or half a byte for four numbers, a row number and centers."""
    faiss = pytest.importorskip("faiss")
    rows, queries, truth = many
    index = ShapeIndex.from_embeddings(
        rows, pd.DataFrame({"name": np.arange(20_000).astype(str)}), FINGERPRINT, kind=kind
    )
    found = index.search(queries)["row"].to_numpy().reshape(-1, 10)
    for part in (slice(0, 100), slice(100, 200)):
        assert np.mean([len(set(row) & true) / 10 for row, true in zip(found[part], truth[part])]) >= least
    assert len(faiss.serialize_index(index.faiss_index())) / 20_000 < most
    if kind != "flat":
        (path,) = index.save(tmp_path / "index").glob("faiss*")
        assert path.stat().st_size / 20_000 < most
    every = index.search(queries[150], k=15_000)
    assert len(set(every["row"])) == 15_000 and every["score"].is_monotonic_decreasing, (
        "as many as asked for, though a structure proposes fewer"
    )


def test_turning_the_axes_keeps_cosines_and_sharpens_codes(many):
    """Codes that get four numbers as they stand, against codes among which the spread is dealt."""
    faiss = pytest.importorskip("faiss")
    rows, queries, truth = many
    turned = build_faiss("ivfpq", rows)
    turn = faiss.vector_to_array(faiss.downcast_VectorTransform(turned.chain.at(0)).A).reshape(128, 128)
    np.testing.assert_allclose(turn @ turn.T, np.eye(128), atol=1e-5)
    plain = faiss.index_factory(128, "IVF256,PQ32x4fsr", faiss.METRIC_INNER_PRODUCT)
    plain.train(rows), plain.add(rows)
    plain.nprobe, faiss.extract_index_ivf(turned).nprobe = 256, 256
    share = {
        name: np.mean([len(set(row) & true) / 10 for row, true in zip(index.search(queries, 50)[1], truth)])
        for name, index in (("plain", plain), ("turned", turned))
    }
    assert share["turned"] > share["plain"] + 0.05


def test_proposals_are_scored_exactly():
    pytest.importorskip("faiss")
    rows = grouped(2000)
    for score, row in approximate_search(build_faiss("ivfpq", rows), rows, rows[:5], 3):
        np.testing.assert_allclose(score[0], 1, atol=1e-5)
        assert len(row) == 3 and (np.diff(score) <= 0).all()


# ------------------------------------------------------------------ numbers


def test_scores_against_the_index_and_torchmetrics(model, collection):
    torchmetrics = pytest.importorskip("torchmetrics.functional.retrieval")
    table = retrieval_scores(model, collection).set_index(["task", "method"])
    assert list(table.index.unique("task")) == list(TASKS) and list(table.index.unique("method")) == [
        ENCODER,
        IMAGE_TOWER,
        CHANCE,
    ]
    texts = collection.table[
        "caption"
    ].tolist()  # 2 is added to the cosines below, as torchmetrics takes no score under 0 for an answer
    scores, right = (
        2 + model.encode_text(texts) @ model.encode_shape(collection.points()).T,
        torch.tensor([[a == b for b in texts] for a in texts]),
    )
    row = table.loc[("text -> shape", ENCODER)]
    assert row["mAP"] == pytest.approx(
        100 * np.mean([float(torchmetrics.retrieval_average_precision(s, r)) for s, r in zip(scores, right)]),
        abs=0.01,
    )
    assert row["NDCG@5"] == pytest.approx(
        100
        * np.mean(
            [float(torchmetrics.retrieval_normalized_dcg(s, r, top_k=5)) for s, r in zip(scores, right)]
        ),
        abs=0.01,
    )
    assert row["Recall@5"] == pytest.approx(
        100 * np.mean([float(torchmetrics.retrieval_hit_rate(s, r, top_k=5)) for s, r in zip(scores, right)]),
        abs=0.01,
    )
    found = ShapeIndex.from_items(model, collection).search(collection.table["caption"].tolist(), k=16)
    first = [
        int(part["rank"][part["caption"] == text].min())
        for text, (_, part) in zip(texts, found.groupby(np.arange(len(found)) // 16))
    ]
    assert row["median rank"] == np.median(first) and row["Recall@1"] == pytest.approx(
        100 * np.mean(np.array(first) == 1), abs=0.01
    )
    same = table.loc[("shape -> shape", ENCODER)]
    shapes = model.encode_shape(collection.points())
    cosine, nouns = 2 + shapes @ shapes.T, collection.table["category"].to_numpy()
    others = [[j for j in range(16) if j != i] for i in range(16)]
    expected = np.mean(
        [
            float(
                torchmetrics.retrieval_average_precision(
                    cosine[i, others[i]], torch.tensor(nouns[others[i]] == nouns[i])
                )
            )
            for i in range(16)
        ]
    )
    assert same["mAP"] == pytest.approx(100 * expected, abs=0.01) and same["candidates"] == 15
    assert table.loc[("shape -> text", ENCODER), "candidates"] == 8, "equal texts are one candidate"


def test_chance_is_what_counting_says(model, collection):
    table = retrieval_scores(model, collection, ["image -> shape"]).set_index("method")
    assert table.loc[CHANCE, "Recall@5"] == pytest.approx(100 * 5 / 16, abs=8) and table.loc[
        CHANCE, "median rank"
    ] == pytest.approx(8.5, abs=1.5)
    with pytest.raises(ValueError, match="'text -> image'; choose from text -> shape"):
        retrieval_scores(model, collection, ["text -> image"])
    with pytest.raises(ValueError, match="no column 'captoin'"):
        retrieval_scores(model, collection, text="captoin")
    bare = Collection(collection.table[["name", "id"]], collection.packed, collection.rows)
    assert len(retrieval_scores(model, bare, "image -> shape")) == 3, "pictures need no texts"
    with pytest.raises(ValueError, match="no column 'caption'.*name, id"):
        retrieval_scores(model, bare)
    with pytest.raises(ValueError, match="needs a column 'category'"):
        retrieval_scores(model, bare, "shape -> shape")


@pytest.mark.parametrize("seed", range(3))
def test_recall_and_map_agree_with_torchmetrics(seed):
    torchmetrics = pytest.importorskip("torchmetrics.functional.retrieval")
    generator = torch.Generator().manual_seed(seed)
    scores, right = torch.rand(30, 40, generator=generator), torch.rand(30, 40, generator=generator) < 0.1
    right[:, 0] = True
    for k in (1, 5, 10):
        assert recall_at_k(scores, right, k) == pytest.approx(
            np.mean([float(torchmetrics.retrieval_hit_rate(s, r, top_k=k)) for s, r in zip(scores, right)])
        )
    assert mean_average_precision(scores, right) == pytest.approx(
        np.mean([float(torchmetrics.retrieval_average_precision(s, r)) for s, r in zip(scores, right)])
    )


# ------------------------------------------------------------------ pictures and parameters


def test_results_are_drawn(index, collection, tmp_path):
    found = index.search(["a box", "a ball"], k=3)
    picture = results_image(found, collection, 48, tmp_path / "found.png")
    assert picture.size == (3 * 48, 2 * (48 + 54)) == Image.open(tmp_path / "found.png").size
    assert (np.asarray(picture.convert("RGB")) < 250).any(-1)[18:66].any(), "something is drawn"
    figure = results_figure(found, collection, 48)
    assert len(figure.data) == 6 and [trace.source[:15] for trace in figure.data] == ["data:image/png;"] * 6
    assert [note.text for note in figure.layout.annotations][:1] == [
        f"{found['score'][0]:.2f} {found['name'][0]}"
    ]
    shuffled = collection.select(np.arange(16) > 0)  # rows have moved: found by their ids
    few = index.search(index.vectors[5], k=1)
    np.testing.assert_array_equal(
        np.asarray(results_image(few, shuffled, 48)), np.asarray(results_image(few, collection, 48))
    )
    with pytest.raises(ValueError, match="is not in Collection"):
        results_image(index.search(index.vectors[0], k=1), shuffled, 48)
    with pytest.raises(ValueError, match="no results"):
        results_image(found[:0], collection)


@pytest.mark.parametrize(
    "values,words",
    [
        ({"k": 0}, "k=0"),
        ({"kind": "fast"}, "choose from auto"),
        ({"tasks": "text to shape"}, "'text to shape' is unknown"),
    ],
)
def test_parameters_of_the_job(values, words):
    with pytest.raises(ValueError, match=words):
        RetrievalConfig(**values)


def test_job_cell_is_the_table_of_settings():
    import ast
    from dataclasses import asdict

    cells = json.loads((ROOT / "nbs/retrieval.ipynb").read_text())["cells"]
    (cell,) = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    lines = [line for line in "".join(cell["source"]).splitlines() if line.strip()]
    assert {
        node.target.id: ast.literal_eval(node.value) for node in ast.parse("\n".join(lines)).body
    } == asdict(RetrievalConfig()) and all("  # " in line for line in lines)


def test_the_job_runs(model, collection, tmp_path):
    model.save(tmp_path / "run")
    from safetensors.torch import save_file

    from cg3d.models.clip_backbone import NANO_CONFIG

    towers = tmp_path / "towers"
    towers.mkdir()
    (towers / "open_clip_config.json").write_text(json.dumps(NANO_CONFIG))
    save_file(
        {name: value.contiguous() for name, value in model.backbone.clip.state_dict().items()},
        towers / "open_clip_model.safetensors",
    )
    config = json.loads((tmp_path / "run/config.json").read_text()) | {
        "clip": str(towers),
        "clip_weights": None,
    }
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",
    }
    data = collection.packed.path.with_suffix("")
    command = [
        sys.executable,
        "-m",
        "papermill",
        "--no-progress-bar",
        str(ROOT / "nbs/retrieval.ipynb"),
        str(tmp_path / "out.ipynb"),
        "-p",
        "checkpoint",
        str(tmp_path / "run"),
        "-p",
        "data",
        str(data),
        "-p",
        "split",
        "all",
        "-p",
        "queries",
        "a box | a ball",
        "-p",
        "where",
        "height < 1",
        "-p",
        "out",
        str(tmp_path / "made"),
    ]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(pd.read_csv(tmp_path / "made/results.csv")["method"].unique()) == [
        ENCODER,
        IMAGE_TOWER,
        CHANCE,
    ]
    assert (pd.read_csv(tmp_path / "made/query_results.csv")["height"] < 1).all() and (
        tmp_path / "made/figures/query_results.png"
    ).stat().st_size > 0
    assert len(ShapeIndex.load(tmp_path / "made/index")) == 16
