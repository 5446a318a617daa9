"""Terms on features, relations and attention: which loss on which pair of layers, and what is learned for it.

Legend: `S` samples of a batch, `N` positions, `T` tokens, `A` heads, `D` width.

A pair's kind says what is compared: rows of features (`kdcache.losses.features`, after a learned projector), the
samples of a batch among themselves (`relations`), or maps and values of each sample (`attention`). Each term is a sum
over positions or samples, so that training divides all of them by one number.
"""

from collections.abc import Mapping
from pkgutil import iter_modules
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.batch import Batch
from kdcache.errors import ConfigError
from kdcache.losses import attention, features, relations
from kdcache.losses.features import Moments
from kdcache.losses.projector import Projector
from kdcache.store import Store
from kdcache.taps import MAP
from kdcache.train.bank import Bank
from kdcache.train.config import HiddenLossConfig, LossConfig

FAMILIES = {"features": features, "relations": relations, "attention": attention}

UNPROJECTED = ("attention_transfer",)
"""Feature losses whose sides may differ in width."""

PROJECTED = ("crd",)
"""Losses of other families that compare vectors of one width; they take negatives from the store, too."""

MAP_LOSSES = "map_"
"""How the kinds begin that compare attention maps; others compare vectors."""

MOMENT_ROWS = 4096
"""Rows of the first shard that give the mean and variance of a layer."""


def family_of(kind: str) -> str:
    """Return the family of losses that a kind is in.

    Raises:
        ConfigError: None has it.
    """
    for name, package in FAMILIES.items():
        if kind in {module.name for module in iter_modules(package.__path__)}:
            return name
    known = sorted(module.name for package in FAMILIES.values() for module in iter_modules(package.__path__))
    raise ConfigError(f"There is no feature loss {kind!r}.", where="loss.hidden", hint=f"Choose of {', '.join(known)}.")


def with_pairs(config: LossConfig, store: Store, student: nn.Module) -> LossConfig:
    """Return a loss whose rule for pairs has become pairs.

    `last` pairs the teacher's last stored layers with the student's last, `every` the student's layer i of m with the
    stored layer nearest to i/m of the deepest: the uniform strategy of TinyBERT (Jiao et al. 2020, section 3.1).

    Raises:
        ConfigError: The store keeps no numbered layers, or the student does not say how many it has.
    """
    rule = config.pairs
    if rule is None:
        return config
    numbers = (name.removeprefix("hidden.") for name in store.columns if name.startswith("hidden."))
    kept = sorted(int(name) for name in numbers if name.isdigit())
    own = getattr(getattr(student, "config", None), "num_hidden_layers", 0)
    if not kept or not own:
        raise ConfigError(
            f"Layers are paired by their numbers; the store keeps {kept}, and the student has {own}.",
            where="loss.pairs",
            hint="Capture targets.hidden by numbers, or name pairs in loss.hidden.",
        )
    if rule.rule == "last":
        count = min(rule.count, len(kept), own)
        found = list(zip(kept[-count:], range(own - count + 1, own + 1), strict=True))
    else:
        found = [(min(kept, key=lambda one: abs(one - kept[-1] * i / own)), i) for i in range(1, own + 1)]
    causal = store.manifest.kind == "causal_lm"
    pairs = tuple(
        HiddenLossConfig(
            teacher=str(theirs),
            student=str(ours) if causal else f"hidden_states.{ours}",
            kind=rule.kind,
            weight=rule.weight,
            options=rule.options,
        )
        for theirs, ours in found
    )
    return config.model_copy(update={"hidden": (*config.hidden, *pairs), "pairs": None})


