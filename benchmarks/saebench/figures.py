"""Figures of the page: speed of everyone, and cost of a step against its sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saebench import contestants as who
from saebench.summary import medians, speed

STYLES = {
    who.OURS: ("#0072B2", "o", "-"),
    who.OURS_LOW: ("#56B4E9", "s", "-"),
    who.DENSE: ("#D55E00", "^", "--"),
    who.PRODUCT: ("#000000", "x", ":"),
}
"""Okabe-Ito colours; marker and line also tell the contestants apart."""
KINDS = {"ours": ("#0072B2", "o", "biosae"), "peer": ("#E69F00", "D", "other libraries"),
         "yardstick": ("#666666", "x", "yardsticks")}  # fmt: skip
AXES = {"batch": "rows a step", "d": "features d", "m": "latents m", "k": "active latents k"}


def draw(results: dict[str, Any], folder: Path) -> None:
    """Write ``sae_peers`` and ``sae_scaling`` as PDF and PNG, as far as they have been measured."""
    import matplotlib

    matplotlib.use("Agg")
    bare = {"axes.spines.top": False, "axes.spines.right": False}
    matplotlib.rcParams.update({"font.size": 8, "pdf.fonttype": 42, **bare})
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in (("peers", _peers), ("scaling", _scaling)):
        if results.get(name):
            figure = make(results[name])
            for ending in ("pdf", "png"):
                figure.savefig(folder / f"sae_{name}.{ending}", dpi=200, bbox_inches="tight")


def _peers(found: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    labels = [c.label for c in who.CONTESTANTS][::-1]
    figure = Figure(figsize=(2.0 + 2.1 * len(found), 3.2), layout="constrained")
    axes = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for ax, entry in zip(axes, found.values()):
        case, points = entry["case"], medians(entry["rounds"])
        for one in who.CONTESTANTS:
            rate, at = speed(points, one.label), labels.index(one.label)
            if not rate:
                ax.annotate(points.get(one.label, {}).get("status", "not run")[:24], (0.02, at), fontsize=6,
                            xycoords=("axes fraction", "data"), va="center", color="#666666")  # fmt: skip
                continue
            colour, marker, _ = KINDS[one.kind]
            ax.plot(rate, at, marker, color=colour, markersize=5)
        ax.set_xscale("log")
        _plain(ax.xaxis)
        ax.set_ylim(-0.6, len(labels) - 0.4)
        ax.grid(axis="both", color="#dddddd", linewidth=0.5)
        ax.set_axisbelow(True)
        ax.set_xlabel("rows / s")
        ax.set_title(f"{case['name']}\nd {case['d']}, m {case['m']:,}, k {case['k']}", fontsize=8)
    axes[0].set_yticks(range(len(labels)), labels)
    return figure


def _plain(axis: Any) -> None:
    """Ticks at 1, 2 and 5 of each power of ten, written out."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1000:g}k" if x >= 1000 else f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _scaling(records: list[dict[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 5.2), layout="constrained")
    grid = figure.subplots(2, 2).flat
    for ax, (axis, name) in zip(grid, AXES.items()):
        lines: dict[str, list[tuple[float, float]]] = {}
        for value in sorted({r["value"] for r in records if r["axis"] == axis}):
            points = medians([r for r in records if (r["axis"], r["value"]) == (axis, value)])
            for label, one in points.items():
                if one["status"] == "ok":
                    lines.setdefault(label, []).append((value, one["wall"]))
        for label, style in STYLES.items():
            if label in lines:
                colour, marker, dash = style
                ax.plot(*zip(*lines[label]), color=colour, marker=marker, linestyle=dash, markersize=4, label=label)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        _plain(ax.yaxis)
        ax.set_xticks(sorted({r["value"] for r in records if r["axis"] == axis}))
        ax.xaxis.set_major_formatter("{x:,.0f}")
        ax.set_xlabel(name)
        ax.set_ylabel("seconds a step")
        ax.grid(color="#dddddd", linewidth=0.5)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=2, frameon=False)
    return figure
