"""The bytes of a store: names that are safe, writes that are atomic, reads that are verified.

An object is a regular file below the store's folder, written once. It is named in the manifest with its length and
BLAKE3, and read only after both agree.
"""

import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol, TypeVar

from kdcache.errors import AccessError, CorruptObjectError, MissingObjectError, UnsafeError
from kdcache.fingerprint import digest_bytes
from kdcache.store import disk
from kdcache.store.disk import storage_errors

NAME = re.compile(r"[a-z0-9_][a-z0-9._-]{0,127}(/[a-z0-9_][a-z0-9._-]{0,127}){0,7}")
UNSAFE = re.compile(r"\.(/|$)|(^|/)(con|prn|aux|nul|com[0-9]|lpt[0-9])([./]|$)")
"""A component that ends in a dot, or that is a device on some system."""

TEMPORARY = ".partial"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Object:
    """An object's identity: its length in bytes and the BLAKE3 of its content."""

    bytes: int
    digest: str


def check_name(name: str) -> str:
    """Return an object's name if it is safe on every file system.

    Raises:
        UnsafeError: It could leave the folder, or means something else on another system.
    """
    if not NAME.fullmatch(name) or UNSAFE.search(name):
        raise UnsafeError(
            f"The store names an object {name!r}, which is not a safe file name.",
            hint="Do not use this store; it was not written by kdcache.",
        )
    return name


def write_object(root: Path, name: str, data: bytes) -> Object:
    """Write an object durably under its final name, or not at all; return its identity.

    Raises:
        StorageFullError: There is no space; the temporary file is removed.
        AccessError: The folder may not be written to.
    """
    path = root / name
    temporary = path.with_name(path.name + TEMPORARY)
    with storage_errors(path, len(data)):
        try:
            disk.make(path.parent)
            disk.write(temporary, data)
            disk.move(temporary, path)
            disk.sync(path.parent)
        except BaseException:
            disk.remove(temporary)
            raise
    return Object(len(data), digest_bytes(data))


def read_object(root: Path, name: str, expected: Object) -> bytes:
    """Return an object's bytes once length and digest agree with what is expected.

    Raises:
        MissingObjectError: There is no such file.
        CorruptObjectError: Length or digest differ.
        UnsafeError: The name, or what lies under it, is not a plain file inside the store.
        AccessError: The file may not be read.
    """
    path = locate(root, name)
    try:
        with path.open("rb") as file:
            _require_size(path, os.fstat(file.fileno()).st_size, expected.bytes)
            data = file.read(expected.bytes + 1)
    except FileNotFoundError as error:
        raise missing(path) from error
    except OSError as error:
        raise AccessError(f"The object cannot be read: {error.strerror}.", where=str(path)) from error
    _require_size(path, len(data), expected.bytes)
    _require_digest(path, data, expected)
    return data


def _require_size(path: Path, found: int, expected: int) -> None:
    if found != expected:
        raise _corrupt(path, f"it has {found:,} bytes, and the manifest says {expected:,}")


def _require_digest(path: Path, data: bytes | memoryview, expected: Object) -> None:
    found = digest_bytes(data)
    if found != expected.digest:
        raise _corrupt(path, f"its digest is {found[:16]}, and the manifest says {expected.digest[:16]}")


class _Scratch(threading.local):
    """A thread's buffer for the bytes it is decoding: fresh memory for each object would cost more than reading it."""

    def __init__(self) -> None:
        self._held = bytearray()

    def room(self, size: int) -> memoryview:
        if len(self._held) < size:
            self._held = bytearray(size)
        return memoryview(self._held)[:size]


class Bring(Protocol):
    """Has objects of a store that is somewhere else put into its folder here; again: in place of damaged ones."""

    def __call__(self, names: Iterable[str], *, again: bool = False) -> None:
        """See `kdcache.store.origin.Origin.bring`."""