class FeatureTerms(nn.Module):
    """The pairs of layers of a run, with their projectors.

    Args:
        config: The pairs.
        store: Gives the teacher's shapes and moments.
        shapes: Of a row of each of the student's layers, such as (D,) or (T, D).
    """

    def __init__(
        self, config: tuple[HiddenLossConfig, ...], store: Store, shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        super().__init__()
        self._config = config
        self._families = [family_of(one.kind) for one in config]
        if store.manifest.kind == "causal_lm":
            _require_maps(config, store)
        self._losses: list[Any] = [
            FAMILIES[family].find(one.kind, **one.options) for one, family in zip(config, self._families, strict=True)
        ]
        self.projectors = nn.ModuleList(
            self._projector(one, family, store, shapes) for one, family in zip(config, self._families, strict=True)
        )
        self._moments = [_moments(store, one.teacher) if one.normalise else None for one in config]
        self._banks = [Bank(store, one.teacher) if one.negatives else None for one in config]

    @property
    def layers(self) -> list[str]:
        """The student's layers that the pairs name."""
        return [one.student for one in self._config]

    def forward(self, layers: Mapping[str, Tensor], batch: Batch, rows: Tensor) -> Tensor:
        """Return the weighted sum of all terms.

        Args:
            layers: Of the student: [N, ...] of a causal model, [S, ...] of others.
            batch: On the student's device.
            rows: int64, the positions that count.
        """
        total = torch.zeros((), device=rows.device)
        parts = (self._config, self._families, self._losses, self.projectors, self._moments, self._banks)
        for one, family, loss, projector, moments, bank in zip(*parts, strict=True):
            student, teacher = layers[one.student], batch.hidden[one.teacher]
            if moments is not None:
                teacher = moments.normalise(teacher)
            per_sample = bool(batch.inputs)
            mask = batch.inputs.get("attention_mask")
            if family == "attention":
                value = _attention(one, loss, student, teacher, batch)
            elif family == "relations":
                sides = (student, _per(teacher, batch))
                own, other = (_pooled(side, batch, mask, per_sample=per_sample) for side in sides)
                more = {}
                if bank is not None:
                    drawn = bank.draw(one.negatives, batch.sample_index.to(rows.device))
                    more["negatives"] = drawn if moments is None else moments.normalise(drawn)
                value = loss(projector(own), other, **more) * batch.num_samples
            elif per_sample:
                value = _by_rows(loss, projector, student, _firsts(teacher, batch), mask)
            else:
                value = loss(projector(student[rows]), teacher[rows]).sum()
            total = total + one.weight * value
        return total

    @staticmethod
    def _projector(
        one: HiddenLossConfig, family: str, store: Store, shapes: Mapping[str, tuple[int, ...]]
    ) -> nn.Module:
        projects = (family == "features" and one.kind not in UNPROJECTED) or one.kind in PROJECTED
        if not projects:
            return nn.Identity()
        return Projector(shapes[one.student][-1], store.columns[f"hidden.{one.teacher}"].shape[-1])


def _require_maps(config: tuple[HiddenLossConfig, ...], store: Store) -> None:
    """Refuse a causal model's pair that compares a map with what is none, or relations of positions left out."""
    holed = {layer for layer, keep in store.manifest.layers.items() if keep == "masked"}
    for one in config:
        maps = [name.startswith(MAP) for name in (one.teacher, one.student)]
        if maps != 2 * [one.kind.startswith(MAP_LOSSES)]:
            raise ConfigError(
                f"{one.kind} does not compare {one.teacher!r} with {one.student!r}.",
                where="loss.hidden",
                hint=f"map_kl and map_mse are for {MAP}N of both sides, and all other kinds for vectors.",
            )
        if family_of(one.kind) == "attention" and one.teacher in holed:
            raise ConfigError(
                f"{one.kind} compares all positions of a sample, and the store keeps {one.teacher!r} of some.",
                where="loss.hidden",
                hint="Capture the layer with keep: all.",
            )


def _attention(one: HiddenLossConfig, loss: Any, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
    """Return the sum of an attention loss over samples, or of a causal model over positions that count."""
    maps = one.kind.startswith(MAP_LOSSES)
    if batch.inputs:
        sides, real = (student, _firsts(teacher, batch)), _whole(batch.inputs.get("attention_mask"), student)
        counted = torch.ones(len(student), device=student.device)
    else:
        own, real = _rectangle(student, batch)
        other = _rectangle(teacher, batch)[0]
        # maps are kept with room for a longer sample's keys
        sides = own, other[..., : own.shape[1]] if maps else other
        # a sample's mean stands for each of its positions that count
        counted = _rectangle(batch.mask[:, None], batch)[0].sum((1, 2))
    if maps and student.ndim < 4:  # the mean over the heads, as one
        sides = sides[0][:, None], sides[1][:, None]
    summed: Tensor = (loss(*sides, real) * counted).sum()
    return summed


def _by_rows(loss: Any, projector: nn.Module, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Return the sum over samples of a feature loss; of sequences, the mean over a sample's real tokens."""
    if student.ndim != 3:
        found: Tensor = loss(projector(student), teacher).sum()
        return found
    real = torch.ones_like(student[..., 0]) if mask is None else mask.to(student.dtype)
    rows = loss(projector(student).flatten(0, 1), teacher.flatten(0, 1)).view(real.shape)
    summed: Tensor = ((rows * real).sum(1) / real.sum(1).clamp(min=1)).sum()
    return summed


def _rectangle(values: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return positions [N, D] sample by sample [S, T, D], zero where one has no more, and bool [S, T] where it has."""
    lengths = batch.offsets.diff()
    real = torch.arange(int(lengths.max()), device=values.device)[None] < lengths[:, None]
    wide = values.new_zeros(real.numel(), values.shape[1]).index_copy(0, real.flatten().nonzero()[:, 0], values)
    return wide.view(*real.shape, -1), real


def _firsts(values: Tensor, batch: Batch) -> Tensor:
    """Return the feature of each sample, which stands at every one of its rows."""
    return values[batch.offsets[:-1]]


def _per(values: Tensor, batch: Batch) -> Tensor:
    return _firsts(values, batch) if batch.inputs else values


def _whole(mask: Tensor | None, like: Tensor) -> Tensor:
    if mask is not None:
        return mask.bool()
    return torch.ones(len(like), like.shape[-2], dtype=torch.bool, device=like.device)


def _pooled(values: Tensor, batch: Batch, mask: Tensor | None, *, per_sample: bool) -> Tensor:
    """Return one vector a sample [S, D]: its own, or the mean over its positions or tokens."""
    if not per_sample:
        lengths = batch.offsets.diff()
        sample = torch.repeat_interleave(torch.arange(len(lengths), device=values.device), lengths)
        sums = values.new_zeros(len(lengths), values.shape[1]).index_add(0, sample, values)
        return sums / lengths[:, None]
    if values.ndim == 3 and mask is not None:
        real = mask.to(values.dtype)[..., None]
        return (values * real).sum(1) / real.sum(1).clamp(min=1)
    return values.flatten(1)


def _moments(store: Store, layer: str) -> Moments:
    values = store.read_shard(0, [f"hidden.{layer}"]).columns[f"hidden.{layer}"][:MOMENT_ROWS]
    flat = torch.from_numpy(values).reshape(-1, values.shape[-1]).double()
    return Moments(flat.mean(0).float(), flat.var(0, unbiased=False).float())
