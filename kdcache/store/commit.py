"""How any number of writers share one store: no lock, no server, no clock.

A writer stages its objects in a folder of its own, then puts a record that names them: the plan, or a shard's receipt.
A record is put only where there is none, so one writer of a shard wins, and what its record names is moved to where
readers look. Moving can be done again by anyone, so a winner that dies in between has lost nothing. A claim only keeps
living writers from making the same shard; nothing is wrong if two of them do.
"""

import json
import os
import re
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdcache.errors import CorruptObjectError
from kdcache.fingerprint import canonical_json, digest_bytes
from kdcache.store import disk
from kdcache.store.disk import storage_errors
from kdcache.store.objects import Object, check_name

STAGING, CLAIMS = "staging", "claims"
WRITER = re.compile("[0-9a-f]{16}")
STAGE = re.compile("start|[0-9]{5,9}")


class Stage:
    """A writer's folder of objects that nothing names yet.

    Args:
        root: The store.
        writer: Who.
        name: Of what is made: "start", or a shard's number.

    Attributes:
        objects: What was staged.
        named: A record may name it: it is not this writer's alone any more.
    """

    def __init__(self, root: Path, writer: str, name: str) -> None:
        self._root, self._writer, self._name = root, writer, name
        self._folder = root / STAGING / f"{writer}-{name}"
        self._data: list[str] = []
        self.named = False
        self.objects: dict[str, Object] = {}
        with storage_errors(root):
            disk.make(self._folder)

    def write(self, name: str, data: bytes) -> None:
        """Stage an object.

        Raises:
            StorageFullError, AccessError: It cannot be written.
        """
        path = self._folder / str(len(self._data))
        with storage_errors(self._root / check_name(name), len(data)):
            disk.write(path, data)
        self._data.append(name)
        self.objects[name] = Object(len(data), digest_bytes(data))

    def commit(self, record: str, document: Mapping[str, Any]) -> bool:
        """Put a record of what is staged where there is none, and the objects in their places.

        Returns:
            Whether this writer's is the record; if another's is, what was staged is thrown away.
        """
        whole = {**document, "writer": self._writer, "stage": self._name, "staged": self._data}
        with storage_errors(self._root / record):
            draft = self._folder / "record"
            disk.write(draft, canonical_json(whole))
            disk.sync(self._folder)
            disk.make((self._root / record).parent)
            self.named = True
            if not put(self._root, record, draft):
                self.named = False
                disk.remove(self._folder)
                return False
            settle(self._root, whole)
        return True

    def discard(self) -> None:
        """Throw away what is staged, unless a record may name it: then it is for whoever comes next to settle."""
        if not self.named:
            disk.remove(self._folder)


def put(root: Path, record: str, draft: Path) -> bool:
    """Give a draft its place as a record, durably, unless there is one; return whether it got it.

    Args:
        root: The store.
        record: Its name.
        draft: A file of this writer's own that says it; gone afterwards.
    """
    path = root / record
    try:
        won = disk.link(draft, path)
    except FileNotFoundError:
        if not path.is_file():
            raise
        return False  # whoever was faster has cleared the draft away
    disk.sync(path.parent)
    disk.remove(draft)
    return won


def settle(root: Path, record: Mapping[str, Any]) -> None:
    """Move what a record names from its writer's folder to where readers look, as far as that was not done.

    Raises:
        CorruptObjectError: An object is in neither place.
    """
    writer, stage, staged = str(record.get("writer")), str(record.get("stage")), record.get("staged") or []
    folder = root / STAGING / f"{writer}-{stage}"
    if not WRITER.fullmatch(writer) or not STAGE.fullmatch(stage) or not folder.is_dir():
        return
    folders = set()
    for number, name in enumerate(staged):
        source, target = folder / str(number), root / check_name(name)
        disk.make(target.parent)
        try:
            disk.move(source, target)
        except FileNotFoundError as error:
            if not target.is_file():  # another writer may have moved it just now
                raise CorruptObjectError(
                    "An object of a committed shard is lost.",
                    where=str(target),
                    hint=f"Delete receipts/{stage}.json and run the same command again; the shard is captured anew.",
                ) from error
        folders.add(target.parent)
    for one in sorted(folders):
        disk.sync(one)
    for left in (root / STAGING).glob(f"*-{stage}"):
        disk.remove(left)  # also of writers that came second, or died over it


class Claims:
    """Which shards this writer makes.

    Args:
        root: The store.

    Attributes:
        writer: Its id, new every time.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self.writer = secrets.token_hex(8)
        self._said = json.dumps({"writer": self.writer, "host": socket.gethostname(), "process": os.getpid()}).encode()

    def claim(self, shard: int) -> bool:
        """Return whether no writer has claimed the shard so far; from now on this one has."""
        path = self._root / CLAIMS / f"{shard:05d}.json"
        with storage_errors(path):
            disk.make(path.parent)
            return disk.claim(path, self._said)

    def turn(self, shard: int, shards: int) -> int:
        """Return a shard's place in the order in which this writer takes over what others claimed: each its own."""
        return (shard - int(self.writer, 16)) % shards


def clear(root: Path) -> None:
    """Remove what only unfinished stores need, but for plan and receipts."""
    for name in (STAGING, CLAIMS):
        disk.remove(root / name)
