"""What a student's step consumes, the same from a store and from a live teacher.

Legend: `N` positions of the batch, `S` its samples, `T` longest sample, `D` hidden width, `C` spans.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from kdcache.targets.tensor import OutputHead, TensorTargets
from kdcache.unpack import PackedTargets


@dataclass(frozen=True, slots=True)
class Padded:
    """A batch as a rectangle.

    Attributes:
        input_ids: int64 [S, T], right-padded.
        attention_mask: int64 [S, T], 1 for real tokens.
        index: int64 [N], where the flat rows are in the flattened rectangle [S * T].
    """

    input_ids: Tensor
    attention_mask: Tensor
    index: Tensor


@dataclass(frozen=True, slots=True)
class Spans:
    """Stretches of text that two tokenisations both cut, and which positions of either side predict their tokens.

    The positions of the batch are then the student's, and the rows of its targets the teacher's, in other numbers.

    Attributes:
        rows: int64 [R], rows of the targets that lie in a span, span by span.
        of_rows: int64 [R], which span each of them lies in.
        positions: int64 [P], the student's positions that lie in a span, span by span: where the mask is set.
        of_positions: int64 [P], which span each of them lies in.
        first_rows: int64 [C], the row that predicts each span's first token.
        first_positions: int64 [C], the student's position that does.
        nbytes: int64 [C], bytes of each span's text; 0 of an end or begin token.
    """

    rows: Tensor
    of_rows: Tensor
    positions: Tensor
    of_positions: Tensor
    first_rows: Tensor
    first_positions: Tensor
    nbytes: Tensor

    def __len__(self) -> int:
        """C."""
        return len(self.nbytes)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Spans":
        """Return them on a device."""
        moved = (getattr(self, one.name).to(device, non_blocking=non_blocking) for one in fields(self))
        return Spans(*moved)


@dataclass(frozen=True, slots=True)
class Batch:
    """Some samples, their positions one after the other: no padding.

    Attributes:
        input_ids: int64 [N], what the student sees; [0] where its inputs are examples.
        labels: int64 [N], the next token.
        mask: bool [N], where the label counts.
        offsets: int64 [S+1], sample i has positions offsets[i] to offsets[i+1].
        sample_index: int64 [S], number of each sample in the store.
        targets: The teacher's rows, or None where they were not asked for.
        packed: The same as they lie in the store, in place of `targets`: `to` unpacks them on the device.
        others: The rows of further teachers.
        hidden: Layer name to the teacher's features [N, D].
        output_head: The teacher's output layer, for the tail policy `exact`.
        extra: Further columns of the store [N, ...], by name.
        inputs: What a student of examples is given [S, ...], by the name of its parameter.
        places: int64 [N], of students that answer for every token: which of the S * T answers each position is.
        answers: Of the same students: T, how many a sample has.
        spans: Where the student's tokenizer is not the teacher's; positions are then the student's.
    """

    input_ids: Tensor
    labels: Tensor
    mask: Tensor
    offsets: Tensor
    sample_index: Tensor
    targets: TensorTargets | None = None
    packed: PackedTargets | None = None
    others: tuple[TensorTargets, ...] = ()
    hidden: Mapping[str, Tensor] = field(default_factory=dict)
    output_head: OutputHead | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    places: Tensor | None = None
    answers: int | None = None
    spans: Spans | None = None

    @property
    def num_positions(self) -> int:
        """N."""
        return len(self.labels)

    @property
    def num_samples(self) -> int:
        """S."""
        return len(self.sample_index)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """Return the batch on a device, its targets unpacked there."""
        targets = None if self.targets is None else self.targets.to(device, non_blocking=non_blocking)
        if self.packed is not None:
            targets = self.packed.each(lambda part: part.to(device, non_blocking=non_blocking)).unpacked()
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
            mask=self.mask.to(device, non_blocking=non_blocking),
            offsets=self.offsets.to(device, non_blocking=non_blocking),
            targets=targets,
            packed=None,
            others=tuple(one.to(device, non_blocking=non_blocking) for one in self.others),
            hidden={name: one.to(device, non_blocking=non_blocking) for name, one in self.hidden.items()},
            output_head=None if self.output_head is None else self.output_head.to(device),
            extra={name: one.to(device, non_blocking=non_blocking) for name, one in self.extra.items()},
            inputs={name: one.to(device, non_blocking=non_blocking) for name, one in self.inputs.items()},
            places=None if self.places is None else self.places.to(device, non_blocking=non_blocking),
            spans=None if self.spans is None else self.spans.to(device, non_blocking=non_blocking),
        )

    def rows(self, kept: Tensor, offsets: Tensor) -> "Batch":
        """Return the batch with some of its positions.

        Args:
            kept: int64, which.
            offsets: int64 [S+1], where each sample's begin among them.
        """
        unpacked = self if self.packed is None else self.to(self.labels.device)
        return replace(
            unpacked,
            labels=unpacked.labels[kept],
            mask=unpacked.mask[kept],
            offsets=offsets,
            targets=None if unpacked.targets is None else unpacked.targets[kept],
            others=tuple(one[kept] for one in unpacked.others),
            hidden={name: one[kept] for name, one in unpacked.hidden.items()},
            extra={name: one[kept] for name, one in unpacked.extra.items()},
        )

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked host memory."""
        return replace(
            self,
            input_ids=self.input_ids.pin_memory(),
            labels=self.labels.pin_memory(),
            mask=self.mask.pin_memory(),
            targets=None if self.targets is None else self.targets.pin_memory(),
            packed=None if self.packed is None else self.packed.each(torch.Tensor.pin_memory),
            others=tuple(one.pin_memory() for one in self.others),
            hidden={name: one.pin_memory() for name, one in self.hidden.items()},
        )

    def padded(self, pad_id: int = 0) -> Padded:
        """Return the right-padded rectangle; a causal model's real positions do not see the padding.

        Args:
            pad_id: Id of the padding.
        """
        lengths = self.offsets.diff()
        longest = int(lengths.max())
        place = torch.arange(longest, device=lengths.device)
        mask = place[None] < lengths[:, None]
        index = mask.flatten().nonzero()[:, 0]
        ids = self.input_ids.new_full((self.num_samples * longest,), pad_id)
        ids[index] = self.input_ids
        return Padded(ids.view(-1, longest), mask.long(), index)
