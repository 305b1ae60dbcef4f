"""Rows of the benchmark table, and the command line of every script in this folder.

A script ends with `report(measure)`. `python benchmarks/points.py` prints its rows; `--quick` uses small
sizes and few rounds and only checks that everything runs; `--out rows.json` writes the rows.
`summary.py` starts one process a script, so that memory and thread settings of one do not affect another.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cg3d.core.timing import Comparison, machine


@dataclass(frozen=True)
class Row:
    """One line of the benchmark table, with its target and whether it is met."""

    part: str  # which script: points, encoders, training, ...
    what: str  # the work, with its size
    value: float | None  # what was measured; None: only the ratio counts
    unit: str  # of the value: ms, s, GFLOP/s, MiB, ...
    versus: str = ""  # what it is compared with
    ratio: float | None = None  # median of the pairs; above 1 is better
    low: float | None = None  # the smallest pair
    high: float | None = None  # the largest pair
    target: str = ""  # the ratio or value that is to be reached
    met: bool | None = None  # None: there is no target
    note: str = ""  # what a reader must know
    along: str = ""  # what grows in a curve: points, clouds, rows, ...; its rows differ in `at` alone
    at: float | None = None  # how many of them


def row(
    part: str,
    what: str,
    times: Comparison,
    versus: str,  # the other implementation
    at_least: float | None = None,  # target of the ratio
    per: int = 1,  # pieces of work in one call: the value is for one
    unit: str = "ms",  # ms or s
    note: str = "",
) -> Row:
    """Row of a comparison: our time, and the time of the other implementation divided by it."""
    factor = {"ms": 1e3, "s": 1}[unit]
    return Row(
        part,
        what,
        value=statistics.median(times.ours) / per * factor,
        unit=unit,
        versus=versus,
        ratio=times.ratio,
        low=min(times.ratios),
        high=max(times.ratios),
        target="" if at_least is None else f">= {at_least:g}x",
        met=None if at_least is None else times.ratio >= at_least,
        note=note,
    )


def row_text(row: Row) -> str:
    """A row as one line of text."""
    text = row.what
    if row.value is not None:
        text += f": {row.value:.4g} {row.unit}"
    if row.ratio is not None:
        text += f", {row.ratio:.3g} times ({row.low:.3g}-{row.high:.3g}) as fast as {row.versus}"
    if row.target:
        text += f" [target {row.target}: {'met' if row.met else 'MISSED'}]"
    if row.note:
        text += f" - {row.note}"
    return text


def report(
    measure: Callable[[bool], Sequence[Row]],  # measure(quick) -> rows
    arguments: Sequence[str] | None = None,  # of the command line
) -> list[Row]:
    """Measure, print and write the rows of a script."""
    parser = argparse.ArgumentParser(description=measure.__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes: does everything run?")
    parser.add_argument("--out", type=Path, help="write the rows here, as JSON")
    options = parser.parse_args(arguments)
    rows = list(measure(options.quick))
    for entry in rows:
        print(row_text(entry))
    if options.out:
        content = {"machine": machine(), "quick": options.quick, "rows": [asdict(entry) for entry in rows]}
        options.out.write_text(json.dumps(content, indent=1) + "\n")
    return rows
