"""The same weights with more and more delay, as a picture: delays.py FIGURES OUT.svg

FIGURES: results of a suite of make_suite.py with --lags. Left, word errors with intervals of 95 %,
of all clips and of each kind; right, when a word is written, after its end (paper §5.7; needs
matplotlib).
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.figure import Figure

from moshi_cli.tasks.evaluation import Result, read_result

COLOURS = ("#1f4e79", "#b5541c", "#4c8c4a", "#7a5195")


def results(folder: Path) -> dict[float, Result]:
    """Lag in seconds -> result, in order."""
    found = {float(path.name[4:]): read_result(path) for path in folder.glob("lag-*")}
    return dict(sorted(found.items()))


def main(folder: Path, out: Path) -> None:
    """Draw, and print the same as a table."""
    found = results(folder)
    lags = list(found)
    last = found[lags[-1]]
    kinds = [name for name in last.figures if name.startswith("wer/")]
    picture = Figure(figsize=(8.4, 3.4), layout="constrained", facecolor="white")
    left, right = picture.subplots(1, 2)
    for name, colour in zip(["wer", *kinds], COLOURS, strict=False):
        figures = [result.figures[name] for result in found.values()]
        values = [100 * f.value for f in figures]
        below = [100 * (f.value - f.low) if f.low is not None else 0 for f in figures]
        above = [100 * (f.high - f.value) if f.high is not None else 0 for f in figures]
        label = f"{name.partition('/')[2] or 'all'} ({figures[0].count} clips)"
        left.errorbar(
            lags, values, [below, above], color=colour, label=label, marker="o", capsize=3
        )
        print(f"{label:24}" + "".join(f"{value:8.1f} %" for value in values))
    left.set_ylabel("word errors, %")
    left.set_ylim(bottom=0)
    left.legend(fontsize=8)
    late = {lag: r.figures.get("emission_delay") for lag, r in found.items()}  # None: no word right
    known = {lag: figure.value for lag, figure in late.items() if figure is not None}
    right.plot(list(known), list(known.values()), color=COLOURS[0], marker="o")
    print(f"{'written after':24}" + "".join(f"{value:8.2f} s" for value in known.values()))
    right.set_ylabel("written after the word's end, s")
    for panel in (left, right):
        panel.set_xlabel("lag of the text, s")
        panel.grid(alpha=0.3)
    picture.savefig(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
