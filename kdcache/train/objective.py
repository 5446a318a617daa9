"""The training loss: alpha * T**2 * divergence + (1 - alpha) * cross-entropy + hidden terms.

Legend: `N` positions of a micro-batch, `K` kept entries, `M` tail draws, `V` vocabulary.

This is the one place that masks, averages and multiplies by alpha and T**2 (Hinton et al. 2015, section 2: T**2 keeps
the gradient's size as T changes). Sums are divided by the positions of the whole optimiser step, so that accumulation
and ranks give the gradient of one large batch.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.batch import Batch
from kdcache.errors import ConfigError, MismatchError
from kdcache.losses import divergence
from kdcache.losses.cross_entropy import cross_entropy
from kdcache.losses.exact import exact_divergence
from kdcache.losses.hidden_cosine import hidden_cosine
from kdcache.losses.hidden_mse import hidden_mse
from kdcache.losses.output_layer import first_ids, log_partition, output_layer, suitable_chunk
from kdcache.losses.projector import Projector
from kdcache.losses.tails import policy
from kdcache.store import Store
from kdcache.targets import inverse
from kdcache.targets.tensor import OutputHead, TensorTargets
from kdcache.train.config import LossConfig
from kdcache.train.schedule import extremes
from kdcache.train.student import StudentOutput, is_fused, run_student, width_of

FEATURE_LOSSES = {"mse": hidden_mse, "cosine": hidden_cosine}


@dataclass(frozen=True, slots=True)
class Needs:
    """What of the store a loss reads."""

    targets: bool
    draws: bool
    hidden: tuple[str, ...]
    output_head: bool


def needs(config: LossConfig) -> Needs:
    """Return what a loss reads; hard labels alone read no teacher column."""
    distils = extremes(config.alpha)[1] > 0
    exact = distils and config.tail == "exact"
    layers = [one.teacher for one in config.hidden] + (["final"] if exact else [])
    return Needs(
        targets=distils and not exact,
        draws=distils and config.tail == "sampled",
        hidden=tuple(dict.fromkeys(layers)),
        output_head=exact,
    )


class Objective(nn.Module):
    """The student and its projectors as one module, whose forward pass is the summed loss of a micro-batch.

    Args:
        config: The loss.
        student: The model.
        store: Gives the teacher's widths and vocabulary.
        live: A live teacher fills the batches, so the store's columns do not matter.
    """

    def __init__(self, config: LossConfig, student: nn.Module, store: Store, *, live: bool = False) -> None:
        super().__init__()
        if not live:
            _require_columns(config, store)
        _require_sense(config)
        self.student = student
        self.fused = is_fused(student)
        self._config = config
        self._vocab_size = store.vocab_size
        options: dict[str, Any] = {} if config.beta is None else {"beta": config.beta}
        self._divergence = divergence(config.divergence, **options)
        self._layers = [one.student for one in config.hidden]
        if config.tail == "exact" and extremes(config.alpha)[1] > 0 and not self.fused:
            raise ConfigError("The tail policy exact needs a student with an output layer.", where="loss.tail")
        self.projectors = nn.ModuleList(
            Projector(width_of(student), store.columns[f"hidden.{one.teacher}"].shape[0]) for one in config.hidden
        )

    def forward(self, batch: Batch, alpha: float, temperature: float, positions: float) -> dict[str, Tensor]:
        """Return the terms of a micro-batch, each a sum over its counted positions divided by `positions`.

        Args:
            batch: On the student's device.
            alpha: Weight of the divergence.
            temperature: T.
            positions: Counted positions of the whole optimiser step.

        Returns:
            loss (what is differentiated), divergence (without T**2), cross_entropy, hidden: nats a position.
        """
        output = run_student(self.student, batch.padded(), self._layers, fused=self.fused)
        rows = batch.mask.nonzero()[:, 0]
        kd, ce = self._terms(batch, output, rows, alpha, temperature)
        hidden = self._hidden(batch, output, rows)
        terms = {
            "divergence": kd.sum() / positions,
            "cross_entropy": ce.sum() / positions,
            "hidden": hidden / positions,
        }
        loss = alpha * temperature**2 * terms["divergence"] + (1 - alpha) * terms["cross_entropy"] + terms["hidden"]
        return {"loss": loss, **{name: value.detach() for name, value in terms.items()}}

    def _terms(
        self, batch: Batch, output: StudentOutput, rows: Tensor, alpha: float, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Return divergence and cross-entropy [counted positions]."""
        labels = batch.labels[rows]
        if alpha == 0:
            _, ce = self._sparse(output, rows, labels[:, None], labels[:, None], (1.0,))
            return torch.zeros_like(ce), ce
        if self._config.tail == "exact":
            kd = self._exact(batch, output, rows, temperature)
            if alpha == 1:
                return kd, torch.zeros_like(kd)
            return kd, self._sparse(output, rows, labels[:, None], labels[:, None], (1.0,))[1]
        if batch.targets is None:
            raise ConfigError("The batch holds no targets.", where="loss.alpha")
        targets = batch.targets if len(rows) == batch.num_positions else batch.targets[rows]
        sparse, ce = self._sparse(
            output, rows, targets.ids.long(), _extra(labels, targets, self._config.tail), (inverse(temperature), 1.0)
        )
        head_logits, extra, rest = sparse
        arguments = [targets, head_logits, rest[:, 0], temperature]
        if self._config.tail == "sampled":
            arguments.append(extra[:, 1:])
        return self._divergence(policy(self._config.tail)(*arguments)), ce

    def _sparse(
        self,
        output: StudentOutput,
        rows: Tensor,
        head_ids: Tensor,
        extra_ids: Tensor,
        inverse_temperatures: tuple[float, ...],
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """Return the sparse logits and the cross-entropy of `extra_ids[:, 0]`; the last temperature is 1."""
        temperatures = tuple(dict.fromkeys(inverse_temperatures))
        if output.hidden is not None and output.head is not None:
            head = first_ids(output.head, self._vocab_size)
            sparse = output_layer(output.hidden[rows], head, head_ids, extra_ids, temperatures, chunk=self._chunk(rows))
        else:
            assert output.logits is not None  # a student gives one or the other
            sparse = _of_logits(output.logits[rows, : self._vocab_size], head_ids, extra_ids, temperatures)
        whole = log_partition(sparse[0], sparse[2][:, -1], 1.0)
        return sparse, cross_entropy(sparse[1][:, 0], whole)

    def _exact(self, batch: Batch, output: StudentOutput, rows: Tensor, temperature: float) -> Tensor:
        if batch.output_head is None or output.hidden is None or output.head is None:
            raise ConfigError("The tail policy exact needs the teacher's output layer.", where="loss.tail")
        return exact_divergence(
            output.hidden[rows],
            output.head,
            batch.hidden["final"][rows],
            batch.output_head,
            temperature=temperature,
            divergence=self._divergence,
            num_ids=self._vocab_size,
            chunk=self._chunk(rows),
        )

    def _chunk(self, rows: Tensor) -> int:
        return self._config.chunk_positions or suitable_chunk(self._vocab_size, rows.device)

    def _hidden(self, batch: Batch, output: StudentOutput, rows: Tensor) -> Tensor:
        total = torch.zeros((), device=rows.device)
        for one, projector in zip(self._config.hidden, self.projectors, strict=True):
            projected = projector(output.layers[one.student][rows])
            total = total + one.weight * FEATURE_LOSSES[one.kind](projected, batch.hidden[one.teacher][rows]).sum()
        return total


def _extra(labels: Tensor, targets: TensorTargets, tail: str) -> Tensor:
    if tail == "sampled" and targets.draw_ids is not None:
        return torch.cat([labels[:, None], targets.draw_ids.long()], 1)
    return labels[:, None]


def _of_logits(
    logits: Tensor, head_ids: Tensor, extra_ids: Tensor, inverse_temperatures: tuple[float, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """What `output_layer` gives, for a student that only gives its logits."""
    wide = logits.float() if logits.element_size() < 4 else logits
    others = wide.scatter(1, head_ids, -torch.inf)
    rest = torch.stack([torch.logsumexp(others * b, 1) for b in inverse_temperatures], 1)
    return wide.gather(1, head_ids), wide.gather(1, extra_ids), rest


def _require_sense(config: LossConfig) -> None:
    low, high = extremes(config.alpha)
    if not 0 <= low <= high <= 1:
        raise ConfigError(f"alpha goes from {low} to {high}, outside 0 to 1.", where="loss.alpha")
    if extremes(config.temperature)[0] <= 0:
        raise ConfigError("A temperature is positive.", where="loss.temperature")


def _require_columns(config: LossConfig, store: Store) -> None:
    wanted = needs(config)
    if wanted.output_head and store.manifest.part("output_head") is None:
        raise MismatchError(
            "The tail policy exact needs the teacher's last hidden state and output layer, and the store has neither.",
            where=str(store.path),
            hint="Capture with targets.exact=true, or use loss.tail=bucket.",
        )
    if wanted.draws and "draw_ids" not in store.columns:
        raise MismatchError(
            "The tail policy sampled needs tail draws, and the store has none.",
            where=str(store.path),
            hint="Capture with targets.draws=16, or use loss.tail=bucket.",
        )
    hot = wanted.targets and config.tail != "renormalise" and extremes(config.temperature) != (1.0, 1.0)
    if hot and store.columns["tail_log_partition"].shape == (1,):
        raise MismatchError(
            "The store's teacher told log-probabilities at T = 1 alone, so its tail at another T is unknown.",
            where=str(store.path),
            hint="Set loss.temperature=1, or loss.tail=renormalise (biased).",
        )
    for one in config.hidden:
        if f"hidden.{one.teacher}" not in store.columns:
            kept = [name.removeprefix("hidden.") for name in store.columns if name.startswith("hidden.")]
            raise MismatchError(
                f"The store keeps no hidden layer {one.teacher!r}.",
                where=str(store.path),
                hint=f"It keeps {kept or 'none'}; capture with targets.hidden.",
            )


__all__ = ["Needs", "Objective", "OutputHead", "needs"]
