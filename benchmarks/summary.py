"""Run every benchmark of this folder, each in its own process, and draw one table and two figures.

`nbs/benchmark.ipynb` calls this module; `python benchmarks/NAME.py` runs one benchmark alone.
"""

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
from harness import Row
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from tqdm.auto import tqdm

from cg3d.core.atomic import write_file
from cg3d.core.config import check_settings, split_list
from cg3d.core.errors import Cg3dError, InputError
from cg3d.core.untrusted import read_json

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


def speed_figure(
    rows: pd.DataFrame,
    title: str = "",  # the machine
) -> Figure:
    "Ratios as bars on a logarithmic axis; a line from the smallest to the largest pair, a mark at the target."
    shown = rows[rows["ratio"].notna()].iloc[::-1]
    figure = Figure(figsize=(7, 1.3 + 0.24 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for y, row in enumerate(shown.itertuples()):
        axes.barh(y, row.ratio - 1, left=1, color="#2f6f9f" if row.ratio >= 1 else "#b5653a", height=0.62)
        axes.plot([row.low, row.high], [y, y], color="#222222", lw=1.2)
        if row.target.startswith(">="):
            color = "#2a9d55" if row.met else "#c62828"
            axes.plot(float(row.target.strip(">= x")), y, marker="|", color=color, markersize=13, mew=2.5)
    axes.set_ylim(-0.7, len(shown) - 0.3)
    axes.set_yticks(
        range(len(shown)), [f"{row.what}\nas {row.versus}" for row in shown.itertuples()], fontsize=6
    )
    axes.set(xscale="log", xlabel="times as fast\nline: smallest to largest pair; mark: target", title=title)
    narrow = shown["high"].max() < 100 * shown["low"].min()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1, 3)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(1, color="#222222", lw=0.8)
    axes.grid(axis="x", alpha=0.3)
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


def growth_figure(
    rows: pd.DataFrame,
    title: str = "",  # the machine
) -> Figure:
    "Time and memory against size on logarithmic axes; dashed lines grow linearly."
    figure = Figure(figsize=(10, 7.5), layout="constrained")
    curves = growth_curves(rows)
    for axes, units, label in zip(
        figure.subplots(1, 2), ({"ms": 1e-3, "s": 1.0}, {"MiB": 1.0}), ("seconds", "MiB")
    ):
        axes.set_prop_cycle(color=colormaps["tab20"].colors)
        for (what, unit, along), curve in curves.items():
            if unit in units:
                name = f"{what}, against {along}: exponent {growth_exponent(curve):.2f}"
                axes.plot(curve["at"], curve["value"] * units[unit], marker="o", ms=4, lw=1.4, label=name)
        axes.set(xscale="log", yscale="log", ylabel=label, xlabel="size")
        (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
        for power in range(-12, 12):
            line = [10.0**power * left, 10.0**power * right]
            axes.plot([left, right], line, ls="--", lw=0.6, color="#bbbbbb", zorder=0)
        axes.set(xlim=(left, right), ylim=(low, high))
        axes.legend(fontsize=6.5, loc="upper center", bbox_to_anchor=(0.5, -0.09))
    figure.suptitle(title)
    return figure
