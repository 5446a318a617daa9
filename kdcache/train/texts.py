"""A student whose tokenizer is not the teacher's: the store's samples in the student's own tokens.

Legend: `N` rows of the teacher, `P` positions of the student, `C` spans of a batch.

Each sample's text is spelled from the teacher's ids by the tokenizer that the store keeps, and given to the student's.
A span (see `kdcache.spans`) counts where the labels of all its teacher tokens count; the student's tokens in such spans
are the ones that its hard labels count. The text before a span is context, whatever it is: what a prompt says is read,
and not learned.
"""

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from kdcache.batch import Batch, Spans
from kdcache.errors import ConfigError, MismatchError
from kdcache.losses.spans import SPAN_LOSSES, is_span_loss, span_loss
from kdcache.spans import Aligner, Alignment, Speller
from kdcache.store import Store
from kdcache.tokenizer import kept_tokenizer, load_tokenizer, tokenizer_files
from kdcache.train.config import Schedule, TrainConfig
from kdcache.train.schedule import extremes

CACHE_BYTES = 1 << 28
"""Aligned samples that are kept, in bytes: an epoch of a small store is aligned once."""

TRIED = 64
"""Samples that are aligned before the first step, to see that the two tokenizers have spans in common at all."""

ENOUGH = 0.5
"""Share of their bytes that must lie in spans."""

_log = logging.getLogger(__name__)


class Texts:
    """A store's samples in the tokens of a student.

    The same sample gives the same tokens and spans in every epoch, process and run; nothing of it is state.

    Args:
        store: Of token ids.
        tokenizer: The student's; a transformers tokenizer.
        limit: Tokens that the student can read; what goes beyond is cut off, with one warning. None: no limit.

    Attributes:
        vocab_size: Ids of the student.
        student: Its tokenizer, and what its ids spell.
        teacher: The store's.

    Raises:
        MismatchError: The store keeps no tokenizer, or the two have hardly a span in common.
        AccessError: The store's tokenizer does not load.
    """

    def __init__(self, store: Store, tokenizer: Any, *, limit: int | None = None) -> None:
        files = store.tokenizer_files()
        if store.manifest.kind != "causal_lm" or not files:
            raise MismatchError(
                "The store keeps no tokenizer, so the text of its samples is unknown.",
                where=store.location,
                hint="Leave student.tokenizer out, or capture with a tokenizer.",
            )
        self.student, self.teacher = Speller(tokenizer), Speller(kept_tokenizer(files))
        self.vocab_size = self.student.size
        self.limit = limit
        self._store = store
        self._aligner = Aligner(self.teacher, self.student)
        self._kept: OrderedDict[int, Alignment] = OrderedDict()
        self._bytes = 0
        self._warned = False
        self._require_common()

    def files(self) -> dict[str, bytes]:
        """Return the files of the student's tokenizer."""
        return tokenizer_files(self.student.tokenizer)

    def fit(self, student: nn.Module) -> None:
        """Take over how many tokens a model says that it can read."""
        config = getattr(student, "config", None)
        text = getattr(config, "get_text_config", lambda: config)()
        self.limit = getattr(text, "max_position_embeddings", None)

    def fill(self, batch: Batch) -> Batch:
        """Return a batch in the student's tokens: its positions [P], the targets' rows [N] as they are, and the spans.

        Args:
            batch: Whole samples of the store, on the CPU.
        """
        offsets, counts = batch.offsets.tolist(), batch.mask.numpy()
        tokens, found, ends, place = [], [], [0], 0
        for number, sample in enumerate(batch.sample_index.tolist()):
            begin, end = offsets[number], offsets[number + 1]
            aligned = self._aligned(sample, [*batch.input_ids[begin:end].tolist(), int(batch.labels[end - 1])])
            own, spans = self._cut(aligned)
            before = np.concatenate([[0], np.cumsum(counts[begin:end])])
            spans = spans[(spans[:, 0] > 0) & (spans[:, 2] > 0)]  # the first token of a sample is predicted by nothing
            a, b, c, d, size = spans.T.astype(np.int64)
            counted = before[b - 1] - before[a - 1] == b - a
            # token i is predicted by row i - 1
            inside = np.stack([a + begin - 1, b + begin - 1, c + place - 1, d + place - 1, size], 1)
            found.append(inside[counted])
            tokens.append(own)
            place += len(own) - 1
            ends.append(place)
        firsts, lasts, own_firsts, own_lasts, nbytes = np.concatenate(found).T
        rows, of_rows = _runs(firsts, lasts)
        positions, of_positions = _runs(own_firsts, own_lasts)
        mask = torch.zeros(place, dtype=torch.bool)
        mask[torch.from_numpy(positions)] = True
        arrays = (rows, of_rows, positions, of_positions, firsts, own_firsts, nbytes)
        return replace(
            batch,
            input_ids=torch.from_numpy(np.concatenate([one[:-1] for one in tokens])),
            labels=torch.from_numpy(np.concatenate([one[1:] for one in tokens])),
            mask=mask,
            offsets=torch.tensor(ends),
            spans=Spans(*(torch.from_numpy(np.ascontiguousarray(one)) for one in arrays)),
        )

    def _aligned(self, sample: int, ids: Sequence[int]) -> Alignment:
        if sample not in self._kept:
            made = self._aligner.align(ids)
            self._kept[sample] = made
            self._bytes += made.tokens.nbytes + made.spans.nbytes
        self._kept.move_to_end(sample)
        while self._bytes > CACHE_BYTES and len(self._kept) > 1:
            _, old = self._kept.popitem(last=False)
            self._bytes -= old.tokens.nbytes + old.spans.nbytes
        return self._kept[sample]

    def _cut(self, aligned: Alignment) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Return tokens and spans within the student's limit; two tokens at least, as fewer predict nothing."""
        tokens, spans = aligned.tokens.astype(np.int64), aligned.spans
        if self.limit is not None and len(tokens) > self.limit:
            if not self._warned:
                _log.warning("a sample has %d student tokens; it is cut to the %d it reads", len(tokens), self.limit)
            self._warned = True
            tokens, spans = tokens[: self.limit], spans[spans[:, 3] <= self.limit]
        return np.pad(tokens, (0, max(0, 2 - len(tokens)))), spans

    def _require_common(self) -> None:
        shard = self._store.read_shard(0, ["input_ids", "labels"])
        ids, labels, spelled, common = shard.columns["input_ids"], shard.columns["labels"], 0, 0
        for begin, end in list(zip(shard.offsets, shard.offsets[1:], strict=False))[:TRIED]:
            sample = [*ids[begin:end].tolist(), int(labels[end - 1])]
            spelled += sum(len(self.teacher.of(one) or b"") for one in sample)
            common += int(self._aligner.align(sample).spans[:, 4].sum())
        if common < ENOUGH * spelled or not spelled:
            raise MismatchError(
                f"Of {spelled} bytes of the first samples, {common} lie in spans that both tokenizers spell.",
                where="student.tokenizer",
                hint="Take a tokenizer that keeps case, spaces and characters: byte-level, or with a byte fallback.",
            )


