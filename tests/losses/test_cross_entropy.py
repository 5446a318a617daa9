"""Hard labels through the fused output layer."""

import torch
from torch.nn import functional

from kdcache.losses.cross_entropy import cross_entropy
from kdcache.losses.output_layer import log_partition, output_layer
from kdcache.targets.tensor import OutputHead
from tests.losses.dense import rows


def test_labels_inside_and_outside_the_head_give_the_dense_cross_entropy_and_gradients() -> None:
    hidden, weight = rows(6, 5, 1).requires_grad_(), rows(40, 5, 2).requires_grad_()
    head_ids = torch.arange(8).repeat(6, 1)
    labels = torch.tensor([0, 7, 8, 39, 20, 3])
    head_logits, extra, rest = output_layer(hidden, OutputHead(weight), head_ids, labels[:, None], (0.5, 1.0), chunk=4)
    found = cross_entropy(extra[:, 0], log_partition(head_logits, rest[:, 1], 1.0))
    expected = functional.cross_entropy(hidden @ weight.T, labels, reduction="none")
    torch.testing.assert_close(found, expected)
    factors = torch.arange(6.0).cos()
    for mine, theirs in zip(
        torch.autograd.grad((found * factors).sum(), (hidden, weight)),
        torch.autograd.grad((expected * factors).sum(), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)
