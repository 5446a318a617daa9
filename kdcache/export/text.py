"""What a language model is tried on: random ids for what is written, and a held-out store for its quality.

Legend: `S` samples, `T` tokens.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdcache.errors import UnsupportedError
from kdcache.export.result import Quality
from kdcache.export.trial import Answering, Done, Inputs, Run, Trial
from kdcache.train import HeldOut

NAMES = ("input_ids", "attention_mask")

AXES = {0: "batch", 1: "sequence"}

TRACED = (2, 16)

COMPARED = ((1, 1), (1, 7), (2, 16), (3, 33))
"""A single token, odd sizes, and batches with padding: what a graph with a shape baked into it fails on."""

TIMED = ((1, 32), (8, 128))

LENGTHS = (128, 64, 32, 16, 8, 4, 2)
"""Tokens that a student made by a factory is tried with, to learn how long its inputs may be."""


Measure = Callable[..., HeldOut]
"""From a student, and `progress` called with samples done and all, to what it is worth on a held-out store."""

SCORES = ("cross_entropy", "perplexity", "kl", "top1_agreement", "accuracy", "bits_per_byte")


def text_trial(model: nn.Module, vocab_size: int, measure: Measure | None) -> Trial:
    """Return what a causal language model is tried on.

    Args:
        model: The student, on the CPU.
        vocab_size: Ids that may be put in.
        measure: Its quality; None without a store.

    Raises:
        UnsupportedError: It takes no input of 2 to 128 tokens.
    """
    longest = _longest(model)

    def some(samples: int, tokens: int, seed: int = 0) -> Inputs:
        return random_inputs(samples, min(tokens, longest), vocab_size, seed)

    full = [some(*shape) for shape in TIMED]

    def quality(run: Run, done: Done) -> Quality:
        assert measure is not None  # without it there is no quality
        student = Answering(run, NAMES, getattr(model, "config", None))
        found = measure(student, progress=lambda samples, _all: done(samples))
        scores = {name: getattr(found, name) for name in SCORES}
        return Quality(found.positions, {name: value for name, value in scores.items() if value is not None})

    return Trial(
        call=_call,
        traced=some(*TRACED),
        axes=dict.fromkeys(NAMES, AXES),
        compared=tuple(some(*shape, number) for number, shape in enumerate(COMPARED)),
        timed=tuple({**one, "attention_mask": np.ones_like(one["attention_mask"])} for one in full),
        quality=None if measure is None else quality,
    )


def random_inputs(samples: int, tokens: int, vocab_size: int, seed: int) -> Inputs:
    """Return random ids and a right-padded mask, both int64 [S, T]; the first sample fills its row."""
    random = np.random.default_rng(seed)
    ids = random.integers(0, vocab_size, (samples, tokens))
    lengths = random.integers(1, tokens + 1, samples)
    lengths[0] = tokens
    return dict(zip(NAMES, (ids, (np.arange(tokens) < lengths[:, None]).astype(np.int64)), strict=True))


def _call(model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    if hasattr(model, "save_pretrained"):
        # its cache would be further outputs
        return model(**inputs, use_cache=False)
    return model(*inputs.values())


def _longest(model: Any) -> int:
    """Return the tokens of the longest input, at most 128 of a student made by a factory."""
    if hasattr(model, "save_pretrained"):
        return int(getattr(model.config.get_text_config(), "max_position_embeddings", LENGTHS[0]))
    for length in LENGTHS:
        ids = torch.zeros((1, length), dtype=torch.int64)
        try:
            with torch.inference_mode():
                model(ids, torch.ones_like(ids))
        except (IndexError, RuntimeError):
            continue
        return length
    raise UnsupportedError("The student takes no input of 2 to 128 tokens.", where="student.factory")
