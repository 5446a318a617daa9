"""Measure a teacher's rows: head, tail log-partition, label logit and tail draws, on the teacher's device.

Legend: `N` positions, `n` positions of a tile, `D` width, `K` kept, `M` draws, `J` nodes, `V` vocabulary.

Only tiles of `[n, V]` exist at a time. The eight powers exp(b (z - z_K)) of the nodes come from one
exponential: every node is a sum of earlier ones, so each further power is one product.
"""

import torch
from torch import Tensor

from kdcache.targets.log_partition import LIMIT
from kdcache.targets.tensor import OutputHead, TensorTargets

PRODUCT_ELEMENTS = 1 << 24
"""Logits of one matrix product with the output head: large enough to use the weight well."""

TILE_ELEMENTS = {"cpu": 1 << 20, "other": 1 << 27}
"""Float32 logits measured at a time: about a core's cache on the CPU, half a gigabyte on an accelerator."""


def measure(logits: Tensor, labels: Tensor, *, k: int, uniforms: Tensor | None = None) -> TensorTargets:
    """Return the compact targets of one tile of logits.

    Deterministic. Rows whose logits hold NaN or plus infinity have a non-finite `logits[:, 0]`; the caller
    decides what becomes of them. Minus infinity (a masked id) is allowed outside the head.

    Args:
        logits: [n, V] of any float dtype, raw.
        labels: int64 [n]; ids below 0 mean "no label" and give the logit of id 0.
        k: Entries to keep, 1 <= K <= V.
        uniforms: float64 [n, M] in [0, 1), one per tail draw; None for no draws.
    """
    z = logits.float()
    ids, head = _head(z, k)
    label_logit = z.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    size = z.shape[1]
    if k == size:
        tail = head.new_full((len(z), 8), -torch.inf)
        empty = None if uniforms is None else torch.zeros_like(uniforms, dtype=torch.int64)
        return TensorTargets(ids, head, tail, label_logit, size, empty, None if empty is None else z.gather(1, empty))
    powers = _Powers(z, head[:, -1:], ids)
    if uniforms is None:
        return TensorTargets(ids, head, powers.tail, label_logit, size)
    draw_ids = powers.draw(uniforms)
    return TensorTargets(ids, head, powers.tail, label_logit, size, draw_ids, z.gather(1, draw_ids))


def measure_rows(
    rows: Tensor,
    labels: Tensor,
    *,
    k: int,
    head: OutputHead | None = None,
    uniforms: Tensor | None = None,
) -> TensorTargets:
    """Return the compact targets of N positions, tile by tile, from hidden states or from logits.

    Args:
        rows: Last hidden states [N, D] when `head` is given, else logits [N, V].
        labels: int64 [N].
        k: Entries to keep.
        head: The teacher's output head; its product with a tile runs in the hidden states' dtype.
        uniforms: float64 [N, M] in [0, 1) for M tail draws a position, or None.
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
                )
            )
    return TensorTargets.concatenate(parts)


def _head(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    # topk leaves the order of equal logits open, and low-precision teachers have many: ids break ties.
    ids = z.topk(k, dim=1).indices.sort(dim=1).values
    values, order = z.gather(1, ids).sort(dim=1, descending=True, stable=True)
    return ids.gather(1, order), values


class _Powers:
    """Tail sums of exp(b (z - z_K)) at every node, and the two terms that drawing needs."""

    def __init__(self, z: Tensor, lowest: Tensor, head_ids: Tensor) -> None:
        power = ((z - lowest) / 8).exp_().scatter_(1, head_ids, 0.0)
        sums = [power.sum(1)]  # b = 1/8
        quarter = power * power
        sums.append(quarter.sum(1))
        sums.append(power.mul_(quarter).sum(1))  # 3/8
        half = quarter * quarter
        sums.append(half.sum(1))
        sums.append(quarter.mul_(half).sum(1))  # 3/4
        one = half * half
        sums.append(one.sum(1))
        torch.mul(half, one, out=power)
        sums.append(power.sum(1))  # 3/2
        torch.mul(one, one, out=power)
        sums.append(power.sum(1))  # 2
        self.tail = torch.stack(sums, dim=1).log_().clamp_(-LIMIT, LIMIT)
        self._terms = (one, half)

    def draw(self, uniforms: Tensor) -> Tensor:
        """Return ids [n, M] drawn from the half-half mixture of the tail at T = 1 and T = 2.

        By inverse CDF: a head id has no width, so it is never drawn. Sums run in float64.
        """
        one, half = self._terms
        # a tail too far below the head to have any float32 mass divides by 1: its draws carry no weight in a loss
        shares = [part / (total := part.sum(1, keepdim=True)).masked_fill(total == 0, 1.0) for part in (one, half)]
        mixture = shares[0] + shares[1]
        cumulative = mixture.double().cumsum(1)
        marks = uniforms.to(cumulative) * cumulative[:, -1:]
        ids = torch.searchsorted(cumulative, marks, right=True)
        # rounding may put a mark past the last id that has mass: the first id that reaches the total has it
        last = (cumulative >= cumulative[:, -1:]).to(torch.uint8).argmax(1)
        return ids.minimum(last[:, None])
