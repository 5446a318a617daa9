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
                error = scheme[temperature][1]
                if name.startswith("kdcache compact") and "draws" not in name:
                    curve.append((scheme["bytes"], error, name.rsplit(" ", 1)[1]))
                    continue
                ours = name.startswith("kdcache")
                panel.plot(scheme["bytes"], error, "o" if ours else "s", color="C0" if ours else "C3", fillstyle="none")
                panel.annotate(name, (scheme["bytes"], error), xytext=(5, 4), textcoords="offset points", fontsize=7)
            curve.sort()
            panel.plot([one[0] for one in curve], [one[1] for one in curve], "o-", color="C0")
            for x, y, k in curve:
                panel.annotate(f"k = {k}", (x, y), xytext=(5, -9), textcoords="offset points", fontsize=7, color="C0")
            panel.set(
                title=f"{found['teacher']}, T = {temperature}", xlabel="bytes a position", yscale="log", xscale="log"
            )
            panel.set_ylabel("error of the gradient")
            panel.grid(alpha=0.3, which="both")
    figure.savefig(arguments.out, metadata={"Date": None})


if __name__ == "__main__":
    main()
