"""How far an unfinished capture is, from its plan and the receipts of its shards."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PLAN_FILE = "plan.json"
RECEIPTS = "receipts"


@dataclass(frozen=True, slots=True)
class Progress:
    """What an unfinished store has: committed shards of all, and the plan they follow."""

    committed: int
    shards: int
    plan: dict[str, Any]


def progress(root: Path) -> Progress | None:
    """Return how far the capture into a folder is; None where no capture has begun."""
    try:
        plan = json.loads((root / PLAN_FILE).read_bytes())["plan"]
        return Progress(len(committed(root)), len(plan["shards"]), plan)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def committed(root: Path) -> set[int]:
    """Return the shards that have a receipt."""
    folder = root / RECEIPTS
    if not folder.is_dir():
        return set()
    return {int(path.stem) for path in folder.iterdir() if re.fullmatch(r"\d{5,9}\.json", path.name)}


def receipt_name(shard: int) -> str:
    """Return the name of a shard's receipt."""
    return f"{RECEIPTS}/{shard:05d}.json"
