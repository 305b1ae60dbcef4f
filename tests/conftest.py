"""Settings of all tests."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "nano"))  # scripts outside of the package


@pytest.fixture
def read(tmp_path):
    "Write a file and read it as a mesh."
    from cg3d.io.read import read_mesh

    def write_and_read(name: str, content: str | bytes, **beside: bytes):
        for other, data in beside.items():
            (tmp_path / other.replace("__", ".")).write_bytes(data)
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return read_mesh(tmp_path / name)

    return write_and_read
