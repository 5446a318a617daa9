"""Regression: the outputs themselves are the answer, as a pitch or a box is."""

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import huber_loss, l1_loss, mse_loss

from kdcache.errors import ConfigError
from kdcache.losses import Heads, Response

DISTANCES: dict[str, Callable[..., Tensor]] = {"huber": huber_loss, "l1": l1_loss, "mse": mse_loss}


def regression(heads: Heads, kind: str = "mse") -> Tensor:
    """Return the distance of raw outputs [N] averaged over all of them, in their unit or its square.

    No temperature and no shift: an output is a number that means something. Exact (K = V).

    Args:
        heads: Both sides at N positions.
        kind: mse, the squared difference; l1, the absolute one; huber, half the squared one up to 1 and linear
            beyond.

    Raises:
        ConfigError: There is no such kind.
        MismatchError: K < V.
    """
    if kind not in DISTANCES:
        raise ConfigError(
            f"There is no distance of outputs named {kind!r}.", hint=f"Choose one of: {', '.join(DISTANCES)}."
        )
    heads.require_whole()
    heads = heads.wide()
    return DISTANCES[kind](heads.logits, heads.targets.logits, reduction="none").mean(1)


plugin = Response(regression, tempered=False, whole=True, labels=False)
