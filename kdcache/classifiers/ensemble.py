"""`ensemble`: the mean of several classifiers, or of several passes through one with its dropout at work.

Legend: `S` samples, `C` outputs, `M` answers (members times passes).

In a pass every dropout layer (an nn.Dropout, not the function) drops what a generator of that pass and layer says: the
same units for all samples. So a pass is one thinned network, and its answers depend neither on the batch nor on what
was captured before.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from kdcache.classifiers import Answer, Array, load_classifier
from kdcache.errors import ConfigError, TeacherError
from kdcache.fingerprint import digest_json
from kdcache.teachers import TeacherConfig

LAYERS: dict[type[nn.Module], bool] = {
    nn.Dropout: False,
    nn.Dropout1d: True,
    nn.Dropout2d: True,
    nn.Dropout3d: True,
}
"""Dropout layers that a pass thins; whether whole channels are dropped."""


class EnsembleClassifier:
    """See the module.

    Args:
        config: Its `members`, `ensemble` (the mean of logits, or of probabilities) and `passes`.
    """

    def __init__(self, config: TeacherConfig) -> None:
        self._config = config
        self._members = [load_classifier(one) for one in config.members]

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Identity of the members and of how they are joined."""
        members = [one.fingerprint for one in self._members]
        return {
            "kind": "ensemble",
            "name": self._config.model,
            "members": members,
            "mean": self._config.ensemble,
            "passes": self._config.passes,
            "weights": digest_json([one.get("weights") for one in members]),
        }

    def forward(self, inputs: Mapping[str, Array], taps: Sequence[str] = ()) -> Answer:
        """Return the mean answers for some samples: logits, or the logarithm of the mean probability, in float32.

        Raises:
            ConfigError: Features are asked for, or there is nothing that dropout thins.
            TeacherError: A member failed, or members have other outputs than the first.
        """
        if taps:
            raise ConfigError(
                "Of an ensemble no features are kept: its members have each their own.",
                where="examples.features",
                hint="Capture one member's features in a store of their own.",
            )
        said = [one for member in self._members for one in self._passes(member, inputs)]
        shapes = [tuple(one.shape) for one in said]
        if len(set(shapes)) > 1:
            raise TeacherError(f"The members of an ensemble gave different shapes: {shapes}.", where="teacher.members")
        answers = torch.stack([one.to(said[0].device, torch.float32) for one in said])  # [M, S, ..., C]
        if self._config.ensemble == "logits":
            return Answer(answers.mean(0))
        return Answer(answers.log_softmax(-1).logsumexp(0) - torch.tensor(float(len(said))).log())

    def _passes(self, member: Any, inputs: Mapping[str, Array]) -> Iterator[Tensor]:
        if self._config.passes == 1:
            yield member.forward(inputs).logits
            return
        for number in range(self._config.passes):
            with thinned(number) as layers:
                logits = member.forward(inputs).logits
            if not layers:
                raise ConfigError(
                    "The passes through a member are all the same: it has no dropout layer with p above 0.",
                    where="teacher.passes",
                    hint="Leave teacher.passes out, or give a model with nn.Dropout layers.",
                )
            yield logits


@contextmanager
def thinned(number: int) -> Iterator[list[str]]:
    """Thin every dropout layer that is run inside, in whatever model and mode eval, and give the list of them.

    Args:
        number: Of the pass: the same number drops the same units.
    """
    layers: list[str] = []

    def drop(layer: nn.Module, _inputs: Any, out: Any) -> Any:
        if type(layer) not in LAYERS or not layer.p:
            return None
        share = float(layer.p)  # type: ignore[arg-type]
        # made on the CPU: a device's generator draws other numbers
        generator = torch.Generator().manual_seed(number * 10_000 + len(layers))
        layers.append(type(layer).__name__)
        shape = [1, *out.shape[1:]]
        if LAYERS[type(layer)]:
            shape = [1, out.shape[1], *[1] * (out.ndim - 2)]
        kept = torch.rand(shape, generator=generator) >= share
        return out * (kept.to(out.device, out.dtype) / max(1 - share, 1e-9))

    handle = register_module_forward_hook(drop)
    try:
        yield layers
    finally:
        handle.remove()


plugin = EnsembleClassifier
