"""An index as a Lance table: the answers of the default index, writers at once, versions, damaged files."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from cg3d.cli.app import app
from cg3d.core.errors import DamagedFile, InputError, MissingFile, MissingPackage, PathTaken
from cg3d.search import lance as lance_module
from cg3d.search.backends import unit_rows
from cg3d.search.embeddings import Embeddings, write_embeddings
from cg3d.search.filters import Filter, to_sql
from cg3d.search.index import ShapeIndex
from cg3d.search.words import WordIndex, hybrid_search

lancedb = pytest.importorskip("lancedb")

FINGERPRINT = "f" * 64


def random_index(count: int = 500, dim: int = 32, **options) -> ShapeIndex:
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "name": [f"shape {i % 50}" for i in range(count)],
            "category": rng.choice(["chair", "table", "it's", None], count),
            "height": np.where(rng.random(count) < 0.2, np.nan, rng.random(count)),
            "judged": rng.integers(0, 2, count),
            "even": np.arange(count) % 2 == 0,
        }
    )
    vectors = rng.normal(size=(count, dim)).astype("float32")
    return ShapeIndex.from_embeddings(vectors, table, FINGERPRINT, "a model", **options)


def clustered(count: int, dim: int = 32) -> np.ndarray:
    rng = np.random.default_rng(1)
    centers = rng.normal(size=(60, dim))
    return unit_rows(
        (centers[rng.integers(60, size=count)] + 0.7 * rng.normal(size=(count, dim))).astype("f4")
    )


def assert_same(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(
        found.drop(columns="row"), expected.drop(columns="row"), atol=1e-6, check_dtype=len(expected) > 0
    )


FILTERS = [
    "category == 'chair'",
    "category != 'chair'",
    'category == "it\'s" or category.isna()',
    "category in ['chair', 'table'] and not (height < 0.5)",
    "category not in ['chair', 'table']",
    "not category == 'chair'",
    "0.2 < height < 0.8",
    "height != 0.5 and height.notna()",
    "height.between(0.1, 0.3) | judged == 1",
    "judged.isin([1])",
    "judged > -1 and height >= 0",
    "even",
    "not even",
    "even == True and judged < 1.0",
    "category < 'd'",
    "judged < 0.5",
    "name.str.contains('1$')",
    "height * 2 > 1",
    "height > 99",
]


@pytest.mark.parametrize("few", [0, 10_000])  # matching rows up to which they are read, not searched by Lance
@pytest.mark.parametrize("where", [None, *FILTERS])
def test_answers_of_the_default(tmp_path, monkeypatch, where, few):
    monkeypatch.setattr(lance_module, "FEW_ROWS", few)
    index = random_index()
    opened = ShapeIndex.load(index.save(tmp_path / "x.lance"))
    queries = np.random.default_rng(2).normal(size=(3, 32)).astype("float32")
    for k, some in ((7, queries), (1, queries[0]), (2000, queries[:1])):
        expected = index.search(some, k, where)
        found = opened.search(some, k, where)
        assert_same(found, expected)
        assert opened.table.loc[found["row"], "id"].tolist() == expected["id"].tolist()
    if where is not None:
        table = opened.table
        assert Filter(where, table).mask().tolist() == Filter(where, index.table).mask().tolist()


def test_which_filters_lance_evaluates():
    table = random_index().table
    assert [where for where in FILTERS if to_sql(Filter(where, table)) is None] == [
        "judged < 0.5",
        "name.str.contains('1$')",
        "height * 2 > 1",
    ]
    for where in ("nosuch > 1", "height", "name.str.contains('(')", "category < 3", "height <"):
        with pytest.raises(InputError, match="where="):
            Filter(where, table).mask()


def test_invalid_filters_are_refused(tmp_path):
    opened = ShapeIndex.load(random_index().save(tmp_path / "x.lance"))
    for where in ("nosuch > 1", "height", "name.str.contains('(')", "category < 3", "height <", " "):
        with pytest.raises(InputError, match="where"):
            opened.search(np.ones(32), where=where)


def test_a_table_keeps_types_and_facts(tmp_path, monkeypatch):
    index = random_index()
    index.table = index.table.assign(
        when=pd.Timestamp("2026-01-01"),
        kind=pd.Categorical(index.table["category"]),
        blank="",
        small=np.int8(3),
        note=["x", None] * 250,
    )
    place = index.save(tmp_path / "deep" / "x.lance")
    opened = ShapeIndex.load(place)
    pd.testing.assert_frame_equal(opened.table.reset_index(drop=True), index.table)
    np.testing.assert_array_equal(opened.vectors, index.vectors)
    for name in ("fingerprint", "model", "content", "kind", "dim"):
        assert getattr(opened, name) == getattr(index, name)
    assert_same(
        opened.search(index.vectors[:2], where="kind == 'chair'"),
        index.search(index.vectors[:2], where="kind == 'chair'"),
    )
    opened.verify()
    back = ShapeIndex.load(opened.save(tmp_path / "folder"))
    assert type(back) is ShapeIndex and len(back) == 500
    assert_same(back.search(index.vectors[:2]), index.search(index.vectors[:2]))
    assert_same(
        ShapeIndex.load(opened.save(tmp_path / "copy.lance")).search(index.vectors[3]),
        index.search(index.vectors[3]),
    )
    other = ShapeIndex.load(place)
    other.add(-index.vectors[:1], pd.DataFrame({"id": ["of another writer"]}), fingerprint=FINGERPRINT)
    monkeypatch.chdir(tmp_path)
    opened.save("deep/x.lance")  # its own place, by another path: the row of the other handle stays
    assert len(ShapeIndex.load(place)) == 501 and opened.version > 2


def test_add_and_delete_are_those_of_the_default(tmp_path):
    index = random_index()
    opened = ShapeIndex.load(random_index().save(tmp_path / "x.lance"))
    more = unit_rows(np.random.default_rng(5).normal(size=(4, 32)).astype("float32"))
    rows = pd.DataFrame({"name": ["shape 1", "new", "new", "b"], "maker": ["x", None, "y", "z"]})
    for each in (index, opened):
        each.add(more, rows, fingerprint=FINGERPRINT)
        assert each.delete(where="name == 'shape 7' and category != 'chair'") > 0
        assert each.delete(["shape 1", "new#2"]) == 2
    assert opened.table["id"].tolist() == index.table["id"].tolist()
    assert_same(
        opened.search(more, 9)[["query", "rank", "score", "row", "id", "maker"]],
        index.search(more, 9)[["query", "rank", "score", "row", "id", "maker"]],
    )
    for words, work in {
        "'b' is in the index already": lambda: opened.add(
            more[:1], pd.DataFrame({"id": ["b"]}), fingerprint=FINGERPRINT
        ),
        "no row has the id 'zz'": lambda: opened.delete("zz"),
        "ids or where": lambda: opened.delete(),
        "length 3 do not fit": lambda: opened.add(
            np.ones((1, 3), "f4"), pd.DataFrame({"id": ["c"]}), fingerprint=FINGERPRINT
        ),
        "another model": lambda: opened.add(more[:1], pd.DataFrame({"id": ["c"]}), fingerprint="a" * 64),
        "the type that the index has": lambda: opened.add(
            more[:1], pd.DataFrame({"id": ["c"], "height": ["tall"]}), fingerprint=FINGERPRINT
        ),
    }.items():
        with pytest.raises(InputError, match=words):
            work()
    count = len(index)
    assert len(opened) == count and opened.delete(where="judged >= 0 or judged.isna()") == count
    with pytest.raises(InputError, match="index is empty"):
        opened.search(more)


def test_words_and_vectors_together(tmp_path):
    from cg3d.data.furniture import furniture
    from cg3d.pretrained.factory import load

    model = load("nano")
    index = ShapeIndex.from_items(model, furniture().select(split="test"))
    opened = ShapeIndex.load(index.save(tmp_path / "x.lance"), model)
    opened.save(tmp_path / "x.lance")
    index.save(tmp_path / "x.lance")  # row ids are no positions any more
    assert opened.table.index[0] > len(index)
    found, expected = (
        hybrid_search(each, WordIndex(each.table), ["a round table", "lamp"], 5) for each in (opened, index)
    )
    assert_same(found, expected)


@pytest.mark.parametrize("few", [0, 10_000])
def test_the_structure_and_filters_before_it(tmp_path, monkeypatch, few):
    monkeypatch.setattr(lance_module, "FEW_ROWS", few)
    rows = clustered(6100)
    table = pd.DataFrame({"name": "a", "percent": np.random.default_rng(0).permutation(6000) % 100})
    exact = ShapeIndex.from_embeddings(rows[:6000], table, FINGERPRINT, kind="exact")
    place = ShapeIndex(exact.vectors, exact.table, FINGERPRINT, kind="ivfpq").save(tmp_path / "x.lance")
    opened = ShapeIndex.load(place)
    assert opened.kind == "ivfrq" and len(opened._lance.list_indices()) == 1
    queries = rows[6000:]

    def recall(where: str | None) -> float:
        found, truth = (each.search(queries, 10, where) for each in (opened, exact))
        assert len(found) == len(truth), "as many results as rows that match"
        return len(set(zip(found["query"], found["id"])) & set(zip(truth["query"], truth["id"]))) / len(truth)

    recalls = {where: recall(where) for where in (None, "percent < 10", "percent == 3")}
    assert min(recalls.values()) >= 0.95, recalls
    assert few == 0 or recalls["percent < 10"] == recalls["percent == 3"] == 1, recalls
    found = opened.search(queries[:5], 3)
    places = pd.Index(exact.table["id"]).get_indexer(found["id"])
    cosine = (exact.vectors[places] * queries[np.repeat(range(5), 3)]).sum(1)
    np.testing.assert_allclose(found["score"], cosine, atol=1e-5)  # scores are exact, the choice is not
    assert len(opened.search(queries[0], 5000)) == 5000, "as many as asked for"
    new = -queries[:20]
    opened.add(new, pd.DataFrame({"id": [f"new {i}" for i in range(20)]}), fingerprint=FINGERPRINT)
    for _ in range(2):
        assert opened.search(new, 1)["id"].tolist() == [f"new {i}" for i in range(20)]
        opened.save(place)  # second time: the new rows are in the structure
    assert opened._lance.index_stats(opened._lance.list_indices()[0].name).num_unindexed_rows == 0
    with pytest.raises(InputError, match="at least 1,000 rows"):
        random_index(kind="hnsw").save(tmp_path / "small.lance")


def test_adding_while_another_handle_searches(tmp_path):
    index = random_index()
    place = index.save(tmp_path / "x.lance")
    reader, writer = ShapeIndex.load(place), ShapeIndex.load(place)
    expected, problems, stop = index.search(index.vectors[:3], 1), [], threading.Event()

    def search():
        while not stop.is_set():
            try:
                assert_same(reader.search(index.vectors[:3], 1), expected)
            except BaseException as error:
                problems.append(error)
                return

    threads = [threading.Thread(target=search) for _ in range(2)]
    for thread in threads:
        thread.start()
    for i in range(15):
        writer.add(
            -index.vectors[i : i + 2], pd.DataFrame({"id": [f"{i} a", f"{i} b"]}), fingerprint=FINGERPRINT
        )
        if i % 5 == 4:
            writer.delete(f"{i} a")
            writer.optimize()
    stop.set()
    for thread in threads:
        thread.join()
    assert not problems and len(reader) == 500 + 30 - 3
    assert reader.search(-index.vectors[0], 1)["id"][0] == "0 a"


WRITER = """
import sys, numpy as np, pandas as pd
from cg3d.search.index import ShapeIndex
place, name, fingerprint = sys.argv[1:]
index = ShapeIndex.load(place)
print("ready", flush=True)
sys.stdin.readline()
for i in range(10):
    vectors = np.random.default_rng(i).normal(size=(7, 32)).astype("float32")
    rows = pd.DataFrame({"id": [f"{name} {i} {j}" for j in range(7)]})
    index.add(vectors, rows, fingerprint=fingerprint)
