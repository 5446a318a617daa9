"""`file:`: a folder of this machine, or of a disk that it mounts; `file:///data/s` or `file:s`."""

import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from kdcache.errors import AccessError, StorageFullError, UnsafeError
from kdcache.remotes import local_path

FULL = (28, 122)
"""Numbers of the system's errors: no space, no quota."""


class FolderPlace:
    """A folder.

    Args:
        url: `file:` and its path.
    """

    batch = (64, 256 << 20)

    def __init__(self, url: str) -> None:
        self.url = url
        self._root = local_path(url)

    def get(self, name: str, limit: int, stall: float) -> bytes:
        """Return an object; see `kdcache.remotes.Remote.get`."""
        path = self._root / name
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise UnsafeError("An object is a link, or no regular file.", where=str(path))
        try:
            with path.open("rb") as file:
                return file.read(limit + 1)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise AccessError(f"It cannot be read: {error.strerror}.", where=str(path)) from error

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every file below the folder."""
        return {
            path.relative_to(self._root).as_posix(): path.stat().st_size
            for path in self._root.rglob("*")
            if path.is_file() and not path.is_symlink()
        }

    def put(self, objects: Sequence[tuple[str, bytes]], *, last: bool = False) -> None:
        """Write objects, each durable under its name or not there."""
        for name, data in objects:
            path = self._root / name
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                draft = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
                try:
                    with draft.open("wb") as file:
                        file.write(data)
                        file.flush()
                        os.fsync(file.fileno())
                    draft.replace(path)
                finally:
                    draft.unlink(missing_ok=True)
            except OSError as error:
                if error.errno in FULL:
                    raise StorageFullError("There is no space left.", where=str(path)) from error
                raise AccessError(f"It cannot be written: {error.strerror}.", where=str(path)) from error


def place_of(path: Path) -> FolderPlace:
    """Return a folder as a place."""
    return FolderPlace(path.absolute().as_uri())


plugin = FolderPlace
