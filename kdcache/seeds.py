"""The same student trained several ways, each over several seeds, measured on one held-out store: one table.

A variant is a name and the keys in which it differs. Every run has a folder of its own, resumes, and is not done again
once it is finished; so does the comparison.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.config import parse_config
from kdcache.errors import ConfigError
from kdcache.metrics import summary
from kdcache.process import machine
from kdcache.store import Store, open_store
from kdcache.store.disk import storage_errors
from kdcache.store.schema import COUNTS
from kdcache.train import TrainProgress, train
from kdcache.train.config import TrainConfig

MEASURED = ("accuracy", "cross_entropy", "kl", "top1_agreement")
"""Of a student on the held-out store; see `kdcache.train.HeldOut`."""

BY_TEXT = "bits_per_byte"
"""Measured too where a student has a tokenizer of its own."""


@dataclass(frozen=True, slots=True)
class Row:
    """One way of training, over all seeds.

    Attributes:
        name: Of the variant.
        seeds: How many runs.
        metrics: Name to mean and standard deviation (n - 1); None of a single seed.
        parameters: Of the student.
        seconds: Of training, the mean.
        tail: What the loss does about the tail, and what that makes of its value.
    """

    name: str
    seeds: int
    metrics: dict[str, tuple[float, float | None]]
    parameters: int
    seconds: float
    tail: str


@dataclass(frozen=True, slots=True)
class Table:
    """What was compared.

    Attributes:
        teacher: Accuracy and cross-entropy of the teacher on the held-out store; None where it does not say. Where
            the students have a tokenizer of their own, of the same text: in nats a student token, and bits a byte.
        rows: One a variant, in their order.
        samples: Held out.
        positions: Held out, that count.
        store: Digest of the store that was trained from.
        held_out: Digest of the other.
        machine: Where.
    """

    teacher: dict[str, float | None]
    rows: list[Row]
    samples: int
    positions: int
    store: str
    held_out: str
    machine: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form."""
        return asdict(self)

    def markdown(self) -> str:
        """Return the table as Markdown."""
        by_text = [BY_TEXT] if BY_TEXT in self.teacher else []
        head = [
            "",
            "accuracy",
            "cross-entropy, nats",
            "KL to the teacher, nats",
            "same first choice",
            *(["bits a byte"] if by_text else []),
            "parameters",
            "s",
        ]
        lines = [head, ["---"] * len(head)]
        known = [_number(self.teacher.get(name)) for name in ("accuracy", "cross_entropy")]
        lines.append(["teacher", *known, "0", "1", *(_number(self.teacher[name]) for name in by_text), "", ""])
        for row in self.rows:
            values = [_spread(*row.metrics[name]) for name in (*MEASURED, *by_text)]
            lines.append([row.name, *values, f"{row.parameters:,}", f"{row.seconds:.0f}"])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def compare_variants(
    base: Mapping[str, Any],
    variants: Mapping[str, Mapping[str, Any]],
    store: Store | Path | str,
    out: Path | str,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    progress: Callable[[str, int, TrainProgress], None] | None = None,
) -> Table:
    """Train every variant with every seed and return their table; also written as `table.json` and `table.md`.

    Args:
        base: Tree of a training config; it must name `data.validation`.
        variants: Name to the sections and keys that replace those of the base.
        store: That all are trained from.
        out: Folder of the runs.
        seeds: Of the runs.
        progress: Called after every step with variant, seed and progress.

    Raises:
        ConfigError: A config does not fit, or there is no held-out store.
        Others as `kdcache.train.train`.
    """
    root, opened = Path(out), store if isinstance(store, Store) else open_store(store)
    configs = {
        (name, seed): parse_config(
            TrainConfig, merged(base, {**changed, "run": {**changed.get("run", {}), "seed": seed}})
        )
        for name, changed in variants.items()
        for seed in seeds
    }
    held = {one.data.validation for one in configs.values()}
    if len(held) != 1 or None in held:
        raise ConfigError("All variants are measured on one held-out store.", where="data.validation")
    if len(own := {one.student.tokenizer is not None for one in configs.values()}) != 1:
        raise ConfigError(
            "Some variants have a tokenizer of their own, and others the teacher's: their tokens do not compare.",
            where="student.tokenizer",
            hint="Give it to all of them; the teacher's own may be named too.",
        )
    names = (*MEASURED, BY_TEXT) if own.pop() else MEASURED
    validation = open_store(str(held.pop()))
    counted, teacher = teacher_on(validation)
    rows = []
    for name in variants:
        found = []
        for seed in seeds:
            told = None if progress is None else _told(progress, name, seed)
            found.append(train(configs[name, seed], opened, root / folder_of(name) / str(seed), progress=told))
        if len(names) > len(MEASURED):
            # of the same text, in tokens of the student
            teacher = {name: _value(found[0].validation, f"teacher_{name}") for name in ("cross_entropy", BY_TEXT)}
        values = {one: summary([_value(result.validation, one) for result in found]) for one in names}
        rows.append(
            Row(
                name=name,
                seeds=len(found),
                metrics={one: (value.mean, value.deviation) for one, value in values.items()},
                parameters=found[0].student_parameters,
                seconds=round(float(np.mean([one.seconds for one in found])), 1),
                tail=found[0].tail,
            )
        )
    table = Table(teacher, rows, len(validation), counted, opened.digest, validation.digest, machine())
    with storage_errors(root):
        (root / "table.json").write_text(json.dumps(table.as_dict(), indent=2) + "\n")
        (root / "table.md").write_text(table.markdown())
    return table


def teacher_on(store: Store) -> tuple[int, dict[str, float | None]]:
    """Return how many positions of a store count, and the teacher's accuracy and cross-entropy over them.

    Of several views of an example the first counts, as in measuring a student.
    """
    right = wrong = 0
    loss = 0.0
    views = (((store.manifest.part("capture") or {}).get("examples") or {}).get("augment") or {}).get("views", 1)
    for index in range(len(store.shards)):
        shard = store.read_shard(
            index, ["labels", "loss_mask", "head_ids", "head_logits", "tail_log_partition", "label_logit"]
        )
        targets = shard.targets()
        assert targets is not None  # their columns were asked for
        kept = np.concatenate(
            [np.arange(a, a + (b - a) // views) for a, b in zip(shard.offsets[:-1], shard.offsets[1:], strict=True)]
        )
        counted = kept[shard.columns["loss_mask"][kept] == COUNTS]
        right += int((targets.ids[counted, 0] == shard.columns["labels"][counted]).sum())
        wrong += len(counted)
        loss -= float(targets.label_log_probability(1.0)[counted].sum())
    mean = loss / max(1, wrong)
    return wrong, {"accuracy": right / max(1, wrong), "cross_entropy": None if np.isnan(mean) else mean}


def merged(base: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tree with the keys of another in place of its own; groups are joined, all else is replaced."""
    tree = dict(base)
    for key, value in changed.items():
        own = tree.get(key)
        tree[key] = merged(own, value) if isinstance(own, Mapping) and isinstance(value, Mapping) else value
    return tree


def folder_of(name: str) -> str:
    """Return a variant's folder: its name in letters, digits and dashes."""
    return "".join(one if one.isalnum() else "-" for one in name.lower())


def _told(progress: Callable[[str, int, TrainProgress], None], name: str, seed: int) -> Callable[[TrainProgress], None]:
    return lambda step: progress(name, seed, step)


def _value(validation: Any, name: str) -> float:
    return float(validation[name])


def _spread(mean: float, deviation: float | None) -> str:
    return f"{mean:.4f}" if deviation is None else f"{mean:.4f} ± {deviation:.4f}"


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.4f}"
