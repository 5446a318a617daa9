"""Configs over a few prompts, and the lines that come of them."""

import json
from pathlib import Path
from typing import Any

from kdcache.config import parse_config
from kdcache.generate import GenerateConfig
from tests import tiny


def tree(folder: Path, model: Path, /, **keys: Any) -> dict[str, Any]:
    """A config over seven prompts of different lengths, every other one with a reference."""
    path = folder / "prompts.jsonl"
    rows: list[dict[str, str]] = [{"id": f"p{n}", "prompt": tiny.TEXT[n : n + 3 + 9 * (n % 4)]} for n in range(7)]
    for row in rows[::2]:
        row["completion"] = " the sea"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "source": {"path": str(path), "id_field": "id"},
        "teacher": {"model": str(model), "dtype": "float32", "device": "cpu"},
        "templates": ["{prompt}", "He wrote: {prompt}"],
        "batch_size": 5,
        "max_new_tokens": 12,
        "chunk_prompts": 3,
        **keys,
    }


def config(folder: Path, model: Path, /, **keys: Any) -> GenerateConfig:
    return parse_config(GenerateConfig, tree(folder, model, **keys))


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
