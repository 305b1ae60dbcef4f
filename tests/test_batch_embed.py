"""Batch embedding: broken files, exhausted memory, programming errors, and models that are sent to other devices."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch

from cg3d.core.atomic import exclusive_lock
from cg3d.core.errors import InputError
from cg3d.data.furniture import furniture
from cg3d.io.shape import read_shape
from cg3d.pretrained.factory import load
from cg3d.search.batch_embed import collection_source, embed_batches, embed_source, read_batches
from cg3d.search.ray import deserialize, gpus_per_worker, serialize


@pytest.fixture(scope="module")
def some():
    return furniture().select(np.arange(790) % 13 == 0)  # 61 shapes


class LimitedModel:
    """Embeds each shape as its first point; runs out of memory beyond `limit` shapes in a pass."""

    device = torch.device("cpu")

    def __init__(self, limit: int, error: Exception):
        self.limit, self.error, self.batch_sizes = limit, error, []

    def encode_shape(self, shapes, *, batch_size):
        assert torch.is_inference_mode_enabled()
        self.batch_sizes.append(batch_size)
        if min(batch_size, len(shapes)) > self.limit:
            raise self.error
        return torch.stack([torch.from_numpy(shape.points[0]) for shape in shapes])


OUT_OF_MEMORY = (
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    MemoryError("Unable to allocate 8.00 GiB for an array"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: ..."
    ),
)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_batches_are_halved_when_memory_runs_out(some, error):
    source = collection_source(some, "some")
    model = LimitedModel(3, error)
    problems = []
    with pytest.warns(UserWarning, match="batch_size=16 does not fit into the memory of cpu") as caught:
        batches = list(embed_batches(source, model, range(40), 16, problems))
    assert len(caught) == 1, "one warning for two halvings"
    assert model.batch_sizes == [16, 8, 4, 2, 2, 2], "16 -> 2, kept for the second and third batch"
    assert problems == [] and [row for rows, _ in batches for row in rows] == list(range(40))
    expected = np.stack([some[row].points[0] for row in range(40)])
    assert (np.concatenate([vectors for _, vectors in batches]) == expected).all()


def test_a_shape_that_does_not_fit_into_memory_ends_the_run(some, tmp_path):
    source = collection_source(some, "some")
    with (
        pytest.warns(UserWarning, match="batch_size=4"),
        pytest.raises(InputError, match="one shape does not fit"),
    ):
        list(embed_batches(source, LimitedModel(0, OUT_OF_MEMORY[0]), range(8), 4, []))


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("bug"), RuntimeError("CUDA error: an illegal memory access")]
)
def test_a_programming_error_is_not_a_broken_shape(some, tmp_path, error):
    def read(row):
        if row == 3:
            raise error
        return some[row]

    source = replace(collection_source(some, "some"), read=read)
    with pytest.raises(type(error), match=str(error)):
        embed_source(source, load("nano"), tmp_path / "e.npz", batch_size=2)
    exclusive_lock(tmp_path / "e.npz.part").release()  # the lock was given up, so the run can be resumed
    problems = []
    source.read = lambda row: read_shape(tmp_path / "missing.glb") if row == 1 else some[row]
    rows = [row for batch, _ in read_batches(source, range(4), 2, problems) for row in batch]
    assert rows == [0, 2, 3] and len(problems) == 1 and "missing.glb: no such file" in problems[0][1]


def test_a_model_of_another_gpu_is_unpickled_on_the_worker(monkeypatch):
    """A file whose tensors were on cuda:1 is loaded where there is no such device."""
    pytest.importorskip("ray")
    weights = torch.arange(4.0)
    with monkeypatch.context() as patch:
        patch.setattr("torch.serialization.location_tag", lambda storage: "cuda:1")
        data = serialize(lambda item: item * weights)
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(io.BytesIO(data), weights_only=False)
    assert deserialize(data)(2).tolist() == [0, 2, 4, 6]


def test_workers_share_the_gpus_of_the_cluster():
    shares = {case: gpus_per_worker(*case) for case in ((1, 8), (8, 8), (2, 1), (3, 2), (16, 8), (5, 0))}
    assert shares == {(1, 8): 1, (8, 8): 1, (2, 1): 0.5, (3, 2): 0.5, (16, 8): 0.5, (5, 0): 0}
