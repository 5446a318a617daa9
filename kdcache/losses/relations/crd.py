"""Contrastive representation distillation: a student's sample finds its teacher's among many others.

Legend: `S` samples of a batch, `D` common width, `M` samples taken from the store.
"""

import torch
from torch import Tensor

from kdcache.errors import ConfigError
from kdcache.losses.relations import gram, matched, unit


def crd(student: Tensor, teacher: Tensor, *, temperature: float = 0.07, negatives: Tensor | None = None) -> Tensor:
    """Return the mean over samples of the contrastive loss in nats, a scalar; its InfoNCE form.

        loss_i = -log( exp(s_i . t_i / T) / (sum over j of exp(s_i . t_j / T) + sum over m of exp(s_i . n_m / T)) )

    with all vectors at length one: a cross-entropy over 1 + (S - 1) + M candidates, from the student to the
    teacher. log(S + M) minus it is a lower bound of the mutual information, as in the paper. The paper's own
    form judges every pair by itself, with h = e / (e + N / |data|), where e is exp(s . t / T) over a constant
    estimated while training and N counts the negatives; this one needs no state.

    Not 0 at agreement, unless there is nothing to tell a sample from. In float32 at least; deterministic. A
    sample that is zero has no gradient. Source: Contrastive Representation Distillation, Tian et al., 2020,
    section 3.1; InfoNCE: Representation Learning with Contrastive Predictive Coding, van den Oord et al., 2018,
    equation 4.

    Args:
        student: [S, D], projected to the common width.
        teacher: [S, D], of different samples: the same sample twice would be told to differ from itself.
        temperature: T, of the similarities; it has nothing to do with that of logits.
        negatives: [M, D], the teacher's features of samples outside the batch, projected as `teacher` is.

    Raises:
        ConfigError: The temperature is not positive.
        ValueError: The sides are not of the same samples, or the widths differ.
    """
    if not temperature > 0:
        raise ConfigError(f"The temperature of crd is positive, unlike {temperature}.", hint="Its default is 0.07.")
    student, teacher = matched(student, teacher)
    others = teacher[:0] if negatives is None else negatives.to(teacher.dtype)
    if not student.shape[1:] == teacher.shape[1:] == others.shape[1:]:
        widths = [tuple(side.shape[1:]) for side in (student, teacher, others)]
        raise ValueError(f"the widths {widths} do not match: project both sides to one width")
    logits = gram(unit(student), unit(torch.cat([teacher, others]))) / temperature
    return (logits.logsumexp(1) - logits.diagonal()).mean()


plugin = crd
