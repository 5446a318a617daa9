"""A disk that fails, is killed or loses power at a chosen call; the calls of `kdcache.store.disk` in its hands."""

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.store import disk

CALLS = ("write", "move", "link", "claim", "remove", "sync")
MODES = ("error", "full", "killed before", "killed after", "power", "power, some kept")


class Killed(BaseException):
    """Stands for the end of the process, or of the machine."""


@dataclass
class Undo:
    """What takes a change of names back that no sync has made durable; `folder` is the one to sync."""

    folder: Path
    act: Callable[[], Any]


class FaultyDisk:
    """Counts the calls, fails at one of them in one of the modes, and knows what a loss of power would undo.

    Args:
        at: Number of the call that fails, from 1; 0 for none.
        mode: How.
    """

    def __init__(self, patch: pytest.MonkeyPatch, at: int = 0, mode: str = "error") -> None:
        self.calls = 0
        self._at, self._mode = at, mode
        self._undo: list[Undo] = []
        self._real = {name: getattr(disk, name) for name in CALLS}
        for name in CALLS:
            patch.setattr(disk, name, self._faulty(name))

    def _faulty(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.calls += 1
            fails = self.calls == self._at
            if fails and name == "remove" and self._mode in ("error", "full"):
                return None  # what cannot be removed stays, and nobody is told
            if fails and self._mode == "error":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            if fails and self._mode == "full":
                if name == "write":  # half of it still found room
                    arguments[0].write_bytes(arguments[1][: len(arguments[1]) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if fails and self._mode == "killed before":
                raise Killed
            undo = self._change(name, arguments)
            result = self._real[name](*arguments)
            self._undo += undo
            if name == "sync":
                self._undo = [one for one in self._undo if one.folder != arguments[0]]
            if fails:
                raise Killed
            return result

        return call

    def _change(self, name: str, arguments: tuple[Any, ...]) -> list[Undo]:
        """Return what takes a call's changes of names back; asked before it is made."""
        path = Path(arguments[0])
        if name == "write":  # writing over a file is not undone: its bytes are synced, and its name was there
            return [] if path.exists() else [Undo(path.parent, lambda: path.unlink(missing_ok=True))]
        if name == "claim":
            return [] if path.exists() else [Undo(path.parent, lambda: path.unlink(missing_ok=True))]
        if name == "link":
            target = Path(arguments[1])
            return [] if target.exists() else [Undo(target.parent, lambda: target.unlink(missing_ok=True))]
        if name == "move" and path.exists():
            target, had = Path(arguments[1]), arguments[1].read_bytes() if arguments[1].exists() else None
            return [Undo(target.parent, lambda: _move_back(path, target, had))]
        if name == "remove" and path.is_file():
            data = path.read_bytes()
            return [Undo(path.parent, lambda: path.parent.is_dir() and path.write_bytes(data))]
        return []

    def lose_power(self, kept: np.random.Generator | None = None) -> None:
        """Take back what was not durable, all of it or whatever chance does not keep."""
        for one in reversed(self._undo):
            if kept is None or kept.random() < 0.5:
                one.act()


def _move_back(source: Path, target: Path, had: bytes | None) -> None:
    if not target.exists():
        return
    source.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(target, source)
    if had is not None:
        target.write_bytes(had)
