"""The tensors of a torch checkpoint, read without unpickling it.

A checkpoint is a zip file: `data.pkl` says which tensor is which part of which storage, `data/KEY` are the storages'
bytes. Before torch 1.6 it was five pickles in a row (a magic number, a version, sizes, what `data.pkl` is now, and the
storages' keys), then a length and the bytes of each storage. `pickletools` takes pickles apart into opcodes and runs
none of them. What they would build is followed here on a stack of plain values: names, numbers and tuples; a call of
anything but what rebuilds a tensor is refused.
"""

import io
import pickletools
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

STORAGES = {"torch FloatStorage": "<f4", "torch LongStorage": "<i8", "torch HalfStorage": "<f2"}
"""The storages that are read, and what is in them."""

CALLS = ("collections OrderedDict", "torch._utils _rebuild_tensor_v2")
"""What a checkpoint of plain tensors calls; nothing is called here."""

OLD_HEAD = ["PROTO", "LONG1", "STOP"]
"""Opcodes of the number that a checkpoint before torch 1.6 begins with."""

OLD_MAGIC = 0x1950A86A20F9469CFC6C

KEYS = ("PROTO", "STOP", "EMPTY_LIST", "MARK", "APPEND", "APPENDS", "BINUNICODE", "BINPUT", "LONG_BINPUT")
"""What a list of storages' keys is written with."""

MARK = object()


@dataclass(frozen=True, slots=True)
class Name:
    """A global that the pickle names; never imported."""

    text: str


@dataclass(frozen=True, slots=True)
class Stored:
    """A storage: the key of its bytes, and their type."""

    key: str
    dtype: str


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor as a part of a storage: first element, shape and strides in elements."""

    storage: Stored
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_tensors(path: Path) -> dict[str, NDArray[Any]]:
    """Return the tensors of a state dict by name, as arrays of their own.

    Args:
        path: A checkpoint, in torch's zip format or the one before.

    Raises:
        ValueError, IndexError, KeyError: It is none, is damaged, holds anything but tensors, or a tensor reaches beyond
            its storage.
    """
    if not zipfile.is_zipfile(path):
        return _read_old(io.BytesIO(path.read_bytes()))
    with zipfile.ZipFile(path) as file:
        (inside,) = [name for name in file.namelist() if name.endswith("/data.pkl")]
        folder = inside.removesuffix("data.pkl")
        parts = parts_of(_opcodes(file.read(inside)))
        return {name: _array(part, file.read(f"{folder}data/{part.storage.key}")) for name, part in parts.items()}


def _read_old(stream: io.BytesIO) -> dict[str, NDArray[Any]]:
    head = list(_opcodes(stream))
    if [name for name, _ in head] != OLD_HEAD or head[1][1] != OLD_MAGIC:
        raise ValueError("this is no checkpoint of torch")
    for _ in ("version", "sizes"):
        list(_opcodes(stream))
    parts = parts_of(_opcodes(stream))
    keys = []
    for name, argument in _opcodes(stream):
        if name not in KEYS:
            raise ValueError(f"a list of keys has no opcode {name}")
        if name == "BINUNICODE":
            keys.append(argument)
    kinds = {part.storage.key: np.dtype(part.storage.dtype) for part in parts.values()}
    storages = {}
    for key in keys:
        size = int.from_bytes(stream.read(8), "little") * kinds[key].itemsize
        if size > stream.getbuffer().nbytes - stream.tell():
            raise ValueError(f"the storage {key} of {size} bytes reaches beyond the file")
        storages[key] = stream.read(size)
    return {name: _array(part, storages[part.storage.key]) for name, part in parts.items()}


def _opcodes(pickle: bytes | io.BytesIO) -> Iterator[tuple[str, Any]]:
    for opcode, argument, _ in pickletools.genops(pickle):
        yield opcode.name, argument


def parts_of(opcodes: Iterable[tuple[str, Any]]) -> dict[str, Part]:
    """Return which part of which storage each named tensor is; errors as of `read_tensors`.

    Args:
        opcodes: Of the pickle that says so, name and argument; they are followed, none is run.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    found: dict[str, Part] = {}
    for opcode, argument in opcodes:
        match opcode:
            case "PROTO" | "STOP" | "FRAME":
                pass
            case "GLOBAL":
                if argument not in (*STORAGES, *CALLS):
                    raise ValueError(f"{argument!r} has no place among tensors")
                stack.append(Name(argument))
            case "MARK":
                stack.append(MARK)
            case "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1":
                stack.append(argument)
            case "NEWFALSE" | "NEWTRUE":
                stack.append(opcode == "NEWTRUE")
            case "NONE":
                stack.append(None)
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_DICT":
                stack.append({})
            case "TUPLE":
                stack.append(tuple(_to_mark(stack)))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "BINPERSID":
                stack.append(_stored(stack.pop()))
            case "REDUCE":
                arguments, name = stack.pop(), stack.pop()
                stack.append(_made(name, arguments))
            case "SETITEM" | "SETITEMS":
                items = stack[-2:] if opcode == "SETITEM" else _to_mark(stack)
                if opcode == "SETITEM":
                    del stack[-2:]
                found |= {key: value for key, value in _pairs(items) if isinstance(value, Part)}
            case "BUILD":
                stack.pop()  # versions of the modules, which say nothing about tensors
            case _:
                raise ValueError(f"a checkpoint of plain tensors has no opcode {opcode}")
    return found


def _to_mark(stack: list[Any]) -> list[Any]:
    place = len(stack) - 1 - next(at for at, value in enumerate(reversed(stack)) if value is MARK)
    values = stack[place + 1 :]
    del stack[place:]
    return values


def _pairs(items: list[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(items[::2], items[1::2], strict=True)


def _stored(said: Any) -> Stored:
    match said:
        case ("storage", Name(text=kind), str(key), _, int(), *view) if kind in STORAGES and view in ([], [None]):
            return Stored(key, STORAGES[kind])
    raise ValueError(f"{said!r} is no storage")


def _made(name: Any, arguments: Any) -> Any:
    match name, arguments:
        case Name(text="collections OrderedDict"), ():
            return {}
        case Name(text="torch._utils _rebuild_tensor_v2"), (Stored() as storage, int(first), shape, strides, *_):
            return Part(storage, first, shape, strides)
    raise ValueError(f"{name!r} is not called with {arguments!r} where tensors are made")


def _array(part: Part, data: bytes) -> NDArray[Any]:
    values = np.frombuffer(data, dtype=part.storage.dtype)
    last = part.first + sum((size - 1) * stride for size, stride in zip(part.shape, part.strides, strict=True))
    elements = int(np.prod(part.shape, dtype=object))
    if part.first < 0 or min((*part.shape, *part.strides, 1)) < 0 or max(last + 1, elements) > len(values):
        raise ValueError(f"a tensor of shape {part.shape} reaches beyond its storage of {len(values)}")
    strides = tuple(stride * values.itemsize for stride in part.strides)
    return np.lib.stride_tricks.as_strided(values[part.first :], part.shape, strides).copy()
