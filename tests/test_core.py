"""Settings, the array cache and the timing helpers of cg3d.core."""

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest
import torch

from cg3d.core.cache import ArrayCache, array_key
from cg3d.core.config import Range, check_settings, settings_from, split_list, write_settings
from cg3d.core.errors import CannotWrite, Cg3dError, DamagedFile, InputError, KindError


@dataclass(frozen=True)
class Job:
    epochs: int = 10
    lr: float = 1e-3
    prompt: str = "none"
    mode: Literal["head", "full"] = "head"
    channels: int = 6
    sizes: tuple[int, ...] = (8, 16)
    bounds: tuple[float, float] = (0.5, 1.0)
    resume: bool = False
    scale: float | None = None
    extra: dict | None = None

    def __post_init__(self):
        check_settings(
            self,
            choices={"prompt": ("none", "pixel", "deep"), "channels": (3, 6)},
            ranges={"lr": Range(0, 1, open_low=True), "scale": (0, None)},
            separators={"prompt": "+"},
            integers=(1, None),
        )


@pytest.mark.parametrize(
    "values, error, words",
    [
        ({"epochs": 0}, InputError, "epochs=0 must be at least 1"),
        ({"epochs": True}, KindError, "epochs=True is a bool; it takes a int"),
        ({"epochs": 2.0}, KindError, "it takes a int"),
        ({"resume": 1}, KindError, "it takes a bool"),
        ({"lr": 0}, InputError, "must be above 0 and at most 1"),
        ({"lr": math.nan}, InputError, "lr=nan must be"),
        ({"scale": math.inf}, InputError, "scale=inf must be at least 0 and finite"),
        ({"prompt": "deep+pixle"}, InputError, "'pixle'.*choose from none, pixel, deep"),
        ({"prompt": ""}, InputError, "choose from none"),
        ({"mode": "tail"}, KindError, "'head' or 'full'"),
        ({"channels": 4}, InputError, "channels=4 is unknown; choose from 3, 6"),
        ({"sizes": (8, 0)}, InputError, "sizes=.* must be at least 1"),
        ({"sizes": (8, True)}, KindError, "tuple of int"),
        ({"sizes": 8}, KindError, "tuple of int"),
        ({"bounds": (1.0,)}, InputError, "must have 2 entries"),
        ({"bounds": (1.0, "a")}, KindError, "tuple of float, float"),
        ({"extra": [1]}, KindError, "dict or None"),
        ({"prompt": "x" * 10**6}, InputError, "is unknown"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_refused_by_name_and_value(values, error, words):
    with pytest.raises(error, match=words) as refused:
        Job(**values)
    ((name, value),) = values.items()
    assert refused.value.field == name
    assert str(refused.value.value) == str(value) or float(refused.value.value) == float(value)
    assert len(str(refused.value)) < 1000


def test_lossless_conversions_are_made():
    job = Job(lr=1, sizes=[4, 4], scale=2)
    assert (job.lr, job.sizes, job.scale) == (1.0, (4, 4), 2.0)
    assert type(job.lr) is type(job.scale) is float


@pytest.mark.parametrize(
    "values, expected",
    [
        ({"epochs": "3"}, 3),
        ({"lr": "1e-3"}, 1e-3),  # what PyYAML makes of 1e-3
        ({"resume": "true"}, True),
        ({"resume": "False"}, False),
        ({"scale": "2"}, 2.0),
        ({"prompt": "deep"}, "deep"),
    ],
    ids=str,
)
def test_values_may_come_as_text(values, expected):
    ((name, _),) = values.items()
    value = getattr(settings_from(Job, values), name)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    "values", [{"epochs": "three"}, {"epochs": "3.5"}, {"resume": "yes"}, {"resume": "1"}]
)
def test_other_text_is_refused(values):
    with pytest.raises(KindError, match="is a str"):
        settings_from(Job, values)


def test_unknown_names_are_listed_with_the_nearest():
    with pytest.raises(
        InputError, match="unknown parameter epoch; known are epochs, lr.*; did you mean epochs?"
    ):
        settings_from(Job, {"epoch": 3})
    with pytest.raises(InputError, match="unknown parameters a, b; known are [^?]*$"):
        settings_from(Job, {"a": 3, "b": 4})


def test_a_table_for_a_field_that_is_not_there_is_an_error():
    @dataclass(frozen=True)
    class Typo:
        epochs: int = 1

        def __post_init__(self):
            check_settings(self, ranges={"epoch": (1, None)})

    with pytest.raises(Cg3dError, match="Typo has no field epoch"):
        Typo()


def test_written_settings_can_be_read(tmp_path):
    job = Job(epochs=3, prompt="deep+pixel", scale=1)
    write_settings(job, tmp_path / "config.json")
    assert settings_from(Job, json.loads((tmp_path / "config.json").read_text())) == job


def test_split_list():
    assert split_list(" a, b,, c ") == ["a", "b", "c"] and split_list("", "+") == []


class Rows:
    """Row r of the array is r, r, r; counts the rows that it computes, and may stop at one."""

    def __init__(self, stop=None):
        self.calls, self.stop = [], stop

    def __call__(self, first, last):
        if self.stop is not None and first <= self.stop < last:
            raise KeyboardInterrupt
        self.calls.append((first, last))
        return torch.arange(first, last).float()[:, None].expand(-1, 3)


EXPECTED = np.repeat(np.arange(10, dtype=np.float32)[:, None], 3, 1)


def array_cache(folder, depends="x", dtype=np.float32):
    return ArrayCache(depends, (10, 3), dtype, folder)


@pytest.mark.parametrize("workers, step", [(1, 1), (1, 4), (3, 1), (3, 100)])
def test_array_is_computed_once(tmp_path, workers, step):
    first, second, rows = array_cache(tmp_path), array_cache(tmp_path), Rows()
    assert np.array_equal(first.get(rows, step, workers, progress=False), EXPECTED) and not first.hit
    assert sorted(row for part in rows.calls for row in range(*part)) == list(range(10))
    assert np.array_equal(second.get(None, step, progress=False), EXPECTED) and second.hit
    second.verify()
    assert {path.name for path in first.path.iterdir()} == {".lock", "array.npy", "manifest.json"}


def test_key_changes_with_all_that_values_depend_on(tmp_path):
    keys = [
        array_key({"a": 1, "b": [2, None]}, (2, 3), np.float16),
        array_key({"a": 1, "b": [2, 0]}, (2, 3), np.float16),
        array_key({"a": 1, "b": [2, None]}, (3, 2), np.float16),
        array_key({"a": 1, "b": [2, None]}, (2, 3), np.float32),
    ]
    assert len(set(keys)) == 4
    assert keys[0] == array_key({"b": (2, None), "a": 1}, [2, 3], "float16")
    with pytest.raises(KindError, match="must be JSON"):
        array_key({"a": object()}, (2,), np.float16)
    with pytest.raises(InputError, match="no values"):
        ArrayCache("x", (0, 3), folder=tmp_path)


def test_changes_of_the_array_are_not_written(tmp_path):
    array = array_cache(tmp_path).get(Rows(), 5, progress=False)
    array[:] = 7
    assert np.array_equal(array_cache(tmp_path).open(), EXPECTED)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_array_is_resumed(tmp_path, workers):
    with pytest.raises(KeyboardInterrupt):
        array_cache(tmp_path).get(Rows(stop=6), 2, workers, progress=False)
    rows = Rows()
    cache = array_cache(tmp_path)
    assert np.array_equal(cache.get(rows, 3, progress=False), EXPECTED)
    assert rows.calls == [(6, 9), (9, 10)]
    cache.verify()


def test_a_damaged_mark_starts_anew(tmp_path):
    for damage in (
        lambda cache: cache.progress.write_bytes(b""),
        lambda cache: cache.part.write_bytes(bytes(50)),
    ):
        cache = array_cache(tmp_path)
        with pytest.raises(KeyboardInterrupt):
            cache.get(Rows(stop=6), 2, progress=False)
        damage(cache)
        rows = Rows()
        assert np.array_equal(cache.get(rows, 5, progress=False), EXPECTED)
        assert rows.calls == [(0, 5), (5, 10)]
        cache.verify()
        shutil.rmtree(cache.path)


KILLED = """
import os, signal, sys
import numpy as np
from cg3d.core.cache import ArrayCache

def compute(first, last):
    if first == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return np.full((last - first, 3), first, np.float32)

ArrayCache("x", (10, 3), np.float32, sys.argv[1]).get(compute, 1, progress=False, interval=float(sys.argv[3]))
"""


@pytest.mark.parametrize("interval, expected", [(0, 7), (1000, 0)])
def test_a_killed_job_is_resumed_at_its_last_mark(tmp_path, interval, expected):
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path, "7", str(interval)])
    assert done.returncode == -signal.SIGKILL
    rows = Rows()
    cache = array_cache(tmp_path)
    assert np.array_equal(cache.get(rows, 1, progress=False), EXPECTED)
    assert rows.calls[0] == (expected, expected + 1) and len(rows.calls) == 10 - expected
    cache.verify()


