"""The training loss: alpha * T**2 * divergence + (1 - alpha) * cross-entropy + hidden terms.

Legend: `N` positions of a micro-batch, `K` kept entries, `M` tail draws, `V` vocabulary.

This is the one place that masks, averages and multiplies by alpha and T**2 (Hinton et al. 2015, section 2: T**2 keeps
the gradient's size as T changes). Sums are divided by the positions of the whole optimiser step, so that accumulation
and ranks give the gradient of one large batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from kdcache.batch import Batch
from kdcache.errors import ConfigError, MismatchError
from kdcache.losses import RESPONSES, Heads, divergence, response
from kdcache.losses.cross_entropy import cross_entropy
from kdcache.losses.exact import exact_divergence
from kdcache.losses.output_layer import first_ids, log_partition, output_layer, suitable_chunk
from kdcache.losses.spans import is_span_loss, span_loss
from kdcache.losses.tails import policy
from kdcache.store import Store
from kdcache.taps import MAP, attend_openly
from kdcache.targets import inverse
from kdcache.targets.tensor import OutputHead, TensorTargets
from kdcache.train.average import Average
from kdcache.train.config import EntropyTemperature, LearnedTemperature, LossConfig, Schedule
from kdcache.train.features import FeatureTerms
from kdcache.train.schedule import extremes
from kdcache.train.spans import span_terms
from kdcache.train.student import StudentOutput, is_fused, layer_shapes, run_student
from kdcache.train.teachers import combined
from kdcache.train.temperature import Learned, by_entropy
from kdcache.train.weights import position_weights


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
    weighed = config.weights is not None and config.weights.by != "student_loss"
    return Needs(
        targets=(distils and not exact) or weighed,
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
        probe: Inputs of two samples, of students of examples.
        teachers: Configured weight of every teacher, the store's first.
        vocab_size: Ids of the student; default: as many as the teacher's.
    """

    def __init__(
        self,
        config: LossConfig,
        student: nn.Module,
        store: Store,
        *,
        live: bool = False,
        probe: Mapping[str, Tensor] | None = None,
        teachers: Sequence[float] = (1.0,),
        vocab_size: int | None = None,
    ) -> None:
        super().__init__()
        if not live:
            _require_columns(config, store)
        _require_sense(config)
        self.student = student
        self.fused = probe is None and is_fused(student)
        self._config = config
        self._teachers = teachers
        self._vocab_size = vocab_size or store.vocab_size
        options = {**config.options, **({} if config.beta is None else {"beta": config.beta})}
        responds = config.divergence in RESPONSES
        self._response = response(config.divergence, **options) if responds else None
        self._spans = span_loss(config.divergence, **options) if is_span_loss(config.divergence) else None
        plain = self._spans is None and not responds
        self._divergence = divergence(config.divergence, **options) if plain else divergence("forward_kl")
        self._layers = [one.student for one in config.hidden]
        if config.tail == "exact" and extremes(config.alpha)[1] > 0 and not self.fused:
            raise ConfigError("The tail policy exact needs a student with an output layer.", where="loss.tail")
        if config.hidden and probe is None and not self.fused:
            raise ConfigError(
                "This student gives logits only: hidden losses need a transformers model.", where="loss.hidden"
            )
        if any(layer.startswith(MAP) for layer in self._layers):
            attend_openly(student)
        shapes = layer_shapes(student, self._layers, probe) if config.hidden else {}
        self.features = FeatureTerms(config.hidden, store, shapes)
        self.learned = Learned(config.temperature) if isinstance(config.temperature, LearnedTemperature) else None
        self._tempered = self._response.tempered if self._response is not None else self._spans is None
        self.mean_temperature = 1.0
        # here, so that a checkpoint carries it
        self.average: Average | None = None

    def forward(self, batch: Batch, alpha: float, temperature: float, positions: float) -> dict[str, Tensor]:
        """Return the terms of a micro-batch, each a sum over its counted positions divided by `positions`.

        Args:
            batch: On the student's device.
            alpha: Weight of the divergence.
            temperature: T; not used where it is learned, or goes by the teacher's entropy.
            positions: Counted positions of the whole optimiser step.

        Returns:
            loss (what is differentiated), divergence (without T**2), cross_entropy, hidden: nats a position.
        """
        output = run_student(self.student, batch, self._layers, fused=self.fused)
        rows = batch.mask.nonzero()[:, 0]
        scale = self._scale(batch, rows, temperature)
        self.mean_temperature = scale if isinstance(scale, float) else float(scale.mean())
        kd, ce = self._terms(batch, output, rows, alpha, scale)
        weights: Tensor | float = 1.0
        if self._config.weights is not None:
            known = None if batch.targets is None else batch.targets[rows]
            weights = position_weights(self._config.weights, known, batch.labels[rows], ce)
            kd, ce = kd * weights, ce * weights
        hidden = self.features(output.layers, batch, rows)
        soft = (kd * scale**2 if self._tempered else kd).sum() / positions
        terms = {
            "divergence": kd.sum() / positions,
            "cross_entropy": ce.sum() / positions,
            "hidden": hidden / positions,
        }
        loss = alpha * soft + (1 - alpha) * terms["cross_entropy"] + terms["hidden"]
        if self.learned is not None:

            def tried(value: float) -> Tensor:
                found = self._terms(batch, output, rows, max(alpha, 1e-6), value)[0]
                return (found * weights).sum() * value**2 / positions

            loss = loss + self.learned.pull(tried)
        return {"loss": loss, **{name: value.detach() for name, value in terms.items()}}

    def _scale(self, batch: Batch, rows: Tensor, scheduled: float) -> float | Tensor:
        """Return T: of all positions, or of each [counted positions]."""
        if self.learned is not None:
            return float(self.learned().detach())
        if isinstance(self._config.temperature, EntropyTemperature) and batch.targets is not None and len(rows):
            return by_entropy(self._config.temperature, batch.targets[rows])
        return scheduled

    def _terms(
        self, batch: Batch, output: StudentOutput, rows: Tensor, alpha: float, temperature: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return divergence and cross-entropy [counted positions]."""
        if isinstance(temperature, Tensor):
            levels = [(value, (temperature == value).nonzero()[:, 0]) for value in sorted(set(temperature.tolist()))]
            parts = [self._terms(batch, output, rows[some], alpha, value) for value, some in levels]
            back = torch.cat([some for _, some in levels]).argsort()
            kd, ce = (torch.cat(side)[back] for side in zip(*parts, strict=True))
            return kd, ce
        labels = batch.labels[rows]
        if self._config.hard != "cross_entropy":
            return self._values(batch, output, rows, alpha, temperature)
        if alpha == 0:
            _, ce = self._sparse(output, rows, labels[:, None], labels[:, None], (1.0,))
            return torch.zeros_like(ce), ce
        if self._config.tail == "exact":
            kd = self._exact(batch, output, rows, temperature)
            if alpha == 1:
                return kd, torch.zeros_like(kd)
            return kd, self._sparse(output, rows, labels[:, None], labels[:, None], (1.0,))[1]
        if self._spans is not None:
            size = (self._vocab_size, self._chunk(rows))
            return span_terms(self._spans, batch, output, partial(self._sparse, output), temperature, size=size)
        if batch.targets is None:
            raise ConfigError("The batch holds no targets.", where="loss.alpha")
        every = len(rows) == batch.num_positions
        teachers = [one if every else one[rows] for one in (batch.targets, *batch.others)]
        found = [self._against(one, output, rows, labels, temperature) for one in teachers]
        # the cross-entropy is the student's own, the same beside every teacher
        return combined(self._config.combine, self._teachers, [kd for kd, _ in found], teachers), found[0][1]

    def _against(
        self, targets: TensorTargets, output: StudentOutput, rows: Tensor, labels: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Return the divergence from one teacher and the cross-entropy [counted positions]."""
        sparse, ce = self._sparse(
            output, rows, targets.ids.long(), _extra(labels, targets, self._config.tail), (inverse(temperature), 1.0)
        )
        head_logits, extra, rest = sparse
        if self._response is not None:
            heads = Heads(targets, head_logits, rest[:, 0], labels, extra[:, 0], temperature)
            return self._response.loss(heads), ce
        arguments = [targets, head_logits, rest[:, 0], temperature]
        if self._config.tail == "sampled":
            arguments.append(extra[:, 1:])
        return self._divergence(policy(self._config.tail)(*arguments)), ce

    def _values(
        self, batch: Batch, output: StudentOutput, rows: Tensor, alpha: float, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Return divergence and hard loss [counted positions] of outputs that are values, not classes."""
        assert output.logits is not None  # _require_values has looked
        logits = output.logits[rows].float()
        hard = torch.zeros(len(rows), device=logits.device)
        if alpha < 1:
            values = batch.extra["label_values"][rows]
            each = binary_cross_entropy_with_logits(logits, values, reduction="none")
            hard = each.sum(1) if self._config.hard == "sigmoid" else (logits - values).square().mean(1)
        if alpha == 0:
            return torch.zeros_like(hard), hard
        assert batch.targets is not None  # `needs` has asked for them
        assert self._response is not None  # `_require_sense` has looked
        teachers, labels, found = [one[rows] for one in (batch.targets, *batch.others)], batch.labels[rows], []
        for targets in teachers:
            own = logits.gather(1, targets.ids.long())
            empty = torch.full_like(own[:, 0], -torch.inf)
            found.append(self._response.loss(Heads(targets, own, empty, labels, own[:, 0], temperature)))
        return combined(self._config.combine, self._teachers, found, teachers), hard

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
    if config.hard != "cross_entropy" and high > 0 and config.divergence not in ("sigmoid", "regression"):
        raise ConfigError(
            f"Outputs that are values are not compared by {config.divergence}.",
            where="loss.divergence",
            hint="Use sigmoid or regression.",
        )
    if config.divergence in RESPONSES and config.tail != "bucket":
        raise ConfigError(f"{config.divergence} has no tail policy.", where="loss.tail", hint="Leave it out.")
    if not 0 <= low <= high <= 1:
        raise ConfigError(f"alpha goes from {low} to {high}, outside 0 to 1.", where="loss.alpha")
    if extremes(config.temperature)[0] <= 0:
        raise ConfigError("A temperature is positive.", where="loss.temperature")
    own = config.weights is not None and config.weights.by == "student_loss"
    if own and low == 1 and (config.tail == "exact" or config.hard != "cross_entropy"):
        raise ConfigError(
            "With alpha 1 the student's own loss is not computed here, and all positions would weigh the same.",
            where="loss.weights",
            hint="Set loss.alpha below 1, or weigh by teacher_loss, entropy or margin.",
        )
    if isinstance(config.temperature, float | Schedule):
        return
    blunt = config.divergence in RESPONSES and not response(config.divergence).tempered
    if high == 0 or config.hard != "cross_entropy" or config.divergence == "dist" or blunt:
        # dist compares positions with each other, which have no temperature in common; some losses know none
        raise ConfigError(
            "A temperature by entropy or a learned one is for a divergence at every position that T softens.",
            where="loss.temperature",
            hint="Set loss.temperature to a number or a schedule.",
        )
    if isinstance(config.temperature, EntropyTemperature) and config.tail == "exact":
        raise ConfigError(
            "A temperature by entropy needs the teacher's head, which the tail policy exact does not read.",
            where="loss.temperature",
            hint="Use loss.tail=bucket.",
        )


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
