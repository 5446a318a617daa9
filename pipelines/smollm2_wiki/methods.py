"""SmolLM2 to a small Llama by several methods from one store: temperatures, divergences, tails, layers, attention.

    python -m pipelines.smollm2_wiki.methods [--group responses] [--out runs/smollm2_methods] [--seeds 3]

Needs `make models`. Stopped, the same command goes on; without a group it runs all of them. Ends in the tables of the
README beside this file.
"""

import argparse
from pathlib import Path
from typing import Any

from kdcache import display
from kdcache.capture import capture
from kdcache.capture.config import CaptureConfig
from kdcache.config import parse_config
from kdcache.demo import teacher_folder, write_articles
from kdcache.seeds import compare_variants

LAYERS = ["10", "20", "final", "attentions.29", "layers.29.self_attn.v_proj"]
"""What is kept of the teacher's 30 layers: three hidden states, and of the last layer its map and its values."""

STUDENT = {
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 288,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}

HINTS = [
    {"teacher": "10", "student": "1", "kind": "cosine", "weight": 1.0},
    {"teacher": "20", "student": "2", "kind": "cosine", "weight": 1.0},
    {"teacher": "final", "student": "final", "kind": "cosine", "weight": 1.0},
]

MAP = {"teacher": "attentions.29", "student": "attentions.2", "kind": "map_kl", "weight": 0.5}
VALUES = {
    "teacher": "layers.29.self_attn.v_proj",
    "student": "layers.2.self_attn.v_proj",
    "kind": "value_relation",
    "options": {"heads": 3},
    "weight": 0.5,
}

BOTH: dict[str, dict[str, Any]] = {"hard labels": {"loss": {"alpha": 0.0}}, "T = 1": {}}

GROUPS: dict[str, dict[str, dict[str, Any]]] = {
    "responses": {
        **BOTH,
        "T = 2": {"loss": {"temperature": 2.0}},
        "reverse KL": {"loss": {"divergence": "reverse_kl"}},
    },
    "features": {
        **BOTH,
        "T = 1, hidden features": {"loss": {"hidden": HINTS}},
        "T = 1, last hidden state, a tenth": {"loss": {"hidden": [{**HINTS[-1], "weight": 0.1}]}},
    },
    "attention": {
        **BOTH,
        "T = 1, attention map": {"loss": {"hidden": [MAP]}},
        "T = 1, value relation": {"loss": {"hidden": [VALUES]}},
    },
    "tails": {
        **BOTH,
        "T = 1, sampled tail": {"loss": {"tail": "sampled"}},
        "T = 1, head alone, renormalised": {"loss": {"tail": "renormalise"}},
    },
    "labels": {**BOTH, "T = 1, half hard labels": {"loss": {"alpha": 0.5}}},
}
"""Runs of the same name are the same, and are done once."""


def store(out: Path, data: Path, name: str, **targets: Any) -> Path:
    """Capture the teacher on the articles of a name; return the store's folder."""
    tree = {
        "source": {"path": str(data / f"{name}.jsonl"), "id_field": "id"},
        "samples": {"max_length": 256},
        "teacher": {"model": str(teacher_folder()), "dtype": "bfloat16", "batch_positions": 4096},
        "targets": {"k": 64, **targets},
        "store": {"shard_positions": 16384},
        "licences": {"teacher": "Apache-2.0", "data": "CC-BY-SA-4.0"},
    }
    with display.capture_progress(quiet=False) as progress:
        capture(parse_config(CaptureConfig, tree), out / name, progress=progress)
    return out / name


def settings(held_out: Path) -> dict[str, Any]:
    """Return the training config that all variants share."""
    return {
        "student": {"config": STUDENT},
        "data": {"batch_size": 8, "validation": str(held_out)},
        "loss": {"alpha": 1.0, "temperature": 1.0},
        "optim": {"learning_rate": 0.003, "warmup_steps": 20},
        "run": {"epochs": 2, "validate_every": 10**9},
    }


def main() -> None:
    """Run the recipe and print its table."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    arguments.add_argument("--group", choices=GROUPS, action="append")
    arguments.add_argument("--out", type=Path, default=Path("runs/smollm2_methods"))
    arguments.add_argument("--articles", type=int, default=180, help="articles to train on")
    arguments.add_argument("--seeds", type=int, default=3)
    given = arguments.parse_args()
    out: Path = given.out
    data = write_articles(out / "data", given.articles, 60)
    held_out = store(out, data, "held-out")
    trained = store(out, data, "train", hidden=LAYERS, draws=8)
    base = settings(held_out)
    for name in given.group or GROUPS:
        table = compare_variants(base, GROUPS[name], trained, out / "students", seeds=range(given.seeds)).markdown()
        (out / f"{name}.md").write_text(table)
        print(f"{name}\n\n{table}")


if __name__ == "__main__":
    main()