RACE = """
import sys, time
import numpy as np
from cg3d.core.cache import ArrayCache

def compute(first, last):
    print(first, flush=True)
    time.sleep(0.05)
    return np.full((last - first, 3), first, np.float32)

array = ArrayCache("x", (10, 3), np.float32, sys.argv[1]).get(compute, 1, progress=False)
assert (array[:, 0] == np.arange(10)).all()
"""


def test_jobs_that_race_for_one_key_compute_it_once(tmp_path):
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    outputs = [job.communicate() for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0, 0], outputs
    assert sorted(len(output.split()) for output, _ in outputs) == [0, 0, 10]


def flip_last_byte(path, keep_time):
    status, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + (0 if keep_time else 10**9)))


DAMAGE = {
    "cut": lambda cache: cache.file.write_bytes(cache.file.read_bytes()[:-1]),
    "bit": lambda cache: flip_last_byte(cache.file, keep_time=False),
    "empty": lambda cache: cache.file.write_bytes(b""),
    "no manifest": lambda cache: cache.manifest.unlink(),
    "empty manifest": lambda cache: cache.manifest.write_bytes(b""),
    "manifest of zeros": lambda cache: cache.manifest.write_bytes(bytes(100)),
    "header": lambda cache: cache.file.write_bytes(bytes(10) + cache.file.read_bytes()[10:]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_array_is_computed_again_with_a_warning(tmp_path, damage):
    cache = array_cache(tmp_path)
    cache.get(Rows(), 5, progress=False)
    DAMAGE[damage](cache)
    rows = Rows()
    with pytest.warns(UserWarning, match="is damaged"):
        assert np.array_equal(cache.get(rows, 5, progress=False), EXPECTED)
    assert rows.calls == [(0, 5), (5, 10)]
    cache.verify()


def test_a_changed_bit_under_the_old_time_is_found_by_verify(tmp_path):
    cache = array_cache(tmp_path)
    cache.get(Rows(), 5, progress=False)
    flip_last_byte(cache.file, keep_time=True)
    assert cache.open() is not None
    with pytest.raises(DamagedFile, match="does not hold the values"):
        cache.verify()


def test_a_copied_cache_is_read_once_and_accepted(tmp_path, monkeypatch):
    array_cache(tmp_path / "a").get(Rows(), 5, progress=False)
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copy)  # new times
    copied = array_cache(tmp_path / "b")
    os.utime(copied.file, ns=(1, 1))
    assert np.array_equal(copied.open(), EXPECTED)
    monkeypatch.setattr("cg3d.core.cache.checksum", None)  # the second opening reads nothing
    assert np.array_equal(copied.open(), EXPECTED)


def test_a_full_disk_is_met_before_anything_is_computed(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    cache, rows = ArrayCache("large", (1000, 1000), np.float32, tmp_path), Rows()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        with pytest.raises(CannotWrite, match="cannot be written.*free space"):
            cache.get(rows, 5, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not rows.calls and [path.name for path in cache.path.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    "values, dtype, words",
    [
        (np.zeros((2, 4)), np.float32, "values were computed where"),
        (np.full((2, 3), np.nan), np.float32, "rows 0 to 1 .* NaN or infinite"),
        (np.full((2, 3), 70_000.0), np.float16, "infinite as float16"),
        (np.zeros((2, 3)), np.uint8, "computed as float64, which uint8 cannot hold"),
    ],
)
def test_values_that_do_not_fit_are_refused(tmp_path, values, dtype, words):
    cache = array_cache(tmp_path, dtype=dtype)
    with pytest.raises(InputError, match=words):
        cache.get(lambda first, last: values, 2, progress=False)
    assert cache.open() is None


def test_no_gradient_is_kept_in_any_thread(tmp_path):
    weight = torch.ones(3, requires_grad=True)
    modes = []

    def compute(first, last):
        modes.append(torch.is_grad_enabled())
        return (weight * first).bfloat16()[None]

    array = array_cache(tmp_path, dtype=np.float16).get(compute, 1, workers=2, progress=False)
    assert not any(modes) and np.array_equal(array[:, 1], np.arange(10))
