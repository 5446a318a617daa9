"""The slow, obvious answers over the whole vocabulary in float64, and compact targets of the same rows."""

import torch
from torch import Tensor

from kdcache.targets.log_partition import NODES
from kdcache.targets.tensor import TensorTargets

DIVERGENCES = [("forward_kl", {}), ("reverse_kl", {}), ("jsd", {"beta": 0.5}), ("jsd", {"beta": 0.1})]
TEMPERATURES = [0.5, 1.0, 2.0, 4.0]


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) by its definition."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def dense(name: str, teacher: Tensor, student: Tensor, temperature: float, beta: float = 0.5) -> Tensor:
    """A divergence of two softmaxes over all ids, from raw logits [N, V]."""
    log_p, log_q = torch.log_softmax(teacher / temperature, -1), torch.log_softmax(student / temperature, -1)
    if name == "forward_kl":
        return kl(log_p, log_q)
    if name == "reverse_kl":
        return kl(log_q, log_p)
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
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
