"""Cross-entropy of hard labels, from the two numbers that the fused output layer already gives."""

from torch import Tensor


def cross_entropy(label_logit: Tensor, log_partition: Tensor) -> Tensor:
    """Return -log q(label) [N] in nats, at temperature 1.

    Args:
        label_logit: [N], the student's raw logit of the label; positions without a label take any id's and
            are left out by the mask of training.
        log_partition: [N], the student's over the whole vocabulary at temperature 1.
    """
    return log_partition - label_logit