"""


def test_two_processes_add_at_once(tmp_path):
    place = random_index().save(tmp_path / "x.lance")
    command = [sys.executable, "-c", WRITER, str(place)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writers = [subprocess.Popen([*command, name, FINGERPRINT], **pipes) for name in ("one", "two")]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("\n")
        writer.stdin.flush()
    assert [writer.wait(300) for writer in writers] == [0, 0]
    index = ShapeIndex.load(place)
    expected = {f"{name} {i} {j}" for name in ("one", "two") for i in range(10) for j in range(7)}
    assert set(index.table["id"][500:]) == expected and len(index) == 640 == index.table["id"].nunique()
    index.verify()


def test_versions(tmp_path):
    index = random_index()
    place = index.save(tmp_path / "x.lance")
    opened = ShapeIndex.load(place)
    first = opened.version
    best = index.search(index.vectors[0], 1)["id"].tolist()
    opened.delete(best)
    old = ShapeIndex.load(place, version=first)
    assert (len(old), len(opened)) == (500, 499)
    assert_same(
        old.search(index.vectors[:2], where="height < 0.5"),
        index.search(index.vectors[:2], where="height < 0.5"),
    )
    assert best[0] not in set(opened.search(index.vectors[0], 499)["id"])
    for work in (
        lambda: old.delete(best),
        lambda: old.add(index.vectors[:1], pd.DataFrame({"id": ["c"]}), fingerprint=FINGERPRINT),
    ):
        with pytest.raises(InputError, match="is for reading"):
            work()
    with pytest.raises(InputError, match="version=99"):
        ShapeIndex.load(place, version=99)
    with pytest.raises(InputError, match="only Lance tables have versions"):
        ShapeIndex.load(index.save(tmp_path / "folder"), version=1)
    random_index(20).save(place)
    assert len(ShapeIndex.load(place)) == 20 and len(ShapeIndex.load(place, version=first)) == 500


def read_everything(place: Path) -> None:
    index = ShapeIndex.load(place)
    index.verify()
    index.search(np.ones(32))


@pytest.mark.parametrize("part", ["_versions", "data"])
@pytest.mark.parametrize("change", ["cut", "empty", "zeros", "gone"])
def test_a_damaged_table_is_refused(tmp_path, part, change):
    place = random_index().save(tmp_path / "x.lance")
    (file,) = [path for path in (place / part).iterdir() if path.suffix in (".manifest", ".lance")]
    data = file.read_bytes()
    if change == "gone":
        file.unlink()
    else:
        file.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "zeros": bytes(len(data))}[change])
    with pytest.raises((InputError, MissingFile), match=r"x\.lance"):
        read_everything(place)


def test_other_tables_and_folders(tmp_path):
    with pytest.raises(MissingFile, match=r"none\.lance"):
        ShapeIndex.load(tmp_path / "none.lance")
    lancedb.connect(tmp_path).create_table("foreign", [{"a": 1}])
    with pytest.raises(InputError, match="format None"):
        ShapeIndex.load(tmp_path / "foreign.lance")
    (tmp_path / "plain.lance").mkdir()
    (tmp_path / "plain.lance" / "notes.txt").write_text("mine")
    with pytest.raises(PathTaken, match="no Lance table"):
        random_index().save(tmp_path / "plain.lance")
    with pytest.raises(DamagedFile):
        ShapeIndex.load(tmp_path / "plain.lance")
    place = random_index().save(tmp_path / "x.lance")
    (file,) = (place / "data").iterdir()
    data = bytearray(file.read_bytes())
    at = data.find(random_index().vectors[3].tobytes())
    assert at > 0, "vectors are stored as they are"
    data[at : at + 4] = np.float32(1.5).tobytes()
    file.write_bytes(data)
    with pytest.raises(DamagedFile, match="length 1"):
        ShapeIndex.load(place).verify()


# ------------------------------------------------------------------ the command


@pytest.fixture
def embeddings(tmp_path) -> Path:
    index = random_index(50, 384)
    return write_embeddings(
        tmp_path / "e.parquet", Embeddings(index.vectors, index.table, "nano", FINGERPRINT)
    )


def call(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_writes_a_table(embeddings, tmp_path):
    place = tmp_path / "lib.lance"
    assert call("index", embeddings, "-o", place).exit_code == 0
    assert len(ShapeIndex.load(place)) == 50
    facts = json.loads(call("info", place, "--json").stdout)
    assert (facts["kind"], facts["count"], facts["dim"], facts["version"]) == ("index", 50, 384, 1)
    assert facts["bytes"] > 50 * 384 * 4
    again = call("index", embeddings, "-o", place)
    assert again.exit_code != 0 and "--overwrite" in again.output
    assert call("index", embeddings, "-o", place, "--overwrite").exit_code == 0
    assert ShapeIndex.load(place).versions() == [1, 2]


def test_what_is_missing_is_named(embeddings, tmp_path, monkeypatch):
    for name in ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT"):
        monkeypatch.delenv(name, raising=False)
    failed = call("index", embeddings, "-o", "az://container/lib")
    assert failed.exit_code != 0 and "AZURE_STORAGE_ACCOUNT_NAME" in failed.output.replace("\n", "")
    with pytest.raises(InputError, match="names a bucket"):
        random_index().save("s3://bucket")
    with pytest.raises(InputError, match="use one of s3, gs, az"):
        random_index().save("nosuch://bucket/lib")

    class Unreachable:
        def connect(self, place):
            raise RuntimeError(f"no answer from {place}")

    monkeypatch.setattr("cg3d.search.lance.import_lancedb", Unreachable)
    for url, variable in (("s3://b/x", "AWS_ACCESS_KEY_ID"), ("gs://b/x", "GOOGLE_APPLICATION_CREDENTIALS")):
        failed = call("index", embeddings, "-o", url)
        assert failed.exit_code != 0 and variable in failed.output.replace("\n", "")
        with pytest.raises(InputError, match=f"cannot be read.*{variable}"):
            ShapeIndex.load(url)


def test_a_table_at_a_url_is_replaced_only_when_told(embeddings, tmp_path):
    url = f"file://{tmp_path}/shapes"
    assert call("index", embeddings, "-o", url, "--kind", "exact").exit_code == 0
    version = ShapeIndex.load(url).version
    refused = call("index", embeddings, "-o", url, "--kind", "exact")
    assert refused.exit_code != 0 and "--overwrite" in refused.output and "holds a table" in refused.output
    assert ShapeIndex.load(url).version == version
    assert call("index", embeddings, "-o", url, "--kind", "exact", "--overwrite").exit_code == 0
    assert version in ShapeIndex.load(url).versions() and ShapeIndex.load(url).version > version


def test_without_the_package(embeddings, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lancedb", None)
    for work in (lambda: random_index().save(tmp_path / "x.lance"), lambda: ShapeIndex.load("s3://bucket/x")):
        with pytest.raises(MissingPackage, match=r"needs lancedb: pip install '.*\[lance\]'"):
            work()
    failed = call("index", embeddings, "-o", "s3://bucket/x")
    assert failed.exit_code != 0 and "[lance]" in failed.output.replace("\n", "")
    assert len(ShapeIndex.load(random_index().save(tmp_path / "folder"))) == 500
