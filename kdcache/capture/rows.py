"""One shard's rows from the teacher: batches under a budget, shrunk on out-of-memory, put back in order.

Legend: `N` positions of the shard, `K` kept, `M` draws, `D` hidden width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.capture.config import CaptureConfig
from kdcache.capture.flight import Flight
from kdcache.capture.keep import feature_width
from kdcache.errors import ConfigError, TeacherMemoryError, TeacherNumericsError
from kdcache.samples import SampleSet, SampleTokens
from kdcache.store.schema import COUNTS, INVALID, MASKED
from kdcache.taps import MAP
from kdcache.targets.measure import measure, measure_rows
from kdcache.targets.tensor import TensorTargets
from kdcache.teachers import Teacher, TeacherOutput, upload

Array = NDArray[Any]


@dataclass(slots=True)
class ShardRows:
    """Decoded values of every column of one shard, filled batch by batch.

    Attributes:
        columns: Column name to values [N, ...].
        pooled: Sample-table column to values [S, D].
        retries: Batches that were halved for want of memory.
    """

    columns: dict[str, Array]
    pooled: dict[str, Array] = field(default_factory=dict)
    retries: int = 0


@dataclass(frozen=True, slots=True)
class _Batch:
    """Some samples of the shard, by their numbers in it, and what the teacher said about them."""

    numbers: Array
    samples: Sequence[SampleTokens]
    flight: Flight


class RowMaker:
    """Runs the teacher over the samples of a shard.

    Args:
        config: The capture.
        teacher: The frozen model.
        samples: All samples.
    """

    def __init__(self, config: CaptureConfig, teacher: Teacher, samples: SampleSet) -> None:
        self._config = config
        self._teacher = teacher
        self._samples = samples
        self._layers = [one.layer for one in config.targets.hidden]
        if config.targets.exact and "final" not in self._layers:
            self._layers.append("final")
        self._widths = {one: feature_width(config, teacher, one) for one in self._layers if one.startswith(MAP)}
        self._budget = config.teacher.batch_positions
        if config.targets.fused:
            _require_compiler()

    def shard(self, first: int, count: int, done: Callable[[int], None]) -> ShardRows:
        """Return the rows of samples first to first + count.

        Batches are a pure function of the samples' lengths and the budget, so a resumed capture repeats them.

        Args:
            first: Number of the first sample.
            count: Samples of the shard.
            done: Called with the positions of every finished batch.

        Raises:
            TeacherNumericsError: A row has NaN or infinite logits and the config says error.
            TeacherMemoryError: One sample alone does not fit.
        """
        rows = self._samples.lengths[first : first + count] - 1
        starts = np.concatenate([[0], np.cumsum(rows)])
        made = ShardRows({})
        flying: _Batch | None = None
        for batch in self._batches(rows):
            for one in self._launched(made, first, batch):
                # the device has this batch before the one before it is waited for
                if flying is not None:
                    done(self._land(made, flying, starts))
                flying = one
        if flying is not None:
            done(self._land(made, flying, starts))
        return made

    def identities(self, first: int, count: int) -> tuple[list[str], Array]:
        """Return ids and positions of samples first to first + count."""
        names = [self._samples[number].id for number in range(first, first + count)]
        return names, self._samples.lengths[first : first + count] - 1

    def _batches(self, rows: Array) -> Iterator[Array]:
        order = np.argsort(-rows, kind="stable")
        start = 0
        while start < len(order):
            size = max(1, self._budget // int(rows[order[start]]))
            yield order[start : start + size]
            start += size

    def _launched(self, made: ShardRows, first: int, batch: Array) -> Iterator["_Batch"]:
        """Yield a batch once it is on the device; in halves, and halves of them, where memory does not allow more."""
        samples = [self._samples[first + int(number)] for number in batch]
        try:
            flight = self._measured(samples, first + batch)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            if len(batch) == 1:
                raise too_large(samples[0]) from error
        else:
            yield _Batch(batch, samples, flight)
            return
        made.retries += 1
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        half = len(batch) // 2
        yield from self._launched(made, first, batch[:half])
        yield from self._launched(made, first, batch[half:])

    def _measured(self, samples: Sequence[SampleTokens], numbers: Array) -> Flight:
        config = self._config.targets
        labels = np.concatenate([sample.tokens[1:] for sample in samples])
        output = self._teacher.forward([sample.tokens[:-1] for sample in samples], self._layers)
        if config.k > self._teacher.vocab_size:
            raise ConfigError(
                f"k = {config.k} is over the vocabulary of {self._teacher.vocab_size}.", where="targets.k"
            )
        with torch.inference_mode():
            targets = measure_rows(
                output.rows,
                upload(torch.from_numpy(labels), output.rows.device),
                k=config.k,
                head=output.head,
                uniforms=self._uniforms(samples, numbers, output),
                fused=config.fused,
            )
            return Flight.of(targets, {layer: output.hidden[layer] for layer in self._layers})

    def _land(self, made: ShardRows, batch: "_Batch", starts: Array) -> int:
        """Put a batch's rows where they belong in the shard; return how many they are."""
        batch.flight.wait()
        with torch.inference_mode():
            columns, pooled = self._columns(batch.samples, batch.flight)
        places = np.concatenate([np.arange(starts[number], starts[number + 1]) for number in batch.numbers])
        for name, values in columns.items():
            if name not in made.columns:
                made.columns[name] = np.zeros((int(starts[-1]), *values.shape[1:]), dtype=values.dtype)
            made.columns[name][places] = values
        for name, values in pooled.items():
            if name not in made.pooled:
                made.pooled[name] = np.zeros((len(starts) - 1, *values.shape[1:]), dtype=np.float32)
            made.pooled[name][batch.numbers] = values
        return len(places)

    def _columns(self, samples: Sequence[SampleTokens], flight: Flight) -> tuple[dict[str, Array], dict[str, Array]]:
        mask = np.where(np.concatenate([sample.loss_mask for sample in samples]), COUNTS, MASKED).astype(np.int32)
        targets, mask = self._checked(flight.targets, mask, samples)
        compact = targets.numpy()
        columns: dict[str, Array] = {
            "input_ids": np.concatenate([sample.tokens[:-1] for sample in samples]).astype(np.int32),
            "labels": np.concatenate([sample.tokens[1:] for sample in samples]).astype(np.int32),
            "loss_mask": mask,
            "head_ids": compact.ids,
            "head_logits": compact.logits,
            "tail_log_partition": compact.tail,
            "label_logit": compact.label_logit,
        }
        if compact.draw_ids is not None and compact.draw_logits is not None:
            columns |= {"draw_ids": compact.draw_ids, "draw_logits": compact.draw_logits}
        return self._features(columns, flight, mask, samples)

    def _features(
        self, columns: dict[str, Array], flight: Flight, mask: Array, samples: Sequence[SampleTokens]
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        pooled = {}
        wanted = {one.layer: one.keep for one in self._config.targets.hidden}
        if self._config.targets.exact:
            wanted["final"] = "all"
        for layer, keep in wanted.items():
            values = flight.hidden[layer].float().numpy()
            if layer.startswith(MAP):  # as long as the batch's longest sample, and kept as long as any may be
                values = np.pad(values, ((0, 0), (0, self._widths[layer] - values.shape[1])))
            values = np.where((mask == INVALID)[:, None], np.float32(0), values)
            if keep == "pooled":
                ends = np.cumsum([len(sample.loss_mask) for sample in samples])[:-1]
                pairs = zip(np.split(values, ends), np.split(mask == COUNTS, ends), strict=True)
                pooled[f"hidden.{layer}"] = np.stack([_mean(rows, counts) for rows, counts in pairs])
                continue
            columns[f"hidden.{layer}"] = values * (mask == COUNTS)[:, None] if keep == "masked" else values
        return columns, pooled

    def _uniforms(
        self, samples: Sequence[SampleTokens], numbers: Array, output: TeacherOutput
    ) -> "torch.Tensor | None":
        draws = self._config.targets.draws
        if not draws:
            return None
        # keyed by sample, not by batch: batching, resuming and several writers draw the same ids
        parts = [
            np.random.Generator(np.random.Philox(key=[self._config.seed, int(number)])).random(
                (len(sample.loss_mask), draws)
            )
            for sample, number in zip(samples, numbers, strict=True)
        ]
        return upload(torch.from_numpy(np.concatenate(parts)), output.rows.device)

    def _checked(
        self, targets: TensorTargets, mask: Array, samples: Sequence[SampleTokens]
    ) -> tuple[TensorTargets, Array]:
        bad = ~(torch.isfinite(targets.logits).all(1) & torch.isfinite(targets.label_logit))
        if not bool(bad.any()):
            return targets, mask
        row = int(bad.nonzero()[0])
        if self._config.targets.on_invalid == "error":
            for sample in samples:
                if row < len(sample.loss_mask):
                    break
                row -= len(sample.loss_mask)
            raise TeacherNumericsError(
                "The teacher's logits are NaN or infinite.",
                where=f"sample {sample.id}, row {row}",
                hint="Try teacher.dtype=float32 or bfloat16, or set targets.on_invalid=skip to mask such positions.",
            )
        count, k = int(bad.sum()), targets.k
        targets.ids[bad] = torch.arange(k, device=bad.device).expand(count, k)
        for values in (targets.logits, targets.tail, targets.label_logit, targets.draw_ids, targets.draw_logits):
            if values is not None:
                values[bad] = 0
        return targets, np.where(bad.cpu().numpy(), INVALID, mask).astype(np.int32)


def _mean(rows: Array, counts: Array) -> Array:
    kept = rows[counts] if counts.any() else rows
    mean: Array = kept.mean(axis=0)
    return mean


def _require_compiler() -> None:
    try:
        measure(torch.zeros(2, 64), torch.zeros(2, dtype=torch.int64), k=1, fused=True)
    except RuntimeError as error:
        raise ConfigError(
            f"torch.compile does not work here: {str(error).strip().splitlines()[0]}.",
            where="targets.fused",
            hint="Install a C++ compiler, or set targets.fused=false.",
        ) from error


def too_large(sample: SampleTokens) -> TeacherMemoryError:
    """Return the error for a sample that does not fit alone."""
    return TeacherMemoryError(
        f"The teacher runs out of memory on one sample of {len(sample.tokens)} tokens.",
        where=sample.id,
        hint="Lower samples.max_length, or use a smaller dtype or a larger device.",
    )


def out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that memory, of the device or of the host, ran out."""
    text = str(error).lower()
    return (
        isinstance(error, torch.OutOfMemoryError | MemoryError)
        or "out of memory" in text
        or "can't allocate memory" in text
    )
