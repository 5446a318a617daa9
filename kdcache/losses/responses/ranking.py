"""Plackett-Luce ranking: the student puts the kept ids in the teacher's order, at any distance."""

import torch
from torch import Tensor

from kdcache.errors import ConfigError
from kdcache.losses import Heads, Response


def ranking(heads: Heads, top: int | None = None) -> Tensor:
    """Return -log of the student's probability of the teacher's order of the kept ids [N], in nats.

    The student draws ids one after the other without replacement from its softmax over the kept ids, raw logits
    and no temperature (Plackett-Luce). Positive, and not zero at agreement: it falls as the student parts the
    ids further in the right order. Exact where K = V; else a lower bound, because the order of a part is a
    coarser event than the order of all. Equal logits of the teacher rank by lower id. Source: Listwise Approach
    to Learning to Rank (ListMLE), Xia et al., 2008, section 4.3.

    Args:
        heads: Both sides at N positions.
        top: Count the order of the first `top` ids only, still drawn from all kept; None counts all.

    Raises:
        ConfigError: top is not positive.
    """
    if top is not None and top < 1:
        raise ConfigError(f"The top of ranking is 1 at least, not {top}.", hint="Leave it out to rank all kept ids.")
    logits = heads.wide().logits
    # targets.ids descend by the teacher's logit: what is left at rank i are the entries from i on
    left = torch.logcumsumexp(logits.flip(1), 1).flip(1)
    return (left - logits)[:, :top].sum(1)


plugin = Response(ranking, tempered=False, whole=False, labels=False)
