"""Several teachers: their stores joined to the main one by sample id, and what each of them counts at a position.

Legend: `N` positions, `S` samples of a batch.

The combined divergence is sum_i w_i * divergence(teacher_i, student) with sum_i w_i = 1 at every position: each teacher
keeps its own head and its own tail, so nothing is lost by mixing what two heads keep. For the forward KL over all
outcomes its gradient is that of the KL from the mixture sum_i w_i * teacher_i. The weights, before they are made to sum
to 1, with probabilities at T = 1:

    fixed        the configured ones
    confidence   configured * largest probability of the teacher
    loss         configured * probability of the label = configured * exp(-cross-entropy of the teacher)
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.batch import Batch
from kdcache.errors import ConfigError, MismatchError
from kdcache.losses import FLOOR, RESPONSES, response
from kdcache.store import Shard, Store, open_store
from kdcache.store.rows import HEAD, targets_of
from kdcache.store.schema import INVALID
from kdcache.targets.tensor import TensorTargets
from kdcache.tokenizer import differences
from kdcache.train.config import DataConfig, LossConfig
from kdcache.train.schedule import extremes

CACHE_BYTES = 1 << 29
"""Decoded shards of a companion that are kept, in bytes; one is kept in any case."""

DRAWS = ("draw_ids", "draw_logits")

SAME = ("kind", "vocab_size", "alignment")
"""Members of the manifest in which all teachers' stores must agree."""


class Companions:
    """The further stores of a run, each with every sample of the main one; what they hold is read when it is needed.

    A companion may have other samples too, another order, other shards and another k. Of a classifier's store whose
    model was given other fields (another modality) the inputs cannot be compared, only ids, rows and labels.

    Args:
        store: The main one.
        data: Names the others.
        loss: Says what is read of them.

    Attributes:
        stores: The others, opened.

    Raises:
        ConfigError: The loss does not work from several teachers.
        MismatchError: Kind, vocabulary or tokenizer differ; a sample is missing, or has other tokens, rows or labels;
            a store does not hold what the loss reads.
    """

    def __init__(self, store: Store, data: DataConfig, loss: LossConfig) -> None:
        _require_sense(loss)
        self.stores = [open_store(one.store) for one in data.teachers]
        for other in self.stores:
            _require_same(store, other)
            _require_columns(other, loss)
        if loss.combine == "loss" or (loss.divergence in RESPONSES and response(loss.divergence).labels):
            for one in (store, *self.stores):
                _require_labels(one)
        names = ("loss_mask", *HEAD, *(DRAWS if loss.tail == "sampled" else ()))
        self._readers = [_Reader(other, _matched(store, other), names) for other in self.stores]

    def fill(self, batch: Batch) -> Batch:
        """Return a batch of whole samples with the other teachers' rows of them, on the CPU.

        A position counts where the label counts and every teacher's row is valid.
        """
        samples = batch.sample_index.numpy()
        found = [reader.rows(samples) for reader in self._readers]
        mask = batch.mask
        for _, valid in found:
            mask = mask & valid
        return replace(batch, mask=mask, others=tuple(targets for targets, _ in found))


def combined(
    mode: str, configured: Sequence[float], divergences: Sequence[Tensor], teachers: Sequence[TensorTargets]
) -> Tensor:
    """Return the divergence [N] from several teachers; of one teacher its own, to the bit.

    Args:
        mode: fixed, confidence or loss.
        configured: Weight of each teacher, above 0.
        divergences: From each teacher [N].
        teachers: What they said, at the same positions.

    Raises:
        MismatchError: The mode is loss, and a teacher did not tell its loss of a label.
    """
    if len(divergences) == 1:
        return divergences[0]
    return (teacher_weights(mode, configured, teachers) * torch.stack(list(divergences))).sum(0)


@torch.no_grad()
def teacher_weights(mode: str, configured: Sequence[float], teachers: Sequence[TensorTargets]) -> Tensor:
    """Return the weights [teachers, N], which sum to 1 at every position; arguments and errors as of `combined`."""
    scores = []
    for weight, targets in zip(configured, teachers, strict=True):
        score = torch.full_like(targets.label_logit, float(np.log(weight)))
        if mode == "confidence":
            score += targets.logits.amax(1) - targets.log_partition(1.0)
        elif mode == "loss":
            if bool(targets.label_logit.isnan().any()):
                raise MismatchError(
                    "A teacher did not tell its loss of every label that counts.",
                    where="loss.combine",
                    hint="Use fixed or confidence.",
                )
            # where all hold the label impossible, the configured weights are left
            score += (targets.label_logit - targets.log_partition(1.0)).clamp(min=FLOOR)
        scores.append(score)
    return torch.stack(scores).softmax(0)