def texts_of(config: TrainConfig, store: Store, *, live: bool = False) -> Texts | None:
    """Return the samples in the student's tokens; None where the student has the teacher's tokenizer.

    Args:
        config: Of the run.
        store: That it trains from.
        live: A live teacher fills the batches.

    Raises:
        ConfigError: Settings exclude each other.
        Others as `Texts`.
    """
    name, loss = config.student.tokenizer, config.loss
    distils = extremes(loss.alpha)[1] > 0
    if name is None:
        if distils and is_span_loss(loss.divergence):
            raise ConfigError(
                f"{loss.divergence} compares two tokenisations, and the student has the teacher's.",
                where="loss.divergence",
                hint="Set student.tokenizer, or use a divergence such as forward_kl.",
            )
        return None
    if distils and not is_span_loss(loss.divergence):
        raise ConfigError(
            f"{loss.divergence} compares ids, and the student's tokenizer has others than the teacher's.",
            where="loss.divergence",
            hint=f"Use {' or '.join(SPAN_LOSSES)}, or loss.alpha=0 for hard labels alone.",
        )
    _require_sense(config, live)
    if distils:
        options = {**loss.options, **({} if loss.beta is None else {"beta": loss.beta})}
        plugin = span_loss(loss.divergence, **options)
        plain = isinstance(loss.temperature, float | Schedule)
        if not plain or (not plugin.firsts and extremes(loss.temperature) != (1.0, 1.0)):
            raise ConfigError(
                f"{loss.divergence} has {'no temperature but a number' if plugin.firsts else 'no temperature'}.",
                where="loss.temperature",
                hint="Leave it out; span_likelihood is softened by loss.options.tau.",
            )
    return Texts(store, load_tokenizer(name, revision=config.student.revision))


def _require_sense(config: TrainConfig, live: bool) -> None:
    """Refuse what needs positions, rows or ids that both sides share."""
    loss, data = config.loss, config.data
    wrong = {
        "data.teachers": bool(data.teachers),
        "loss.hidden": bool(loss.hidden),
        "loss.pairs": loss.pairs is not None,
        "loss.tail": loss.tail != "bucket",
        "loss.hard": loss.hard != "cross_entropy",
        "loss.weights": loss.weights is not None,
        "student.task": config.student.task is not None,
    }
    if found := [key for key, is_set in wrong.items() if is_set]:
        raise ConfigError(
            "A student with a tokenizer of its own shares no positions with the teacher.",
            where=found[0],
            hint=f"Leave {', '.join(found)} out, or student.tokenizer.",
        )
    if live:
        raise ConfigError(
            "The live teacher reads its own tokens, and this student has others.",
            where="student.tokenizer",
            hint="Train from the store.",
        )


def _runs(firsts: NDArray[np.int64], lasts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the numbers from each first up to its last, left out, one run after the other, and whose each is."""
    lengths = lasts - firsts
    of = np.repeat(np.arange(len(lengths)), lengths)
    return np.arange(len(of)) - np.repeat(np.cumsum(lengths) - lengths, lengths) + np.repeat(firsts, lengths), of
