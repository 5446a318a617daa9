"""Decode a column's gathered parts to tensors: the same values as its codec's, faster for some by torch's kernels.

Legend: `N` positions, `K` entries a position.

A stream keeps shards as their parts lie in the store, two fifths of the bytes, and unpacks what a few batches need: on
the CPU (`unpack`), or on the device that the batch goes to, after its packed bytes have travelled there
(`PackedTargets`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kdcache.codecs import Array, Codec
from kdcache.codecs.float16 import Float16
from kdcache.codecs.integer import Integer
from kdcache.codecs.levels import MASKED, Levels
from kdcache.codecs.log_partition import LogPartition
from kdcache.codecs.ranked import Ranked
from kdcache.targets.log_partition import EMPTY, STEP
from kdcache.targets.tensor import TensorTargets


def unpack(codec: Codec, parts: Mapping[str, Array]) -> Tensor:
    """Return the decoded values [N, ...] of the same rows of every part; unsigned ranks come as int32.

    Args:
        codec: The column's; all its parts are a row's.
        parts: By name, as the store keeps them.
    """
    if isinstance(codec, Levels):
        return _levels(parts, codec.steps_per_nat)
    if isinstance(codec, LogPartition):
        return _log_partition(torch.from_numpy(parts[""]), codec.differences)
    if isinstance(codec, Float16 | Integer):
        return torch.from_numpy(parts[""]).to(getattr(torch, codec.dtype))
    values = codec.decode(parts)  # type: ignore[arg-type]
    return torch.from_numpy(values.astype(np.int32) if values.dtype == np.uint16 else values)


def _levels(parts: Mapping[str, Array], steps_per_nat: int) -> Tensor:
    gaps = torch.from_numpy(parts[""])
    if parts["high"].any():
        gaps = gaps.to(torch.int16) + (torch.from_numpy(parts["high"]).to(torch.int16) << 8)
    codes = torch.cumsum(gaps, 1, dtype=torch.int16)
    # codes are whole numbers modulo 2**16, and torch sums signed ones: what is negative lies above 2**15
    wide = codes.to(torch.int32) & 0xFFFF if codes.numel() and int(codes.min()) < 0 else codes
    values = wide.to(torch.float32).mul_(-1 / steps_per_nat).add_(torch.from_numpy(parts["max"])[:, None])
    return values if wide is codes else values.masked_fill_(wide == MASKED, -torch.inf)


def _log_partition(steps: Tensor, differences: int) -> Tensor:
    for _ in range(differences):
        steps = torch.cumsum(steps, 1, dtype=torch.int16)
    values = steps.to(torch.float32).mul_(STEP)
    if steps.numel() and int(steps.min()) == EMPTY:
        values.masked_fill_(steps == EMPTY, -torch.inf)
    return values


class RankTable:
    """The id of every rank, copied to a device once.

    Args:
        ids: int32, ids by rank, on the CPU.
    """

    def __init__(self, ids: Tensor) -> None:
        self._held = {ids.device: ids}
        self._ids = ids

    def on(self, device: torch.device) -> Tensor:
        """Return the table on a device."""
        if device not in self._held:
            self._held[device] = self._ids.to(device)
        return self._held[device]


@dataclass(frozen=True, slots=True)
class PackedColumn:
    """Some rows of a column as they lie in the store, on any device.

    Attributes:
        codec: The column's; None where the parts are its decoded values.
        parts: By name, [N, ...]; the plane `high` of `levels` is left out where it is zero.
        table: The id of every rank, for ranked ids.
    """

    codec: Codec | None
    parts: Mapping[str, Tensor]
    table: RankTable | None = None

    @staticmethod
    def of(codec: Codec, parts: Mapping[str, Array], table: RankTable) -> "PackedColumn":
        """Return a column's rows ready to travel; what no device unpacks is decoded here.

        Args:
            codec: The column's.
            parts: By name, as the store keeps them.
            table: The id of every rank; used by ranked ids.
        """
        if not isinstance(codec, Levels | LogPartition | Ranked | Integer | Float16):
            return PackedColumn(None, {"": unpack(codec, parts)})
        # torch knows little of unsigned words: they travel as signed ones of the same bits
        signed = {"uint16": np.int16, "uint32": np.int32}
        kept = {
            name: torch.from_numpy(one.view(signed.get(one.dtype.name, one.dtype)))
            for name, one in parts.items()
            if name != "high" or one.any()
        }
        return PackedColumn(codec, kept, table if isinstance(codec, Ranked) else None)

    def each(self, function: Callable[[Tensor], Tensor]) -> "PackedColumn":
        """Return the column with a function applied to its parts: a move, a slice."""
        return replace(self, parts={name: function(part) for name, part in self.parts.items()})

    def unpacked(self) -> Tensor:
        """Return the values on the parts' device, as `unpack` does, without waiting for the device."""
        match self.codec:
            case Levels(steps_per_nat=steps):
                gaps = self.parts[""].int()
                if "high" in self.parts:
                    gaps += self.parts["high"].int() << 8
                codes = torch.cumsum(gaps, 1, dtype=torch.int32) & 0xFFFF
                values = codes.float().mul_(-1 / steps).add_(self.parts["max"][:, None])
                return values.masked_fill_(codes == MASKED, -torch.inf)
            case LogPartition(differences=differences):
                sums = self.parts[""].int()
                for _ in range(differences):
                    sums = torch.cumsum(sums, 1, dtype=torch.int32)
                sums = (sums + 0x8000 & 0xFFFF) - 0x8000  # they are of 16 bits
                return sums.float().mul_(STEP).masked_fill_(sums == EMPTY, -torch.inf)
            case Ranked():
                planes = [part.int() << 8 * place for place, (_, part) in enumerate(sorted(self.parts.items()))]
                ranks = sum(planes[1:], start=planes[0])
                assert self.table is not None  # ranked columns have it
                return self.table.on(ranks.device)[ranks.long()]
            case Integer(bits=bits):
                return self.parts[""].int() & (1 << bits) - 1 if bits < 32 else self.parts[""].int()
        return self.parts[""].float() if isinstance(self.codec, Float16) else self.parts[""]


@dataclass(frozen=True, slots=True)
class PackedTargets:
    """A teacher's rows as they lie in the store; they are unpacked where they are moved to.

    Attributes:
        columns: Field of `TensorTargets` to column.
        vocab_size: V.
    """

    columns: Mapping[str, PackedColumn]
    vocab_size: int

    def each(self, function: Callable[[Tensor], Tensor]) -> "PackedTargets":
        """Return the targets with a function applied to every part: a move, a slice."""
        return replace(self, columns={name: column.each(function) for name, column in self.columns.items()})

    def unpacked(self) -> TensorTargets:
        """Return the targets on the parts' device."""
        values = {name: column.unpacked() for name, column in self.columns.items()}
        return TensorTargets(**values, vocab_size=self.vocab_size)
