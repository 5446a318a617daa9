"""The slow, obvious answers over the whole vocabulary in float64, and compact targets of the same rows."""

import torch
from torch import Tensor

from kdcache.targets.log_partition import NODES
from kdcache.targets.tensor import TensorTargets

F_DIVERGENCES = [
    ("forward_kl", {}),
    ("reverse_kl", {}),
    ("jsd", {"beta": 0.5}),
    ("jsd", {"beta": 0.1}),
    ("skew_kl", {"skew": 0.1}),
    ("skew_kl", {"skew": 0.7}),
    ("skew_reverse_kl", {"skew": 0.1}),
    ("skew_reverse_kl", {"skew": 0.7}),
    ("total_variation", {}),
]
"""Sums of one term per outcome, which merging outcomes never raises."""
DIVERGENCES = [*F_DIVERGENCES, ("adaptive_kl", {}), ("adaptive_kl", {"mu": 0.8})]
TEMPERATURES = [0.5, 1.0, 2.0, 4.0]


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) by its definition."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def share_of_the_likeliest(p: Tensor, q: Tensor, mu: float) -> Tensor:
    """What the teacher's likeliest outcomes hold of the sum of |p - q|, one row and one outcome at a time."""
    shares = []
    for p_row, q_row in zip(p.tolist(), q.tolist(), strict=True):
        order = sorted(range(len(p_row)), key=lambda i, row=p_row: -row[i])  # type: ignore[misc]
        mass, held, whole = 0.0, 0.0, 0.0
        for rank, i in enumerate(order):
            mass += p_row[i]
            gap = abs(p_row[i] - q_row[i])
            whole += gap
            held += gap if rank == 0 or mass <= mu else 0.0
        shares.append(held / whole if whole else 0.0)
    return p.new_tensor(shares)


def dense(
    name: str,
    teacher: Tensor,
    student: Tensor,
    temperature: float,
    *,
    beta: float = 0.5,
    skew: float = 0.1,
    mu: float = 0.5,
) -> Tensor:
    """A divergence of two softmaxes over all ids, from raw logits [N, V]."""
    log_p, log_q = torch.log_softmax(teacher / temperature, -1), torch.log_softmax(student / temperature, -1)
    p, q = log_p.exp(), log_q.exp()
    if name == "forward_kl":
        return kl(log_p, log_q)
    if name == "reverse_kl":
        return kl(log_q, log_p)
    if name == "total_variation":
        return (p - q).abs().sum(-1) / 2
    if name == "skew_kl":
        return kl(log_p, (skew * p + (1 - skew) * q).log())
    if name == "skew_reverse_kl":
        return kl(log_q, ((1 - skew) * p + skew * q).log())
    if name == "adaptive_kl":
        share = share_of_the_likeliest(p, q.detach(), mu)
        return share * kl(log_p, log_q) + (1 - share) * kl(log_q, log_p)
    assert name == "jsd", name
    log_m = (beta * p + (1 - beta) * q).log()
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def rows(num_rows: int, vocabulary: int, seed: int, scale: float = 2.0) -> Tensor:
    """Random logits in float64."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(num_rows, vocabulary, generator=generator, dtype=torch.float64)


def compact(teacher: Tensor, k: int, draws: int = 0, seed: int = 0) -> TensorTargets:
    """The float64 targets of dense rows: sorted, summed at every node, drawn from the mixture itself."""
    ranked, order = teacher.sort(dim=1, descending=True, stable=True)
    lowest = ranked[:, k - 1 : k]
    tail = torch.stack([torch.logsumexp(b * (ranked[:, k:] - lowest), 1) for b in NODES], 1)
    draw_ids = None
    if draws:
        z = teacher.scatter(1, order[:, :k], -torch.inf)
        mixture = torch.softmax(z, 1) + torch.softmax(z / 2, 1)
        draw_ids = torch.multinomial(mixture, draws, True, generator=torch.Generator().manual_seed(seed))
    return TensorTargets(
        ids=order[:, :k],
        logits=ranked[:, :k],
        tail=tail,
        label_logit=teacher[:, 0],
        vocab_size=teacher.shape[1],
        draw_ids=draw_ids,
        draw_logits=None if draw_ids is None else teacher.gather(1, draw_ids),
    )


def student_side(student: Tensor, targets: TensorTargets, temperature: float) -> tuple[Tensor, Tensor]:
    """The head logits [N, K] and the rest [N] of dense student rows."""
    others = student.scatter(1, targets.ids, -torch.inf)
    return student.gather(1, targets.ids), torch.logsumexp(others / temperature, 1)
