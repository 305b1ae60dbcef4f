"""What the tests of the readers look at: the extent of a mesh, and its mean color."""

import numpy as np


def extent(mesh) -> list[float]:
    "Size of the bounding box along x, y and z."
    return np.ptp(mesh.bounds, axis=0).round(4).tolist()


def color(mesh, digits: int = 2) -> list[float] | None:
    "The mean color of the surface, None where nothing is known of it."
    _, colors = mesh.sample(2048, np.random.default_rng(0))
    return None if colors is None else np.nanmean(colors, 0).round(digits).tolist()
