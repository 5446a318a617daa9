"""Measure a student on a held-out store: what it says beside what the teacher said, with no teacher in memory.

Legend: `N` positions, `V` vocabulary.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.batch import Batch
from kdcache.errors import MismatchError
from kdcache.losses import divergence
from kdcache.losses.exact import exact_divergence
from kdcache.losses.output_layer import first_ids, log_partition, output_layer, suitable_chunk
from kdcache.losses.tails import policy
from kdcache.store import Store
from kdcache.stream import Loader, StreamConfig
from kdcache.targets.tensor import OutputHead
from kdcache.train.config import DataConfig
from kdcache.train.feed import held_out_feed
from kdcache.train.student import StudentOutput, is_fused, run_student


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Held-out measurements, averaged over positions whose label counts; nats a position.

    Attributes:
        cross_entropy: Of the student.
        kl: KL(teacher || student) at T = 1.
        kl_kind: "exact", or "a lower bound" where the tail is one outcome of several.
        top1_agreement: Share of positions where both put the same id first.
        accuracy: Share of positions where the student puts the label first.
        teacher_cross_entropy: Of the teacher, from its stored label logit and log-partition; None where it did not tell
            every label's.
        positions: That were counted.
        seconds: Of the whole pass.
        bits_per_byte: Of the student on the text, where its tokenizer is not the teacher's; else None.
        teacher_bits_per_byte: The teacher's on the same text.
    """

    cross_entropy: float
    kl: float
    kl_kind: str
    top1_agreement: float
    accuracy: float
    teacher_cross_entropy: float | None
    positions: int
    seconds: float
    bits_per_byte: float | None = None
    teacher_bits_per_byte: float | None = None

    @property
    def perplexity(self) -> float:
        """Exponential of the student's cross-entropy."""
        return math.exp(min(self.cross_entropy, 700.0))

    @property
    def teacher_perplexity(self) -> float | None:
        """Exponential of the teacher's cross-entropy."""
        return None if self.teacher_cross_entropy is None else math.exp(min(self.teacher_cross_entropy, 700.0))


@torch.no_grad()
def held_out(
    student: nn.Module,
    store: Store,
    *,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    head: OutputHead | None = None,
    chunk: int | None = None,
    data: DataConfig | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> HeldOut:
    """Return the measurements of a student on every sample of a store, in the store's order.

    Args:
        student: The model, on `device`.
        store: A held-out store of the same teacher vocabulary.
        batch_size: Samples a batch.
        device: Where the student is.
        head: The teacher's output layer: with it, and the last hidden state in the store, the KL is exact.
        chunk: Positions of the output layer at a time; default: what suits the vocabulary and the device.
        data: Names the examples of a classifier's store.
        progress: Called with samples done and all.

    Raises:
        MismatchError: The student's vocabulary is smaller than the store's.
    """
    exact = head is not None and "hidden.final" in store.columns
    feed = None if store.manifest.kind == "causal_lm" else held_out_feed(store, data or DataConfig())
    config = StreamConfig(
        batch_size=batch_size,
        shuffle=False,
        pool_shards=1,
        hidden=("final",) if exact else (),
        extra=() if feed is None else feed.extra,
    )
    fused = feed is None and is_fused(student)
    chunk = chunk or suitable_chunk(store.vocab_size, torch.device(device))
    training = student.training
    student.eval()
    sums: Tensor | None = None
    done = 0
    began = time.perf_counter()
    try:
        for read in Loader(store, config):
            batch = read if feed is None else feed.fill(read, 0)
            here = batch.to(device)
            output = run_student(student, here, (), fused=fused)
            values = _sums(here, output, store.vocab_size, head if exact else None, chunk).double().cpu()
            sums = values if sums is None else sums + values
            done += batch.num_samples
            if progress is not None:
                progress(done, len(store))
    finally:
        student.train(training)
    if sums is None or sums[-1] == 0:
        raise MismatchError("No position of the store counts.", where=str(store.path))
    ce, kl, agreement, accuracy, teacher_ce = (sums[:-1] / sums[-1]).tolist()
    return HeldOut(
        cross_entropy=ce,
        kl=kl,
        kl_kind="exact" if exact or store.k == store.vocab_size else "a lower bound",
        top1_agreement=agreement,
        accuracy=accuracy,
        teacher_cross_entropy=None if math.isnan(teacher_ce) else teacher_ce,
        positions=int(sums[-1]),
        seconds=time.perf_counter() - began,
    )


def _sums(batch: Batch, output: StudentOutput, vocab_size: int, head: OutputHead | None, chunk: int) -> Tensor:
    rows = batch.mask.nonzero()[:, 0]
    assert batch.targets is not None  # the loader was asked for them
    targets, labels = batch.targets[rows], batch.labels[rows]
    totals: list[Any] = [0.0, 0.0, 0.0, 0.0]
    kl_of = divergence("forward_kl")
    for start in range(0, len(rows), chunk):
        here = slice(start, start + chunk)
        some, label = targets[here], labels[here, None]
        ids = some.ids.long()
        if output.hidden is not None and output.head is not None:
            own = first_ids(output.head, vocab_size)
            hidden = output.hidden[rows[here]]
            kept, extra, rest = output_layer(hidden, own, ids, label, (1.0,), chunk=chunk)
            best = own.logits(hidden.to(own.weight.dtype)).argmax(1)
        else:
            assert output.logits is not None  # a student gives one or the other
            logits = output.logits[rows[here], :vocab_size].float()
            kept, extra, best = logits.gather(1, ids), logits.gather(1, label), logits.argmax(1)
            rest = logits.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)
        totals[0] += (log_partition(kept, rest[:, 0], 1.0) - extra[:, 0]).sum()
        if head is not None and output.hidden is not None and output.head is not None:
            known = batch.hidden["final"][rows[here]]
            kl = exact_divergence(
                output.hidden[rows[here]],
                output.head,
                known,
                head,
                temperature=1.0,
                divergence=kl_of,
                num_ids=vocab_size,
                chunk=chunk,
            )
        else:
            kl = kl_of(policy("bucket")(some, kept, rest[:, 0], 1.0))
        totals[1] += kl.sum()
        totals[2] += (best == ids[:, 0]).sum()
        totals[3] += (best == labels[here]).sum()
    teacher = (targets.log_partition(1.0) - targets.label_logit).sum()
    found = [*totals, teacher, float(len(rows))]
    return torch.stack([torch.as_tensor(one, dtype=torch.float32, device=rows.device) for one in found])
