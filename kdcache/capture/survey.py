"""A look at a few of the teacher's rows before the capture: the ranking of ids, and the k that a byte budget buys.

Legend: `N` positions looked at, `K` kept entries, `V` vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.capture.rows import out_of_memory, too_large
from kdcache.errors import ConfigError
from kdcache.samples import SampleSet
from kdcache.store import Column, encoded_bytes, rank_by_count, ranks
from kdcache.targets import Targets
from kdcache.targets.measure import measure_rows
from kdcache.targets.tensor import TensorTargets
from kdcache.teachers import Teacher

POSITIONS = 2048
"""Positions looked at: rankings of 20,000 give lists one byte a position shorter (docs/log.md)."""

MOST = 512
"""Entries that a budget buys at most."""

MARGIN = 0.97
"""Share of a budget that is spent: the ranking fits the positions it was made of a little too well."""

SAMPLE_BYTES = 48
"""What the sample table takes a sample: its name, digest and counts."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What was seen.

    Attributes:
        targets: Of N positions.
        input_ids: int32 [N].
        labels: int32 [N].
        samples: Of which they are.
    """

    targets: Targets
    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    samples: int

    def ranking(self, k: int) -> NDArray[np.int32]:
        """Return the ids [V] by how often they stand among the k largest."""
        return rank_by_count(np.bincount(self.targets.ids[:, :k].reshape(-1), minlength=self.targets.vocab_size))


@torch.inference_mode()
def survey(teacher: Teacher, samples: SampleSet, k: int) -> Survey:
    """Return what the teacher says of some samples, spread evenly over all.

    Deterministic for one teacher, device and set of samples.

    Raises:
        TeacherMemoryError: One sample alone does not fit.
    """
    step = max(1, len(samples) * int(np.mean(samples.lengths)) // POSITIONS)
    parts, tokens = list[TensorTargets](), list[NDArray[Any]]()
    seen = 0
    for number in range(0, len(samples), step):
        one = samples[number].tokens[: POSITIONS + 1]
        try:
            output = teacher.forward([one[:-1]])
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if out_of_memory(error):
                raise too_large(samples[number]) from error
            raise
        labels = torch.from_numpy(one[1:]).to(output.rows.device)
        parts.append(measure_rows(output.rows, labels, k=k, head=output.head))
        tokens.append(one)
        seen += len(labels)
        if seen >= POSITIONS:
            break
    return Survey(
        TensorTargets.concatenate(parts).numpy(),
        np.concatenate([one[:-1] for one in tokens]).astype(np.int32),
        np.concatenate([one[1:] for one in tokens]).astype(np.int32),
        len(tokens),
    )


def entries_within(budget: float, seen: Survey, columns_of: Callable[[int], Sequence[Column]]) -> int:
    """Return the largest k whose rows, as a store keeps them, take at most so many bytes a position.

    Hidden features and tail draws are not counted: they do not depend on k.

    Args:
        budget: Bytes a position, of all columns but those.
        seen: With as many entries as may be bought.
        columns_of: The columns of a capture with k entries.

    Raises:
        ConfigError: One entry takes more.
    """
    low, high = 0, seen.targets.k
    while low < high:
        middle = (low + high + 1) // 2
        if row_bytes(seen, middle, columns_of(middle)) <= budget * MARGIN:
            low = middle
        else:
            high = middle - 1
    if low == 0:
        least = row_bytes(seen, 1, columns_of(1)) / MARGIN
        raise ConfigError(
            f"No logit fits into {budget:g} bytes a position.",
            where="targets.bytes_per_position",
            hint=f"One needs about {least:.0f} bytes with this preset.",
        )
    return low


def row_bytes(seen: Survey, k: int, columns: Sequence[Column]) -> float:
    """Return what the surveyed rows take in a store, in bytes a position, hidden features and draws not counted."""
    finite = np.isfinite(seen.targets.logits).all(1)
    targets = seen.targets.narrow(k)
    values: dict[str, NDArray[Any]] = {
        "input_ids": seen.input_ids,
        "labels": seen.labels,
        "loss_mask": np.ones(len(seen.labels), dtype=np.int32),
        "head_ids": targets.ids,
        "head_logits": targets.logits,
        "tail_log_partition": targets.tail,
        "label_logit": targets.label_logit,
    }
    counted = [column for column in columns if column.name in values]
    size = encoded_bytes(counted, {name: one[finite] for name, one in values.items()}, ranks(seen.ranking(k)))
    return size / max(1, int(finite.sum())) + SAMPLE_BYTES * seen.samples / len(seen.labels)
