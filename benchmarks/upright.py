"""Accuracy of `cg3d.io.upright.estimate_up` on shapes that are y up, and on the same shapes rotated to z up."""

import argparse

import numpy as np

from cg3d.io.collection import read_collection
from cg3d.io.upright import HINT, estimate_up

TO_Z_UP = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]])  # a rotation: y becomes z


def measure(name: str, split: str | None, limit: int) -> str:
    "One line of the table."
    shapes = read_collection(name)
    if split and "split" in shapes.table:
        shapes = shapes.select(split=split)
    right, sure = [], []
    for row in range(min(len(shapes), limit)):
        points = shapes[row].points
        for axis, places in (("y", points), ("z", points @ TO_Z_UP.T)):
            found, probability = estimate_up(places)
            right.append(found == axis)
            sure.append(probability >= HINT)
    right, sure = (np.array(each).reshape(-1, 2) for each in (right, sure))
    wrongly = (sure[:, 0] & ~right[:, 0]).mean()
    found = (sure[:, 1] & right[:, 1]).mean()
    return (
        f"{name} ({split or 'all'}): {len(right):,} shapes; right {right[:, 0].mean():.1%} of y up, "
        f"{right[:, 1].mean():.1%} of z up; warned of wrongly {wrongly:.1%} of y up, rightly {found:.1%} of z up"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("collections", nargs="+", help="packed collections that are y up")
    parser.add_argument("--split", default=None)
    parser.add_argument("--limit", type=int, default=10**9)
    arguments = parser.parse_args()
    for collection in arguments.collections:
        print(measure(collection, arguments.split, arguments.limit))
