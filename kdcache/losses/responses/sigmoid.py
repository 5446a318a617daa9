"""Multi-label distillation: each output is a yes or no of its own, as in audio tagging."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from kdcache.losses import Heads, Pair, Response
from kdcache.losses.divergences.forward_kl import forward_kl
from kdcache.targets import inverse


def sigmoid(heads: Heads) -> Tensor:
    """Return the sum over all outputs of KL(Bernoulli teacher || Bernoulli student) [N] in nats.

    Both probabilities are sigmoid(logit / T). Zero at agreement; it differs from the binary cross-entropy of
    the teacher's probabilities by their entropy, so gradients are the same. Exact (K = V).

    Raises:
        MismatchError: K < V.
    """
    heads.require_whole()
    heads = heads.wide()
    b = inverse(heads.temperature)
    # yes and no of every output in one list: sums over outcomes then are sums over outputs
    log_p, log_q = (torch.cat([logsigmoid(z * b), logsigmoid(-z * b)], 1) for z in (heads.targets.logits, heads.logits))
    return forward_kl(Pair(log_p, log_q))


plugin = Response(sigmoid, tempered=True, whole=True, labels=False)
