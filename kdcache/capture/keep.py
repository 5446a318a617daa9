"""What a capture keeps: its columns and their codecs, the teacher's output layer."""

from typing import Any

import torch

from kdcache.capture.config import CaptureConfig, HiddenConfig
from kdcache.errors import ConfigError
from kdcache.samples import longest
from kdcache.store import Column, HiddenSpec, Kept, OutputHead, standard_columns
from kdcache.taps import MAP
from kdcache.teachers import Teacher

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
    widths = {one.layer: feature_width(config, teacher, one.layer) for one in layers.values()}
    specs = [HiddenSpec(one.layer, widths[one.layer], one.dtype) for one in layers.values() if one.keep != "pooled"]
    return standard_columns(
        k=targets.k, vocab_size=teacher.vocab_size, kept=_kept(config, teacher), draws=targets.draws, hidden=specs
    )


def feature_width(config: CaptureConfig, teacher: Teacher, layer: str) -> int:
    """Return the width of a layer's features: of attention maps, the most positions that a sample of the capture has.

    Raises:
        ConfigError: The teacher has no such layer.
    """
    width = teacher.hidden_width(layer)
    return longest(config.samples, teacher.max_length) - 1 if layer.startswith(MAP) else width


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
