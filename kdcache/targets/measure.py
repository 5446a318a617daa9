"""Measure a teacher's rows: head, tail log-partition, label logit and tail draws, on the teacher's device.

Legend: `N` positions, `n` positions of a tile, `D` width, `K` kept, `M` draws, `J` nodes, `V` vocabulary.

Only tiles of `[n, V]` exist at a time. The eight powers exp(b (z - z_K)) of the nodes come from one
exponential: every node is a sum of earlier ones, so each further power is one product.
"""

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from kdcache.targets.log_partition import LIMIT
from kdcache.targets.tensor import OutputHead, TensorTargets

PRODUCT_ELEMENTS = 1 << 23
"""Logits of one product with the output head: enough to use the weight well, few enough for a last-level cache."""

TILE_ELEMENTS = {"cpu": 1 << 20, "other": 1 << 27}
"""Float32 logits measured at a time: about a core's cache on the CPU, half a gigabyte on an accelerator."""


def measure(
    logits: Tensor, labels: Tensor, *, k: int, uniforms: Tensor | None = None, fused: bool = False
) -> TensorTargets:
    """Return the compact targets of one tile of logits.

    Deterministic. Rows whose logits hold NaN or plus infinity have a non-finite `logits[:, 0]`; the caller
    decides what becomes of them. Minus infinity (a masked id) is allowed outside the head.

    Args:
        logits: [n, V] of any float dtype, raw.
        labels: int64 [n]; ids below 0 mean "no label" and give the logit of id 0.
        k: Entries to keep, 1 <= K <= V.
        uniforms: float64 [n, M] in [0, 1), one per tail draw; None for no draws.
        fused: Sum the tail in one compiled pass (torch.compile: C++ on a CPU, Triton on a GPU); equal up to rounding.
    """
    z = logits.float()
    ids, head = _head(z, k)
    label_logit = z.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    size = z.shape[1]
    if k == size:
        tail = head.new_full((len(z), 8), -torch.inf)
        empty = None if uniforms is None else torch.zeros_like(uniforms, dtype=torch.int64)
        return TensorTargets(ids, head, tail, label_logit, size, empty, None if empty is None else z.gather(1, empty))
    outside = z.scatter(1, ids, -torch.inf)
    sums = _compiled(_tail_sums) if fused else _tail_sums
    tail = sums(outside, head[:, -1:]).log_().clamp_(-LIMIT, LIMIT)
    if uniforms is None:
        return TensorTargets(ids, head, tail, label_logit, size)
    draw_ids = _draw(outside, head[:, -1:], uniforms)
    return TensorTargets(ids, head, tail, label_logit, size, draw_ids, z.gather(1, draw_ids))


def measure_rows(
    rows: Tensor,
    labels: Tensor,
    *,
    k: int,
    head: OutputHead | None = None,
    uniforms: Tensor | None = None,
    fused: bool = False,
) -> TensorTargets:
    """Return the compact targets of N positions, tile by tile, from hidden states or from logits.

    Args:
        rows: Last hidden states [N, D] when `head` is given, else logits [N, V].
        labels: int64 [N].
        k: Entries to keep.
        head: The teacher's output head; its product with a tile runs in the hidden states' dtype.
        uniforms: float64 [N, M] in [0, 1) for M tail draws a position, or None.
        fused: As in `measure`.
    """
    size = rows.shape[1] if head is None else head.weight.shape[0]
    elements = TILE_ELEMENTS.get(rows.device.type, TILE_ELEMENTS["other"])
    tile = max(1, elements // size)
    block = max(tile, PRODUCT_ELEMENTS // size)
    parts = []
    for start in range(0, len(rows), block):
        logits = rows[start : start + block] if head is None else head.logits(rows[start : start + block])
        for inner in range(0, len(logits), tile):
            here = slice(start + inner, min(start + inner + tile, start + len(logits)))
            parts.append(
                measure(
                    logits[inner : inner + tile],
                    labels[here],
                    k=k,
                    uniforms=None if uniforms is None else uniforms[here],
                    fused=fused,
                )
            )
    return TensorTargets.concatenate(parts)


def _head(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    # topk leaves the order of equal logits open, and low-precision teachers have many: ids break ties.
    ids = _largest(z, k).sort(dim=1).values
    values, order = z.gather(1, ids).sort(dim=1, descending=True, stable=True)
    return ids.gather(1, order), values


def _largest(z: Tensor, k: int) -> Tensor:
    """Return the ids [n, k] of the largest logits, in any order.

    They lie in the k blocks of ids whose largest logit is largest: one pass over the row finds the blocks, and
    two short searches do the rest.
    """
    rows, size = z.shape
    block = 1 << max(0, round(math.log2(size / k) / 2))  # a square root balances the two searches
    blocks = size // block
    if blocks < 4 * k:
        return z.topk(k, dim=1).indices
    whole = blocks * block
    chosen = z[:, :whole].view(rows, blocks, block).amax(2).topk(k, dim=1).indices
    ids = (chosen[:, :, None] * block + torch.arange(block, device=z.device)).view(rows, -1)
    if whole < size:
        ids = torch.cat([ids, torch.arange(whole, size, device=z.device).expand(rows, -1)], dim=1)
    return ids.gather(1, z.gather(1, ids).topk(k, dim=1).indices)


def _tail_sums(outside: Tensor, lowest: Tensor) -> Tensor:
    """Return the sums [n, J] over ids of exp(b (z - z_K)) at every node b.

    Args:
        outside: Logits [n, V], minus infinity where a head has taken an id.
        lowest: z_K [n, 1].
    """
    power = ((outside - lowest) / 8).exp_()
    sums = [power.sum(1)]  # b = 1/8
    quarter = power * power
    sums.append(quarter.sum(1))
    sums.append(power.mul_(quarter).sum(1))  # 3/8
    half = quarter * quarter
    sums.append(half.sum(1))
    sums.append(quarter.mul_(half).sum(1))  # 3/4
    one = half * half
    sums.append(one.sum(1))
    sums.append(half.mul_(one).sum(1))  # 3/2
    sums.append(one.mul_(one).sum(1))  # 2
    return torch.stack(sums, dim=1)


@cache
def _compiled(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(function, dynamic=True)


def _draw(outside: Tensor, lowest: Tensor, uniforms: Tensor) -> Tensor:
    """Return ids [n, M] drawn from the half-half mixture of the tail at T = 1 and T = 2.

    By inverse CDF: a head id has no width, so it is never drawn. Sums run in float64.
    """
    half = ((outside - lowest) / 2).exp_()
    # a tail too far below the head to have any float32 mass divides by 1: its draws carry no weight in a loss
    shares = [part / (total := part.sum(1, keepdim=True)).masked_fill(total == 0, 1.0) for part in (half * half, half)]
    cumulative = (shares[0] + shares[1]).double().cumsum(1)
    marks = uniforms.to(cumulative) * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, marks, right=True)
    # rounding may put a mark past the last id that has mass: the first id that reaches the total has it
    last = (cumulative >= cumulative[:, -1:]).to(torch.uint8).argmax(1)
    return ids.minimum(last[:, None])
