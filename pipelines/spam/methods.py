"""Mail: losses of attention maps and relations, pairs of layers by a rule, and views of texts, beside the response.

    python -m pipelines.spam.methods --group relations

Goes on in the folder of `pipelines.spam.recipe`: the same mails and teacher. Stopped, the same command goes on; without
a group it runs all. Weights of terms were set once, to a like size at the first step, and not tuned.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdcache.seeds import compare_variants
from pipelines.spam.recipe import RESPONSE, STUDENT, examples, settings, store, teacher

LAYER = "bert.encoder.layer.{}.attention.self.{}"


def _with(*hidden: dict[str, Any], **loss: Any) -> dict[str, Any]:
    return {"loss": {**RESPONSE, "hidden": list(hidden), **loss}}


def _relation(name: str) -> dict[str, Any]:
    own = {"teacher": name, "student": LAYER.format(1, name), "kind": "value_relation", "options": {"heads": 4}}
    return {**own, "weight": 0.2}


def _maps(kind: str, weight: float) -> dict[str, Any]:
    return {"teacher": "attention", "student": "attentions.1|heads", "kind": kind, "weight": weight}


RELATIONS = {name: _relation(name) for name in ("query", "key", "value")}

ATTENTION = {
    "response": _with(),
    "+ map KL": _with(_maps("map_kl", 0.2)),
    "+ map MSE": _with(_maps("map_mse", 100.0)),
}

OF_VECTORS = {
    "response": _with(),
    "+ query relation": _with(RELATIONS["query"]),
    "+ key relation": _with(RELATIONS["key"]),
    "+ value relation": _with(RELATIONS["value"]),
    "+ all three relations": _with(*RELATIONS.values()),
}

PAIRS = {
    "response": _with(),
    "+ last layer": _with(pairs={"rule": "last", "weight": 0.1}),
    "+ last two": _with(pairs={"rule": "last", "count": 2, "weight": 0.1}),
    "+ every": _with(pairs={"rule": "every", "weight": 0.1}),
    "+ every, cosine": _with(pairs={"rule": "every", "kind": "cosine", "weight": 0.5}),
}

MAPS = [{"name": "attention", "tap": "attentions.5|heads"}]
HEADS = [{"name": "heads", "tap": "attentions.5"}]
VECTORS = [{"name": name, "tap": LAYER.format(5, name)} for name in RELATIONS]
LAYERS = [{"name": str(number), "tap": f"hidden_states.{number}"} for number in (3, 5, 6)]

TOKENS = {
    "kind": "tokens",
    "mask_field": "attention_mask",
    "views": 4,
    "token_mask": 0.1,
    "token_drop": 0.1,
    "token_swap": 0.1,
    "mask_id": 103,
    "keep": [101, 102],
}
"""Of the teacher's tokenizer: the mask, and what stands at the beginning and the end."""

HARD = {"loss": {"alpha": 0.0}}

WIDE = {**STUDENT, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
"""Two layers of the teacher's size."""

NAMES = ("attention", "relations", "pairs", "views", "layers")


def groups(model: Path) -> dict[str, list[tuple[str, dict[str, Any], dict[str, dict[str, Any]]]]]:
    """Return of each group its stores: name, what the capture keeps or changes, and the variants trained from it.

    Args:
        model: Folder of the teacher, whose layers some students begin with.
    """
    unmasked = {**TOKENS, "token_mask": 0.0}
    short = {"run": {"epochs": 3}}
    kept = {"config": None, "model": str(model), "keep_layers": 2}
    layers = {
        "two layers from scratch": {**_with(), **short, "student": {"config": WIDE}, "optim": {"learning_rate": 5e-4}},
        "two of the teacher's": {**_with(), **short, "student": kept, "optim": {"learning_rate": 2e-4}},
    }
    pair = {"teacher": "heads", "student": "attentions.1", "kind": "map_kl", "options": {"per_head": True}}
    by_head = {**layers["two of the teacher's"], **_with({**pair, "weight": 0.2})}
    return {
        "attention": [("store-attention", {"features": [*MAPS, *VECTORS]}, ATTENTION)],
        "relations": [("store-attention", {"features": [*MAPS, *VECTORS]}, OF_VECTORS)],
        "pairs": [("store-pairs", {"features": LAYERS}, PAIRS)],
        "views": [
            ("store-plain", {}, {"hard labels": HARD, "response": _with()}),
            ("store-views", {"augment": TOKENS}, {"hard labels, masked too": HARD, "response, masked too": _with()}),
            ("store-unmasked", {"augment": unmasked}, {"hard labels, 4 views": HARD, "response, 4 views": _with()}),
        ],
        "layers": [
            ("store-plain", {}, layers),
            ("store-heads", {"features": HEADS}, {"+ maps, head by head": by_head}),
        ],
    }


def main() -> None:
    """Run one group, or all, and print a table of each."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    arguments.add_argument("--group", choices=NAMES, action="append")
    arguments.add_argument("--out", type=Path, default=Path("runs/spam"))
    arguments.add_argument("--epochs", type=int, default=8)
    arguments.add_argument("--seeds", type=int, default=3)
    given = arguments.parse_args()
    out: Path = given.out
    own, held = examples(out)
    model = teacher(out)
    base = settings(own, held, store(out, "held-out-store", held, model), given.epochs)
    stores = groups(model)
    for name in given.group or NAMES:
        tables = [
            compare_variants(
                base,
                variants,
                store(out, source, own, model, **kept),
                out / "methods" / source,
                seeds=range(given.seeds),
            )
            for source, kept, variants in stores[name]
        ]
        whole = replace(tables[0], rows=[row for one in tables for row in one.rows]).markdown()
        (out / "methods" / f"{name}.md").write_text(whole)
        print(f"{name}\n\n{whole}")


if __name__ == "__main__":
    main()
