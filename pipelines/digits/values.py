"""Digits: outputs that are not classes: where the ink lies (regression), and what the digit is like (several labels).

    python -m pipelines.digits.values

Goes on in the folder of `pipelines.digits.recipe`. Each teacher is trained on 6,000 digits, each student sees 500 of
them, in no other view than their own: a label says where the ink of the image as it is lies.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.examples import write_examples
from kdcache.metrics import root_mean_squared_error, summary
from kdcache.seeds import compare_variants, folder_of, merged
from kdcache.train.student import load_student
from pipelines.digits.recipe import HELD_OUT, TRAIN, digits, settings, store
from pipelines.digits.teachers import labelled, taught

Array = NDArray[Any]

STUDENT, TEACHER = "pipelines.digits.networks:student", "pipelines.digits.networks:teacher"

SETS = {
    "even": (0, 2, 4, 6, 8),
    "prime": (2, 3, 5, 7),
    "square": (0, 1, 4, 9),
    "round": (0, 6, 8, 9),
    "high": range(5, 10),
}
"""Labels of a digit; round ones have a closed loop."""


def ink(pixels: Array, _: Array) -> NDArray[np.float32]:
    """Return five values of each image: where its ink's centre lies, down and right, its spread, and how much it is.

    Places are of -1 to 1; spreads are standard deviations of places; how much is four times the mean.
    """
    weight = pixels[:, 0].astype(np.float64) / 255
    whole = weight.sum((1, 2))
    axis = np.linspace(-1, 1, 28)
    found = []
    for share in (weight.sum(2) / whole[:, None], weight.sum(1) / whole[:, None]):
        mean = share @ axis
        found += [mean, np.sqrt(share @ axis**2 - mean**2)]
    return np.stack([*found, 4 * weight.mean((1, 2))], 1).astype(np.float32)


def sets(_: Array, digit: Array) -> NDArray[np.float32]:
    """Return 1 for every label of `SETS` that a digit has, else 0."""
    return np.stack([np.isin(digit, list(one)) for one in SETS.values()], 1).astype(np.float32)


TASKS: dict[str, tuple[Callable[[Array, Array], Array], dict[str, Any], dict[str, dict[str, Any]]]] = {
    "ink": (
        ink,
        {"divergence": "regression", "hard": "mse"},
        {
            "hard labels": {"loss": {"alpha": 0.0}},
            "regression": {"loss": {"alpha": 0.9}},
            "regression, no label": {"loss": {"alpha": 1.0}},
            "regression, huber": {"loss": {"alpha": 0.9, "options": {"kind": "huber"}}},
        },
    ),
    "sets": (
        sets,
        {"divergence": "sigmoid", "hard": "sigmoid"},
        {
            "hard labels": {"loss": {"alpha": 0.0}},
            "sigmoid, T = 1": {"loss": {"alpha": 0.9}},
            "sigmoid, T = 2": {"loss": {"alpha": 0.9, "temperature": 2.0}},
            "sigmoid, T = 2, no label": {"loss": {"alpha": 1.0, "temperature": 2.0}},
        },
    ),
}


@torch.inference_mode()
def answers(folder: Path, factory: str, pixels: Array, outputs: int) -> Array:
    """Return what a run's student says [S, outputs]."""
    model = load_student(folder, factory, outputs).eval()
    return np.asarray(model(torch.from_numpy(pixels)).numpy())


def right(said: Array, label: Array) -> float:
    """Return the share of labels that the sign of an output tells rightly."""
    return float(((said > 0) == (label > 0.5)).mean())


def error(said: Array, label: Array) -> float:
    """Return the root of the mean squared error over all outputs."""
    return root_mean_squared_error(said.ravel(), label.ravel())


MEASURES = {"ink": ("root mean squared error", error), "sets": ("labels that are right", right)}


def compared(out: Path, name: str, epochs: int, seeds: Sequence[int]) -> str:
    """Train teacher and students of one task; return their table."""
    of, loss, variants = TASKS[name]
    pixels, digit = digits(out / "data")
    label = of(pixels, digit)
    rest, last = slice(0, -HELD_OUT), slice(-HELD_OUT, None)
    labels = labelled(out / name, "for-teacher", pixels=pixels[rest], label=label[rest])
    own = write_examples(out / name / "train", pixels=pixels[:TRAIN], label=label[:TRAIN])
    held = write_examples(out / name / "held-out", pixels=pixels[last], label=label[last])
    teacher = taught(out / name, "teacher", labels, {"loss": loss | {"alpha": 0.0}})
    taken = {"teacher": {"kind": "student", "model": str(teacher)}, "targets": {"k": label.shape[1]}}
    made = [store(out / name, f"{one.folder.name}-said", one, taken) for one in (own, held)]
    base = merged(settings(own, held, made[1], epochs), {"loss": loss})
    compare_variants(base, variants, made[0], out / name / "students", seeds=seeds)
    title, measure = MEASURES[name]
    rows = [("teacher", f"{measure(answers(teacher, TEACHER, pixels[last], label.shape[1]), label[last]):.4f}")]
    for variant in variants:
        folders = [out / name / "students" / folder_of(variant) / str(seed) for seed in seeds]
        said = [answers(one, STUDENT, pixels[last], label.shape[1]) for one in folders]
        value = summary([measure(one, label[last]) for one in said])
        rows.append((variant, f"{value.mean:.4f} ± {value.deviation or 0:.4f}"))
    table = "\n".join(f"| {name} | {value} |" for name, value in [("", title), ("---", "---"), *rows]) + "\n"
    (out / name / "table.md").write_text(table)
    return table


def main() -> None:
    """Run both tasks and print their tables."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    arguments.add_argument("--out", type=Path, default=Path("runs/digits"))
    arguments.add_argument("--epochs", type=int, default=60)
    arguments.add_argument("--seeds", type=int, default=3)
    given = arguments.parse_args()
    for name in TASKS:
        print(f"{name}\n\n{compared(given.out, name, given.epochs, range(given.seeds))}")


if __name__ == "__main__":
    main()
