"""The dataset card of a shared store: what a stranger needs to know before using it, from the store itself."""

import io
import re
from importlib import resources
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from kdcache.describe import sampled, summary_of
from kdcache.store import Store

CARD, PREVIEW = "README.md", "preview.parquet"
SAMPLES, POSITIONS, CANDIDATES = 20, 64, 5
"""Of the preview."""

BOUNDS = {
    "levels": "whole steps of {step}: at most {half} nat off",
    "bits": "exact bits of {kind}",
    "float16": "half precision: 2^-11 of the value off",
    "bfloat16": "bfloat16: exact for a teacher that computes in it",
    "float32": "single precision",
}

SIZES = ((1 << 40, "n>1T"), (10**9, "n>1B"), (10**8, "100M<n<1B"), (10**7, "10M<n<100M"), (10**6, "1M<n<10M"))
SMALLER = ((10**5, "100K<n<1M"), (10**4, "10K<n<100K"), (10**3, "1K<n<10K"), (0, "n<1K"))


def card(store: Store, url: str) -> str:
    """Return the card as Markdown with the hub's YAML header. Nothing of the store's texts is in it.

    Args:
        store: What is shared.
        url: Where it will be.
    """
    told = summary_of(store)
    teacher, licences = told["teacher"] or {}, told["licences"] or {}
    header = {
        "tags": ["knowledge-distillation", "kdcache", "logits"],
        "task_categories": ["text-generation" if store.manifest.kind == "causal_lm" else "other"],
        "size_categories": [next(name for least, name in SIZES + SMALLER if len(store) >= least)],
        "configs": [{"config_name": "preview", "data_files": PREVIEW}],
        **({"license": _identifier(licences["data"])} if licences.get("data") else {}),
    }
    masses = _masses(store)
    rows = "".join(
        f"| `{one['name']}` | {one['codec']} | {one['dtype']} {one['shape'] or ''} "
        f"| {one['bytes_per_position']:.2f} |\n"
        for one in told["columns"]
    )
    kept = "".join(f"| {temperature:g} | {mean:.4f} | {worst:.4f} |\n" for temperature, mean, worst in masses)
    logits = store.columns["head_logits"]
    fields = {
        "header": yaml.safe_dump(header, sort_keys=False).strip(),
        "title": _plain(teacher.get("name") or "a teacher"),
        "positions": f"{told['positions']:,}",
        "k": store.k,
        "samples": f"{told['samples']:,}",
        "teacher": _plain(teacher.get("name")),
        "dtype": _plain(teacher.get("dtype")),
        "revision": _plain(teacher.get("revision")),
        "weights": _plain(teacher.get("weights")),
        "teacher_licence": _plain(licences.get("teacher")),
        "data_licence": _plain(licences.get("data")),
        "tokenizer": _plain((told["tokenizer"] or {}).get("name")),
        "vocab_size": f"{told['vocab_size']:,}",
        "bytes": f"{told['bytes']:,}",
        "bytes_per_position": f"{told['bytes_per_position']:.1f}",
        "format_version": told["format_version"],
        "digest": store.digest,
        "url": url,
        "columns": rows,
        "bound": BOUNDS.get(logits.codec, logits.codec).format(**_steps(logits.parameters)),
        "looked_at": f"{POSITIONS * SAMPLES:,}",
        "masses": kept,
    }
    return resources.files(__package__).joinpath("card.md").read_text().format_map(fields)


def preview(store: Store) -> bytes:
    """Return a Parquet file of the first positions with their tokens as text and the teacher's candidates, at T = 1."""
    rows: dict[str, list[Any]] = {
        name: [] for name in ("sample", "row", "input", "label", "label_probability", "tail_mass", "candidates")
    }
    for sample in sampled(store, SAMPLES, positions=POSITIONS, candidates=CANDIDATES, temperature=1.0):
        for row in sample["rows"]:
            rows["sample"].append(sample["id"])
            for name in ("row", "input", "label", "label_probability", "tail_mass"):
                rows[name].append(row[name])
            rows["candidates"].append(
                [{"token": str(one["token"]), "probability": one["probability"]} for one in row["candidates"]]
            )
    sink = io.BytesIO()
    pq.write_table(pa.table(rows), sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def _masses(store: Store) -> list[tuple[float, float, float]]:
    targets = [store[number].targets[:POSITIONS] for number in range(min(SAMPLES, len(store)))]
    found = []
    for temperature in (1.0, 2.0, 4.0):
        head = 1 - np.concatenate([one.tail_mass(temperature) for one in targets])
        found.append((temperature, float(head.mean()), float(head.min())))
    return found


def _steps(parameters: Any) -> dict[str, str]:
    steps = parameters.get("steps_per_nat")
    return {
        "step": f"1/{steps} nat",
        "half": f"1/{2 * steps}" if steps else "",
        "kind": str(parameters.get("kind", "the teacher's numbers")),
    }


def _plain(value: Any) -> str:
    """Return text that is safe in Markdown and HTML: it may come from a stranger's files."""
    return re.sub(r"[^\w .,:;/@+()=-]", "", str(value))[:120] if value else "not recorded"


def _identifier(licence: str) -> str:
    """Return a licence as the hub spells identifiers."""
    return re.sub(r"[^a-z0-9.-]+", "-", str(licence).strip().lower()).strip("-") or "other"
