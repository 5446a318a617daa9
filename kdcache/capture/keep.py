"""What a capture keeps: its columns and their codecs, the teacher's output layer, the ranking of ids.

Legend: `V` vocabulary, `K` kept entries.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.capture.config import CaptureConfig, HiddenConfig
from kdcache.capture.rows import out_of_memory, too_large
from kdcache.errors import ConfigError
from kdcache.samples import SampleSet
from kdcache.store import Column, HiddenSpec, Kept, OutputHead, rank_by_count, standard_columns
from kdcache.targets.measure import measure_rows
from kdcache.teachers import Teacher

RANKING_POSITIONS = 2048
"""Positions whose heads make the ranking: 20,000 give lists one byte a position shorter (docs/log.md)."""

RANKED_SHARE = 4
"""Ids are ranked where a head is at most one part in this many of the vocabulary."""


def columns_of(config: CaptureConfig, teacher: Teacher) -> tuple[Column, ...]:
    """Return the columns of a capture.

    Raises:
        ConfigError: A layer is not there or named twice, `exact` has no output layer, or a codec does not fit.
    """
    targets = config.targets
    layers = {one.layer: one for one in targets.hidden}
    if len(layers) != len(targets.hidden):
        raise ConfigError("A layer is named twice.", where="targets.hidden")
    if targets.exact:
        if teacher.output_head() is None:
            raise ConfigError(
                "exact keeps the last hidden state, and this teacher only gives logits.",
                where="targets.exact",
                hint="Set targets.k to the vocabulary size instead.",
            )
        kept = "bfloat16" if teacher.dtype == torch.bfloat16 else "float32"
        layers["final"] = HiddenConfig(layer="final", dtype=kept)  # type: ignore[arg-type]
    for one in layers.values():
        teacher.hidden_width(one.layer)
    specs = [
        HiddenSpec(one.layer, teacher.hidden_width(one.layer), one.dtype)
        for one in layers.values()
        if one.keep != "pooled"
    ]
    return standard_columns(
        k=targets.k, vocab_size=teacher.vocab_size, kept=_kept(config, teacher), draws=targets.draws, hidden=specs
    )


def output_head_of(teacher: Teacher) -> OutputHead:
    """Return the teacher's output layer as a store keeps it.

    Raises:
        ConfigError: The teacher only gives logits.
    """
    head = teacher.output_head()
    if head is None:
        raise ConfigError("This teacher only gives logits.", where="targets.exact")
    return OutputHead(
        weight=head.weight.float().cpu().numpy(),
        bias=None if head.bias is None else head.bias.float().cpu().numpy(),
        scale=head.scale,
        softcap=head.softcap,
        codec="bfloat16" if head.weight.dtype == torch.bfloat16 else "float32",
    )


@torch.inference_mode()
def ranking_of(teacher: Teacher, samples: SampleSet, k: int) -> NDArray[np.int32]:
    """Return the ids [V] by how often they stand in the heads of some samples, spread evenly over all.

    Deterministic for one teacher, device and set of samples.
    """
    step = max(1, len(samples) * int(np.mean(samples.lengths)) // RANKING_POSITIONS)
    counts = np.zeros(teacher.vocab_size, dtype=np.int64)
    seen = 0
    for number in range(0, len(samples), step):
        tokens = samples[number].tokens[: RANKING_POSITIONS + 1]
        try:
            output = teacher.forward([tokens[:-1]])
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if out_of_memory(error):
                raise too_large(samples[number]) from error
            raise
        labels = torch.from_numpy(tokens[1:]).to(output.rows.device)
        ids = measure_rows(output.rows, labels, k=k, head=output.head).numpy().ids
        counts += np.bincount(ids.reshape(-1), minlength=len(counts))
        seen += len(labels)
        if seen >= RANKING_POSITIONS:
            break
    return rank_by_count(counts)


def _kept(config: CaptureConfig, teacher: Teacher) -> Kept:
    computed_in = str(teacher.dtype).removeprefix("torch.")
    logits = config.targets.logits or {"compact": "levels", "lossless": "bits", "raw": computed_in}[config.store.preset]
    parameters: dict[str, Any] = {}
    if logits == "bits":
        parameters = {"kind": computed_in}
    if logits == "levels":
        parameters = {"steps_per_nat": config.targets.steps_per_nat}
    if config.store.preset == "raw":
        return Kept(logits, parameters, compressed=False)
    ranked = config.targets.k * RANKED_SHARE <= teacher.vocab_size
    return Kept(logits, parameters, ranked=ranked, differences=2)
