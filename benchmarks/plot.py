"""The picture of benchmarks/schemes.py: bytes a position against the error of the gradient.

pip install matplotlib
python benchmarks/plot.py benchmarks/results/...-schemes.json [...] --out docs/schemes.svg
"""

import argparse
import json
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

SHOWN = ("1", "2")
TICKS = (30, 50, 100, 200, 500)
MARKERS = {
    "kdcache compact, k = 64, 8 draws": "D",
    "50 pure draws": "x",
    "renormalised top-64": "v",
    "ghost bucket, top-64": "s",
    "polynomial, top-64": "^",
}


def main() -> None:
    """Draw a row of panels for every file, one a temperature."""
    parser = argparse.ArgumentParser()
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("docs/schemes.svg"))
    arguments = parser.parse_args()
    mpl.rcParams.update({"svg.hashsalt": "kdcache", "font.size": 9, "svg.fonttype": "none"})
    rows = len(arguments.results)
    figure, panels = plt.subplots(rows, len(SHOWN), figsize=(10, 3.6 * rows), squeeze=False, layout="constrained")
    for line, path in zip(panels, arguments.results, strict=True):
        found = json.loads(path.read_text())
        for panel, temperature in zip(line, SHOWN, strict=True):
            curve = []
            for name, scheme in found["schemes"].items():
                if name.startswith("kdcache compact") and "draws" not in name:
                    curve.append((scheme["bytes"], scheme[temperature][1], name.rsplit(" ", 1)[1]))
            curve.sort()
            xs, ys = [one[0] for one in curve], [one[1] for one in curve]
            panel.plot(xs, ys, "o-", color="C0", label="kdcache compact")
            for x, y, k in curve:
                panel.annotate(f"k = {k}", (x, y), xytext=(4, 5), textcoords="offset points", fontsize=7, color="C0")
            for name, marker in MARKERS.items():
                scheme = found["schemes"][name]
                panel.plot(scheme["bytes"], scheme[temperature][1], marker, ms=8, fillstyle="none", mew=1.5, label=name)
            panel.set(title=f"{found['teacher']}, T = {temperature}", xlabel="bytes a position")
            panel.set(xscale="log", yscale="log")
            panel.set_xticks(TICKS, [str(one) for one in TICKS])
            panel.minorticks_off()
            panel.set_ylabel("error of the gradient")
            panel.grid(alpha=0.3)
    panels[0][0].legend(fontsize=7)
    figure.savefig(arguments.out, metadata={"Date": None})


if __name__ == "__main__":
    main()