class Objects:
    """The objects that a manifest lists, each verified whole before its first byte is handed out, once a process.

    Args:
        root: Folder they are in.
        listed: By name.
        bring: Called for what is not there, or damaged; None where the folder is all there is.
    """

    def __init__(self, root: Path, listed: Mapping[str, Object], bring: Bring | None = None) -> None:
        self.root = root
        self._listed = listed
        self._bring = bring
        self._verified: set[str] = set()
        self._scratch = _Scratch()

    def content(self, name: str) -> bytes:
        """Return a whole object; its digest is checked each time.

        Raises:
            MissingObjectError, CorruptObjectError, UnsafeError, AccessError: As `read_object`; also where the manifest
                does not list the name.
        """
        expected = self._expected(name)
        data = self._brought(name, lambda: read_object(self.root, name, expected))
        self._verified.add(name)
        return data

    def bring(self, names: Iterable[str]) -> None:
        """Have objects here that will be read soon: those that are somewhere else come side by side."""
        if self._bring is not None:
            self._bring(names)

    def _brought(self, name: str, read: Callable[[], T]) -> T:
        """Return what reading an object gives; if it is not here, or damaged, it is brought first."""
        if self._bring is None:
            return read()
        try:
            return read()
        except (MissingObjectError, CorruptObjectError):
            self._bring([name], again=True)
            return read()

    def part(self, name: str, start: int, stop: int) -> memoryview:
        """Return bytes start to stop of an object; the first call for it verifies the whole.

        What is returned may be written over by the next call of the same thread.

        Raises:
            CorruptObjectError: The object changed its length since, or errors as `content`.
        """
        if name in self._verified:  # and so located before
            return self._brought(name, lambda: self._read(self.root / name, start, stop))
        expected = self._expected(name)

        def verified() -> memoryview:
            data = self._read(locate(self.root, name), 0, expected.bytes, whole=True)
            _require_digest(self.root / name, data, expected)
            return data

        data = self._brought(name, verified)
        self._verified.add(name)
        return data[start:stop]

    def _read(self, path: Path, start: int, stop: int, *, whole: bool = False) -> memoryview:
        """Return bytes of a file in this thread's buffer: fresh memory costs more than reading into it."""
        try:
            with path.open("rb", buffering=0) as file:
                if whole:
                    _require_size(path, os.fstat(file.fileno()).st_size, stop)
                file.seek(start)
                data, count = self._scratch.room(stop - start), 0
                while count < len(data) and (read := file.readinto(data[count:])):
                    count += read
        except FileNotFoundError as error:
            raise missing(path) from error
        except OSError as error:
            raise AccessError(f"The object cannot be read: {error.strerror}.", where=str(path)) from error
        if count != len(data):
            raise _corrupt(path, "it has become shorter since it was verified")
        return data

    def trust(self, name: str) -> None:
        """Take an object as verified: another process of the same run has just done so."""
        if name not in self._verified:
            locate(self.root, name)
            self._verified.add(name)

    def size(self, name: str) -> int:
        """Return the bytes of an object as the manifest lists it."""
        return self._expected(name).bytes

    def _expected(self, name: str) -> Object:
        if name not in self._listed:
            raise CorruptObjectError(
                "The manifest does not list an object of the store.",
                where=name,
                hint="Copy the store again, or capture it again.",
            )
        return self._listed[name]


def locate(root: Path, name: str) -> Path:
    """Return the path of an object: a regular file inside the store, reached through no link.

    Raises:
        MissingObjectError: There is nothing there.
        UnsafeError: The name is unsafe, or it is a link, a folder or a device.
    """
    path = root / check_name(name)
    here = root
    for part in PurePosixPath(name).parts:
        here = here / part
        if here.is_symlink():
            raise UnsafeError("The store holds a link where a file is due.", where=str(here))
    if not path.exists():
        raise missing(path)
    if not path.is_file():
        raise UnsafeError("The store holds something that is not a regular file.", where=str(path))
    return path


def missing(path: Path) -> MissingObjectError:
    """Return the error for an object that is not there."""
    return MissingObjectError(
        "An object that the manifest names is missing.",
        where=str(path),
        hint="Copy the store again, or capture it again into a new folder.",
    )


def _corrupt(path: Path, what: str) -> CorruptObjectError:
    return CorruptObjectError(
        f"An object is damaged: {what}.",
        where=str(path),
        hint="Run `kdcache verify` to list all damage; copy the store again, or capture it again.",
    )
