"""Digits across modalities: the teacher has seen the picture, the student reads only how much ink each line holds.

    python -m pipelines.digits.profiles --out runs/digits

Goes on in the folder of `pipelines.digits.recipe`. The teacher's answers to the pictures are captured once; the student
is given 56 numbers, the ink of 28 rows and 28 columns, which are joined to the store by sample id.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from kdcache.examples import Examples, write_examples
from kdcache.seeds import compare_variants, merged
from pipelines.digits.recipe import HELD_OUT, TRAIN, digits, examples, settings, store

VARIANTS: dict[str, dict[str, Any]] = {
    "hard labels": {"loss": {"alpha": 0.0}},
    "Hinton, T = 4": {"loss": {"temperature": 4.0, "alpha": 0.9}},
    "Hinton, T = 2": {"loss": {"temperature": 2.0, "alpha": 0.9}},
    "Hinton, T = 4, + hint": {
        "loss": {
            "temperature": 4.0,
            "alpha": 0.9,
            "hidden": [{"teacher": "hidden", "student": "hidden", "weight": 0.05}],
        }
    },
    "Hinton, T = 4, + PKT": {
        "loss": {
            "temperature": 4.0,
            "alpha": 0.9,
            "hidden": [{"teacher": "hidden", "student": "hidden", "kind": "pkt"}],
        }
    },
}


UNLABELLED: dict[str, dict[str, Any]] = {
    f"6,000 pairs without a label, T = {t:g}": {"loss": {"temperature": t, "alpha": 1.0}} for t in (1.0, 4.0)
}
"""As many steps, on all that is not held out: what the teacher knows of the pictures stands in for labels."""


class Lines(nn.Module):
    """Profiles float32 [S, 56] to ten classes, by 2.7 thousand weights."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(56, 40), nn.ReLU())
        self.out = nn.Linear(40, classes)

    def forward(self, profile: Tensor) -> Tensor:
        """Return logits [S, classes]."""
        return self.out(self.hidden(profile))


def student(vocab_size: int = 10) -> nn.Module:
    """A perceptron."""
    return Lines(vocab_size)


def profiles(own: Examples, folder: Path) -> Examples:
    """Write the ink of every row and column of some digits, in tenths of a full line, under the same ids."""
    pixels = np.asarray(own.fields["pixels"], dtype=np.float32)[:, 0] / 255
    ink = np.concatenate([pixels.sum(2), pixels.sum(1)], axis=1) / 2.8
    labels = {} if own.label is None else {"label": np.asarray(own.label)}
    return write_examples(folder, ids=own.ids, profile=ink.astype(np.float32), **labels)


def main() -> None:
    """Run the recipe and print its table."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--out", type=Path, default=Path("runs/digits"))
    arguments.add_argument("--epochs", type=int, default=60)
    arguments.add_argument("--seeds", type=int, default=3)
    given = arguments.parse_args()
    out: Path = given.out
    own, held = examples(out)
    kept = {"examples": {"features": [{"name": "hidden"}]}}
    stores = [store(out, f"profiles-{name}-store", one, kept) for name, one in (("train", own), ("held-out", held))]
    trained, measured = profiles(own, out / "profiles-train"), profiles(held, out / "profiles-held-out")
    base = merged(
        settings(trained, measured, stores[1], given.epochs),
        {
            "student": {"factory": "pipelines.digits.profiles:student"},
            "data": {"inputs": {"profile": "profile"}},
        },
    )
    table = compare_variants(base, VARIANTS, stores[0], out / "profiles-students", seeds=range(given.seeds))
    print(table.markdown())
    pixels, _ = digits(out / "data")
    ids = [f"digit-{number}" for number in range(len(pixels))]
    part = slice(0, len(pixels) - HELD_OUT)
    pairs = write_examples(out / "pairs", ids=ids[part], pixels=pixels[part])
    paired = store(out, "profiles-pairs-store", pairs, {})
    steps = given.epochs * -(-TRAIN // base["data"]["batch_size"])
    changed = {"data": {"examples": str(profiles(pairs, out / "profiles-pairs").folder)}, "run": {"steps": steps}}
    table = compare_variants(
        merged(base, changed), UNLABELLED, paired, out / "profiles-unlabelled", seeds=range(given.seeds)
    )
    print(table.markdown())


if __name__ == "__main__":
    main()
