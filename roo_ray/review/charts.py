"""Pictures of a run as PNG files: each says what it shows, with a unit on every axis, readable at a glance.

matplotlib is imported when a picture is drawn (``pip install matplotlib``); nothing else needs it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from roo_ray.errors import RooError
from roo_ray.terminal import human_bytes

BLUE, ORANGE, GREEN, GREY = "#1f5fa8", "#d9730d", "#2d8659", "#8a8f98"
Points = Sequence[tuple[float, float]]


@contextmanager
def picture(path: Path, title: str, x: str, y: str, size: tuple[float, float] = (6.4, 4.2)) -> Iterator[Any]:
    """Axes with a title and labels; the file is written when the block ends. Raises RooError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise RooError("pictures need matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_title(title, fontsize=11, loc="left", fontweight="bold")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    yield axes
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def roc(path: Path, task: str, curves: Mapping[str, Any]) -> None:
    """The ROC curve of a task (``metrics.curves``)."""
    title = f"{task}: ROC on held-out data, AUC {curves['auc']:.4f}"
    with picture(
        path, title, "false positive rate (share of negatives)", "true positive rate (share of positives)"
    ) as a:
        a.plot(
            curves["roc"]["false_positive_rate"], curves["roc"]["true_positive_rate"], color=BLUE, lw=2, label="model"
        )
        a.plot([0, 1], [0, 1], color=GREY, ls="--", lw=1, label="chance")
        a.set(xlim=(0, 1), ylim=(0, 1))
        a.legend(loc="lower right", frameon=False)


def calibration(path: Path, task: str, table: Mapping[str, Sequence[float]]) -> None:
    """Observed against predicted rates by bin, on logarithmic axes; a point's area is its impressions."""
    predicted, observed, counts = (np.array(table[k]) for k in ("mean_prediction", "mean_label", "impressions"))
    total = predicted @ counts / max(observed @ counts, 1e-12)
    error = np.sqrt(np.maximum(observed * (1 - observed), 0) / counts)
    title = f"{task}: calibration on held-out data, predicted / observed {total:.3f}"
    with picture(path, title, "predicted probability (mean of the bin)", "observed positive rate (mean label)") as a:
        shown = (observed > 0) & (counts >= 10)
        a.errorbar(predicted[shown], observed[shown], yerr=2 * error[shown], fmt="none", ecolor=BLUE, alpha=0.5, lw=1)
        sizes = 12 + 150 * counts[shown] / counts.max()
        a.scatter(predicted[shown], observed[shown], s=sizes, color=BLUE, alpha=0.8, label="bin (area: impressions)")
        low = float(min(predicted[shown].min(), observed[shown].min())) / 1.5 if shown.any() else 1e-3
        a.plot([low, 1], [low, 1], color=GREY, ls="--", lw=1, label="calibrated")
        a.set(xscale="log", yscale="log", xlim=(low, 1), ylim=(low, 1))
        a.legend(loc="upper left", frameon=False, title="bars: ± 2 standard errors", title_fontsize=8)


def histogram(path: Path, title: str, x: str, values: npt.NDArray[np.int64], cut: int | None = None) -> None:
    """How many requests have so many of something; the mean is marked, and where the schema cuts."""
    top = int(np.quantile(values, 0.999)) if len(values) else 1
    width = max(1, -(-(top + 1) // 50))
    bins = np.arange(-0.5, max(top + 1, cut or 0) + width, width)
    share = np.full(len(values), 100 / max(len(values), 1))
    with picture(path, title, x, f"requests (% of {len(values):,} sampled)") as a:
        a.hist(np.minimum(values, bins[-1]), bins=bins, weights=share, color=BLUE, alpha=0.85)
        a.axvline(values.mean(), color=ORANGE, lw=2, label=f"mean {values.mean():.1f}")
        if cut is not None:
            a.axvline(cut, color=GREY, ls="--", label=f"schema keeps the last {cut}")
        a.legend(frameon=False)


def bytes_per_column(path: Path, ledger: Mapping[str, Any], columns: int = 14) -> None:
    """Bytes on disk per column, a row per impression against a row per request, largest first."""
    sizes = {name: entry["disk_bytes"] for name, entry in ledger["columns"].items()}
    named = sorted(sizes, key=lambda name: -max(sizes[name]["impression"], sizes[name]["request"]))[:columns][::-1]
    totals = ledger["totals"]["disk_bytes"]
    saved = totals["impression"] - totals["request"]
    scale, unit = next(
        (s, u) for s, u in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")) if totals["impression"] >= s
    )
    title = (
        f"Bytes saved per column: {human_bytes(saved)} of {human_bytes(totals['impression'])} "
        f"({totals['impression'] / max(totals['request'], 1):.1f}x)"
    )
    size = (7.4, 1.6 + 0.36 * len(named))
    with picture(path, title, f"bytes on disk, compressed ({unit})", "column of the log", size) as a:
        at = np.arange(len(named))
        before = np.array([sizes[name]["impression"] for name in named]) / scale
        after = np.array([sizes[name]["request"] for name in named]) / scale
        a.barh(at + 0.2, before, 0.4, color=GREY, label="a row per impression (as logged)")
        a.barh(at - 0.2, after, 0.4, color=BLUE, label="a row per request")
        for place, (b, r) in enumerate(zip(before, after, strict=True)):
            a.text(max(b, r) + 0.01 * before.max(), place, f"{b / r:.1f}x" if r else "", va="center", fontsize=8)
        a.set_yticks(at, named)
        a.set_xlim(0, 1.1 * max(before.max(), after.max()))
        a.grid(axis="y", visible=False)
        a.legend(frameon=False, loc="lower right")


def step_times(path: Path, milliseconds: Mapping[str, float]) -> None:
    """Where a training step's time goes."""
    names = sorted(milliseconds, key=lambda name: milliseconds[name])
    values = np.array([milliseconds[name] for name in names])
    title = f"A training step: {values.sum():.1f} ms (mean over ranks and steps)"
    with picture(path, title, "time per step (ms)", "part of the step", (6.4, 1.5 + 0.4 * len(names))) as a:
        a.barh(names, values, color=BLUE)
        for place, value in enumerate(values):
            text = f" {value:.1f} ms, {value / max(values.sum(), 1e-9):.0%}"
            a.text(value, place, text, va="center", fontsize=9)
        a.set_xlim(0, 1.3 * max(values.max(), 1e-9))
        a.grid(axis="y", visible=False)


def lines(path: Path, title: str, x: str, y: str, series: Mapping[str, Points], best: float | None = None) -> None:
    """One line per named series of (x, y) points; ``best`` is marked as the Bayes optimum. The y axis leaves out the
    first tenth of the points, in which a model starts."""
    colours = [BLUE, ORANGE, GREEN, GREY]
    with picture(path, title, x, y) as a:
        late: list[float] = []
        for number, (name, points) in enumerate(series.items()):
            xs, ys = np.array(points, np.float64).reshape(-1, 2).T
            a.plot(xs, ys, color=colours[number % 4], lw=2, marker="o" if len(xs) < 25 else None, ms=3, label=name)
            late += ys[len(ys) // 10 :].tolist()
        if best is not None:
            a.axhline(best, color=GREY, ls="--", lw=1, label=f"Bayes optimum {best:.4f}")
            late.append(best)
        if late and max(late) > min(late):
            room = 0.08 * (max(late) - min(late))
            a.set_ylim(min(late) - room, max(late) + room)
        a.legend(frameon=False)


def by_day(
    path: Path, task: str, days: Sequence[str], series: Mapping[str, Sequence[float | None]], refused: str | None = None
) -> None:
    """A task's NE by day, a line per named series; a day whose model was not published is marked."""
    with picture(path, f"{task}: NE by day", "day (UTC)", "NE (1 = base rate; lower is better)", (8.0, 4.2)) as a:
        for (name, values), colour in zip(series.items(), (BLUE, GREEN, ORANGE), strict=False):
            ys = [np.nan if value is None else value for value in values]
            a.plot(list(days), ys, marker="o", ms=4, lw=2, color=colour, label=name)
        if refused is not None:
            a.axvline(days.index(refused), color=GREY, ls="--", lw=1, label=f"{refused}: not published")
        a.tick_params(axis="x", rotation=45)
        a.legend(frameon=False)
