"""Run every benchmark of this folder, each in its own process, and draw one table and two figures.

`nbs/benchmark.ipynb` calls this module; `python benchmarks/NAME.py` runs one benchmark alone.
"""

import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import wrap

import pandas as pd
from harness import Row
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from tqdm.auto import tqdm

from cg3d.core.atomic import write_file
from cg3d.core.config import check_settings, split_list
from cg3d.core.errors import Cg3dError, InputError
from cg3d.core.untrusted import read_json
from cg3d.viz.theme import OKABE_ITO

FOLDER = Path(__file__).parent
PARTS = (
    "points",
    "encoders",
    "training",
    "processes",
    "shards",
    "search",
    "startup",
)  # NAME.py, in this order


@dataclass(frozen=True)
class BenchmarkConfig:
    """Parameters of `nbs/benchmark.ipynb`, where they are explained.

    Raises: InputError for a part that is not in `PARTS`, KindError for a value of another type.
    """

    parts: str = "all"
    quick: bool = False
    resume: bool = False
    out: str = "benchmark"

    def __post_init__(self):
        check_settings(self, choices={"parts": ("all", *PARTS)}, separators={"parts": ","})

    @property
    def scripts(self) -> list[str]:
        return list(PARTS) if self.parts == "all" else split_list(self.parts)