class _Reader:
    """Rows of any samples of a companion, out of decoded shards of which the last used are kept."""

    def __init__(self, store: Store, there: NDArray[np.int64], names: Sequence[str]) -> None:
        self._store, self._there, self._names = store, there, names
        self._firsts = [shard.first_sample for shard in store.shards]
        self._kept: OrderedDict[int, Shard] = OrderedDict()

    def rows(self, samples: NDArray[np.int64]) -> tuple[TensorTargets, Tensor]:
        """Return the targets of the main store's samples, one after the other, and which rows are valid."""
        parts: list[dict[str, Any]] = []
        for number in self._there[samples].tolist():
            shard = self._shard(bisect_right(self._firsts, number) - 1)
            inside = number - shard.first_sample
            span = slice(int(shard.offsets[inside]), int(shard.offsets[inside + 1]))
            parts.append({name: values[span] for name, values in shard.columns.items()})
        columns = {name: np.concatenate([part[name] for part in parts]) for name in self._names}
        valid = torch.from_numpy(columns.pop("loss_mask") != INVALID)
        return TensorTargets.from_numpy(targets_of(columns, self._store.vocab_size)), valid

    def _shard(self, index: int) -> Shard:
        if index not in self._kept:
            self._kept[index] = self._store.read_shard(index, self._names)
        self._kept.move_to_end(index)
        while len(self._kept) > 1 and sum(map(_nbytes, self._kept.values())) > CACHE_BYTES:
            self._kept.popitem(last=False)
        return self._kept[index]


def _nbytes(shard: Shard) -> int:
    return sum(values.nbytes for values in shard.columns.values())


def _matched(store: Store, other: Store) -> NDArray[np.int64]:
    """Return the number in another store of every sample of the first; the same tokens, rows and labels are there."""
    ours, theirs = _samples(store), _samples(other)
    places = {name: number for number, name in enumerate(theirs["sample_id"])}
    compared = ["rows", *(["token_digest"] if _inputs(store) == _inputs(other) else [])]
    if _classes(store) and _classes(other):
        ours["labels"], theirs["labels"] = _labels(store, ours["rows"]), _labels(other, theirs["rows"])
        compared.append("labels")
    found = np.empty(len(store), dtype=np.int64)
    for number, name in enumerate(ours["sample_id"]):
        if name not in places:
            raise MismatchError(
                f"Another teacher's store has no sample {name!r}.",
                where=other.location,
                hint="Capture it from the same source, with the same tokenizer and samples.",
            )
        found[number] = places[name]
        if wrong := [key for key in compared if ours[key][number] != theirs[key][places[name]]]:
            said = {"rows": "another number of rows", "token_digest": "other inputs", "labels": "other labels"}
            raise MismatchError(
                f"The sample {name!r} has {said[wrong[0]]} in another teacher's store.",
                where=other.location,
                hint="Teachers are joined row by row: capture both from the same samples.",
            )
    return found


def _samples(store: Store) -> dict[str, list[Any]]:
    tables = [store.sample_table(index) for index in range(len(store.shards))]
    names = ("sample_id", "rows", "token_digest")
    return {name: [value for table in tables for value in table[name].to_pylist()] for name in names}


def _inputs(store: Store) -> dict[str, str] | None:
    """Return which fields a classifier was given by which names, of which its digests are; None of token ids."""
    return ((store.manifest.part("capture") or {}).get("examples") or {}).get("fields")


def _classes(store: Store) -> bool:
    """Say whether the labels of a classifier's store are classes."""
    labelled = bool((store.manifest.part("capture") or {}).get("labelled"))
    return store.manifest.kind == "classifier" and labelled and "label_values" not in store.columns


def _labels(store: Store, rows: Sequence[int]) -> list[bytes]:
    shards = (store.read_shard(index, ["labels"]) for index in range(len(store.shards)))
    labels = np.concatenate([shard.columns["labels"] for shard in shards])
    return [one.tobytes() for one in np.split(labels, np.cumsum(rows)[:-1])]


def _require_sense(loss: LossConfig) -> None:
    if loss.tail == "exact":
        raise ConfigError(
            "The tail policy exact works from one teacher's output layer.", where="loss.tail", hint="Use bucket."
        )
    values = loss.hard != "cross_entropy" or loss.divergence in ("sigmoid", "regression")
    if values and loss.combine != "fixed":
        raise ConfigError(
            f"Teachers whose outputs are values are not weighed by {loss.combine}.",
            where="loss.combine",
            hint="Use fixed.",
        )


def _require_same(store: Store, other: Store) -> None:
    for name in SAME:
        if store.manifest.part(name) != other.manifest.part(name):
            raise MismatchError(
                f"The {name} of another teacher's store is {other.manifest.part(name)}, and the main one's is "
                f"{store.manifest.part(name)}.",
                where=other.location,
                hint="Teachers of one run share vocabulary and samples.",
            )
    if lines := differences(store.manifest.part("tokenizer"), other.manifest.part("tokenizer")):
        raise MismatchError(
            f"Another teacher's tokenizer is not the main one's: {'; '.join(lines)}.", where=other.location
        )


def _require_columns(other: Store, loss: LossConfig) -> None:
    if loss.tail == "sampled" and DRAWS[0] not in other.columns:
        raise MismatchError(
            "The tail policy sampled needs tail draws, and another teacher's store has none.",
            where=other.location,
            hint="Capture with targets.draws=16, or use loss.tail=bucket.",
        )
    hot = loss.tail != "renormalise" and extremes(loss.temperature) != (1.0, 1.0)
    if hot and other.columns["tail_log_partition"].shape == (1,):
        raise MismatchError(
            "Another teacher told log-probabilities at T = 1 alone, so its tail at another T is unknown.",
            where=other.location,
            hint="Set loss.temperature=1, or loss.tail=renormalise (biased).",
        )


def _require_labels(store: Store) -> None:
    if store.manifest.kind == "classifier" and not _classes(store):
        raise MismatchError(
            "The loss looks at what each teacher says of the label, and a store was captured without classes.",
            where=store.location,
            hint="Capture it from examples with labels, or use loss.combine=fixed or confidence.",
        )
