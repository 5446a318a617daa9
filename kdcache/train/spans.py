"""Terms of a student with a tokenizer of its own, and how it is measured: by the text, as tokens do not compare.

Legend: `P` counted positions of the student, `R` rows of the teacher in spans, `C` spans, `K` kept entries.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.batch import Batch, Spans
from kdcache.errors import MismatchError
from kdcache.losses.cross_entropy import cross_entropy
from kdcache.losses.output_layer import first_ids, suitable_chunk
from kdcache.losses.spans import Firsts, Sides, SpanLoss, span_loss
from kdcache.store import Store
from kdcache.stream import Loader, StreamConfig
from kdcache.targets import inverse
from kdcache.targets.tensor import TensorTargets
from kdcache.train.student import StudentOutput, is_fused, run_student
from kdcache.train.texts import Texts
from kdcache.train.validate import HeldOut

Sparse = Callable[[Tensor, Tensor, Tensor, tuple[float, ...]], tuple[tuple[Tensor, Tensor, Tensor], Tensor]]
"""From positions, head ids, extra ids and inverse temperatures to the student's sparse logits and cross-entropy."""


def span_terms(
    loss: SpanLoss, batch: Batch, output: StudentOutput, sparse: Sparse, temperature: float, *, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return the divergence [C] of the spans and the cross-entropy [P] of the student's tokens.

    Training divides the sum of both by the student's counted positions: they are then sums over the same text, and
    alpha weighs like with like.

    Args:
        loss: Between the two sides.
        batch: In the student's tokens, with the teacher's targets.
        output: The student's.
        sparse: Gives its logits of some ids.
        temperature: T, of losses that see distributions.
        size: The student's vocabulary, and positions of its output layer at a time.

    Raises:
        MismatchError: The teacher did not tell every label's probability.
    """
    spans, targets = batch.spans, batch.targets
    assert spans is not None  # training has put the batch in the student's tokens
    assert targets is not None  # it has asked for them
    labels = batch.labels[spans.positions][:, None]
    _, ce = sparse(spans.positions, labels, labels, (1.0,))
    firsts = None
    if loss.firsts:
        here = spans.first_positions
        best = _best(output, here, targets.k, *size)
        (logits, _, rest), _ = sparse(here, best, best[:, :1], (inverse(temperature), 1.0))
        # narrow products of another shape may differ in the last bit, and so in their order
        ranked = logits.sort(1, descending=True).values
        firsts = Firsts(targets[spans.first_rows], ranked, rest[:, 0], temperature)
    return loss.loss(Sides(_told(spans, targets), _over_spans(-ce, spans.of_positions, spans), firsts)), ce


@torch.no_grad()
def held_out_by_text(
    student: nn.Module,
    store: Store,
    *,
    tokenizer: Any,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    chunk: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> HeldOut:
    """Return the measurements of a student with a tokenizer of its own, over the spans that count.

    Its `cross_entropy` and the teacher's are nats of the same text over the same number, that of the student's
    positions: they compare with each other, and with no other tokenizer's. `bits_per_byte` compare with all. `kl` is
    that of each span's two outcomes, its text or any other, in nats a span. `top1_agreement` is the share of spans
    where what both put first is the same as far as the shorter goes.

    Args:
        student: The model, on `device`.
        store: A held-out store of any teacher with a tokenizer.
        tokenizer: The student's.
        batch_size: Samples a batch.
        device: Where the student is.
        chunk: Positions of the output layer at a time; default: what suits the vocabulary and the device.
        progress: Called with samples done and all.

    Raises:
        MismatchError: No span counts, or the teacher did not tell every label's probability.
    """
    texts = Texts(store, tokenizer)
    texts.fit(student)
    chunk = chunk or suitable_chunk(texts.vocab_size, torch.device(device))
    fused, training, began, done = is_fused(student), student.training, time.perf_counter(), 0
    sums = torch.zeros(8, dtype=torch.float64)
    student.eval()
    try:
        for read in Loader(store, StreamConfig(batch_size=batch_size, shuffle=False, pool_shards=1)):
            batch = texts.fill(read).to(device)
            sums += _sums(batch, run_student(student, batch, (), fused=fused), texts, chunk)
            done += batch.num_samples
            if progress is not None:
                progress(done, len(store))
    finally:
        student.train(training)
    ours, theirs, kl, agreed, right, spans, positions, nbytes = sums[:8].tolist()
    if not nbytes:
        raise MismatchError("No span of the store counts.", where=store.location)
    return HeldOut(
        cross_entropy=ours / positions,
        kl=kl / spans,
        kl_kind="of each span's text against any other",
        top1_agreement=agreed / spans,
        accuracy=right / positions,
        teacher_cross_entropy=theirs / positions,
        positions=int(positions),
        seconds=time.perf_counter() - began,
        bits_per_byte=ours / nbytes / math.log(2),
        teacher_bits_per_byte=theirs / nbytes / math.log(2),
    )


def _sums(batch: Batch, output: StudentOutput, texts: Texts, chunk: int) -> Tensor:
    """Return sums, float64 [8]: nats of both sides, KL, agreements, right choices, spans, positions, bytes."""
    spans, targets = batch.spans, batch.targets
    assert spans is not None  # they are in the student's tokens
    assert targets is not None  # the loader was asked for them
    ce, best = [], []
    for here in torch.split(spans.positions, chunk):
        logits = _logits(output, here, texts.vocab_size)
        label = batch.labels[here][:, None]
        ce.append(cross_entropy(logits.gather(1, label)[:, 0], logits.logsumexp(1)))
        best.append(logits.argmax(1))
    if not ce:
        return torch.zeros(8, dtype=torch.float64)
    nats, first = torch.cat(ce), torch.cat(best)
    told = _told(spans, targets)
    # of two outcomes the loss at tau = 1 is the divergence itself
    kl = span_loss("span_likelihood", tau=1.0).loss(Sides(told, _over_spans(-nats, spans.of_positions, spans)))
    begins = torch.searchsorted(spans.of_positions, torch.arange(len(spans), device=nats.device))
    pairs = zip(first[begins].tolist(), targets.ids[spans.first_rows, 0].tolist(), strict=True)
    agreed = sum(_alike(texts.student.of(one), texts.teacher.of(other)) for one, other in pairs)
    right = (first == batch.labels[spans.positions]).sum()
    found: list[Any] = [nats.sum(), -told.sum(), kl.sum(), agreed, right, len(spans), len(nats), spans.nbytes.sum()]
    return torch.tensor([float(one) for one in found], dtype=torch.float64)


def _alike(one: bytes | None, other: bytes | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.startswith(other) or other.startswith(one)


def _told(spans: Spans, targets: TensorTargets) -> Tensor:
    """Return the teacher's log-probability [C] of each span's text."""
    rows = targets[spans.rows]
    told = rows.label_logit - rows.log_partition(1.0)
    if bool(told.isnan().any()):
        raise MismatchError(
            "The teacher did not tell the probability of every label that counts.",
            where="loss.divergence",
            hint="Capture from a teacher whose logits are known, or use loss.alpha=0.",
        )
    return _over_spans(told, spans.of_rows, spans)


def _over_spans(values: Tensor, of: Tensor, spans: Spans) -> Tensor:
    """Return the sum over each span [C] of what its tokens have."""
    return values.new_zeros(len(spans)).index_add(0, of, values)


@torch.no_grad()
def _best(output: StudentOutput, positions: Tensor, k: int, vocab_size: int, chunk: int) -> Tensor:
    """Return the student's likeliest ids [C, min(K, vocabulary)], the likeliest first."""
    some = torch.split(positions, chunk)
    return torch.cat([_logits(output, here, vocab_size).topk(min(k, vocab_size), 1).indices for here in some])


def _logits(output: StudentOutput, positions: Tensor, vocab_size: int) -> Tensor:
    if output.hidden is not None and output.head is not None:
        head, hidden = first_ids(output.head, vocab_size), output.hidden[positions]
        return head.logits(hidden.to(head.weight.dtype)).float()
    assert output.logits is not None  # a student gives one or the other
    return output.logits[positions, :vocab_size].float()