def run_script(
    script: str | Path,  # a benchmark that ends with `harness.report`
    quick: bool = False,  # small sizes: does everything run?
) -> list[Row]:
    """Run one benchmark in its own process.

    Raises: Cg3dError with the last line of its standard error when it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, str(script), "--out", str(out)]
        if quick:
            command.append("--quick")
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode:
            last_lines = process.stderr.strip().splitlines() or ["no message"]
            raise Cg3dError(f"{script} ended with {process.returncode}: {last_lines[-1]}", file=script)
        return [Row(**row) for row in json.loads(out.read_text())["rows"]]


def run_parts(
    parts: Sequence[str],  # of PARTS
    folder: str | Path,  # rows are written to rows.json and benchmark.csv
    quick: bool = False,
    resume: bool = False,  # keep the parts that the folder holds already
) -> pd.DataFrame:  # one row a measurement, the columns of `Row`
    """Run benchmarks one after the other; the rows of each are saved when it ends.

    Raises: InputError when `folder` holds rows of another `quick`; Cg3dError, after the others have run, when a
    part failed.
    """
    file, failures = Path(folder) / "rows.json", []
    results = read_json(file, dict) if resume and file.exists() else {"quick": quick}  # part -> rows
    if results["quick"] != quick:
        raise InputError(
            f"{file} was measured with quick={results['quick']}, now {quick}; choose another out=",
            file=file,
            field="quick",
            value=quick,
        )
    bar = tqdm([part for part in parts if part not in results], disable=None)
    for part in bar:
        bar.set_description(part)
        try:
            results[part] = [asdict(row) for row in run_script(FOLDER / f"{part}.py", quick)]
        except Cg3dError as error:
            failures.append(error)
            bar.write(f"{part} failed: {error}")
        write_file(file, lambda path: path.write_text(json.dumps(results, indent=1) + "\n"))
    rows = [row for part in parts for row in results.get(part, [])]
    table = Path(folder) / "benchmark.csv"
    pd.DataFrame(rows, columns=list(Row.__dataclass_fields__)).to_csv(table, index=False)
    if failures:
        message = "; ".join(str(failure) for failure in failures)
        raise Cg3dError(f"{message}; the rows of the other parts are in {table}", file=failures[0].file)
    return pd.DataFrame(rows)


def growth_curves(
    rows: pd.DataFrame,
) -> dict[tuple[str, str, str], pd.DataFrame]:  # (what, unit, along) -> its rows by size, two at least
    "Rows that measure the same thing at several sizes."
    groups = rows[rows["along"] != ""].groupby(["what", "unit", "along"], sort=False)
    return {key: curve.sort_values("at") for key, curve in groups if curve["at"].nunique() > 1}


def three_digits(value: float) -> str:
    "A number with three significant digits."
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _speed_row(row) -> dict[str, str]:
    ratio = (
        ""
        if pd.isna(row.ratio)
        else f"{three_digits(row.ratio)} ({three_digits(row.low)}-{three_digits(row.high)})"
    )
    return {
        "part": row.part,
        "what": row.what + (f", {row.at:,.0f} {row.along}" if row.along else ""),
        "measured": "" if pd.isna(row.value) else f"{three_digits(row.value)} {row.unit}",
        "times as fast": ratio,
        "as": row.versus,
        "target": f"{row.target} {'met' if row.met else 'missed'}" if row.target else "",
        "note": row.note,
    }


def speed_table(
    rows: pd.DataFrame,  # from `run_parts`
) -> pd.DataFrame:  # strings
    "All rows but the points of growth curves, which are listed here only when they have a target."
    curves = growth_curves(rows)
    listed = [row for row in rows.itertuples() if row.target or (row.what, row.unit, row.along) not in curves]
    return pd.DataFrame([_speed_row(row) for row in listed])


def markdown(table: pd.DataFrame) -> str:
    "A table in Markdown."
    lines = [list(table.columns), ["---"] * table.shape[1], *table.astype(str).values.tolist()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


PART_TITLES = {
    "points": "point operations",
    "encoders": "3D encoders",
    "training": "a training step",
    "processes": "several processes",
    "shards": "reading and writing shapes",
    "startup": "start of a process",
}
FASTER, SLOWER, UNMET = OKABE_ITO[0], OKABE_ITO[1], OKABE_ITO[5]


SIZES = re.compile(r" \d[\d,]*(?: (?:x|->|of) \d[\d,]*)*")
LEFT_OUT = re.compile(r"cpu|k=\d+|radius [\d.]+")  # clauses that state a size or what all have


def row_label(
    row,  # of `run_parts`
) -> str:  # "kNN vs. pytorch3d.ops.knn_points"
    "What was measured and the alternative; of point operations without the sizes, which share a row."
    what = row.what
    if row.part == "points":
        clauses = [SIZES.sub("", clause) for clause in what.split(", ") if not LEFT_OUT.fullmatch(clause)]
        what = ", ".join(clauses)
    return f"{what}  vs.  {row.versus}"


def _draw_ratios(axes: Axes, y: int, measured: pd.DataFrame) -> None:
    "Marks of one row; the smallest and the largest have their number."
    for row in measured.itertuples():
        has_target = row.target.startswith(">=")
        color = UNMET if has_target and not row.met else FASTER if row.ratio >= 1 else SLOWER
        axes.plot([row.low, row.high], [y, y], color=color, lw=3, alpha=0.4, solid_capstyle="butt")
        axes.plot(row.ratio, y, marker="o", color=color, ms=7, mec="white", mew=0.6)
        if has_target:
            axes.plot(float(row.target.strip(">= x")), y, marker="|", color="#222222", ms=16, mew=2)
    style = {"textcoords": "offset points", "va": "center", "fontsize": 9}
    low, high = measured["ratio"].min(), measured["ratio"].max()
    axes.annotate(three_digits(high), (measured["high"].max(), y), (7, 0), **style)
    if low < high:
        axes.annotate(three_digits(low), (measured["low"].min(), y), (-7, 0), ha="right", **style)


def speed_figure(
    rows: pd.DataFrame,
    title: str = "",  # the machine
) -> Figure:
    "Ratios on a logarithmic axis, a row for each operation and alternative, with a mark for each size."
    shown = rows[rows["ratio"].notna()].copy()
    shown["label"] = [row_label(row) for row in shown.itertuples()]
    groups = [(part, group.groupby("label", sort=False)) for part, group in shown.groupby("part", sort=False)]
    heights = [0.8 + len(group) for _, group in groups]
    figure = Figure(figsize=(11, 1.0 + 0.36 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(groups), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (part, group) in zip(panels, groups):
        for y, (_, measured) in enumerate(group):
            _draw_ratios(axes, y, measured)
        axes.set_yticks(range(len(group)), ["\n".join(wrap(label, 80)) for label in group.groups], fontsize=9)
        axes.set_ylim(len(group) - 0.4, -0.6)
        axes.set_title(PART_TITLES.get(part, part), loc="left", fontsize=11, fontweight="bold")
        axes.axvline(1, color="#222222", lw=0.8)
        axes.grid(axis="x", alpha=0.3)
        axes.set(xscale="log", axisbelow=True)
        axes.spines[["top", "right"]].set_visible(False)
    narrow = shown["high"].max() < 100 * shown["low"].min()
    panels[-1].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1, 3)))
    panels[-1].xaxis.set_major_formatter("{x:g}")
    panels[-1].xaxis.set_minor_formatter(NullFormatter())
    legend = (
        "times as fast as the alternative (right of 1: cg3d is faster); line: smallest to largest; |: target"
    )
    figure.supxlabel(legend, fontsize=10)
    figure.suptitle(title, fontsize=11)
    return figure


def growth_exponent(
    curve: pd.DataFrame,  # of `growth_curves`
) -> float:
    "Exponent of the growth between the two largest sizes."
    (size_1, value_1), (size_2, value_2) = curve[["at", "value"]].to_numpy()[-2:]
    return math.log(value_2 / value_1) / math.log(size_2 / size_1)


def growth_table(
    rows: pd.DataFrame,
) -> pd.DataFrame:  # strings, one row a curve
    "Values of each growth curve by size, with the exponent."
    table = []
    for (what, unit, along), curve in growth_curves(rows).items():
        points = [f"{size:,.0f}: {three_digits(value)}" for size, value in zip(curve["at"], curve["value"])]
        table.append(
            {
                "what": what,
                "unit": unit,
                "against": along,
                "size: measured": ", ".join(points),
                "exponent": f"{growth_exponent(curve):.2f}",
                "note": curve["note"].iloc[-1],
            }
        )
    return pd.DataFrame(table)


UNITS = {"ms": ("seconds", 1e-3), "s": ("seconds", 1.0), "MiB": ("MiB", 1.0)}  # unit -> axis, factor


def growth_figure(
    rows: pd.DataFrame,
    title: str = "",  # the machine
) -> Figure:
    "Time and memory against size, one panel for each quantity that grows; the name of a curve stands at its end."
    panels: dict[tuple[str, str], list] = {}  # axis and quantity -> curves
    for (what, unit, along), curve in growth_curves(rows).items():
        axis, factor = UNITS[unit]
        panels.setdefault((axis, along), []).append((what, curve["at"], curve["value"] * factor, curve))
    panels = dict(sorted(panels.items(), key=lambda item: (item[0][0] != "seconds", -len(item[1]))))
    count = -(-len(panels) // 2)
    figure = Figure(figsize=(12, 3.3 * count + 0.3), layout="constrained")
    grid = figure.subplots(count, 2, squeeze=False).flatten()
    for axes, ((axis, along), curves) in zip(grid, panels.items()):
        for color, (what, sizes, values, curve) in zip(OKABE_ITO, curves):
            label = f"{what}: {growth_exponent(curve):.2f}"
            axes.plot(sizes, values, marker="o", ms=5, lw=2, color=color, label="\n".join(wrap(label, 34)))
        axes.set(xscale="log", yscale="log", ylabel=axis, xlabel=along)
        (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
        for power in range(-12, 12):
            line = [10.0**power * left, 10.0**power * right]
            axes.plot([left, right], line, ls="--", lw=0.6, color="#bbbbbb", zorder=0)
        axes.set(xlim=(left, right), ylim=(low, high))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.legend(fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        axes.set_title(f"{axis} against {along}", loc="left", fontsize=11, fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    figure.suptitle(f"{title}; number: exponent of the growth, dashed: linear".lstrip("; "), fontsize=11)
    return figure
