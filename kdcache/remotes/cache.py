"""The folder on this machine where fetched objects are kept, up to a limit; those used last stay.

KDCACHE_CACHE names it (default: `kdcache` in XDG_CACHE_HOME or ~/.cache), KDCACHE_CACHE_LIMIT its bytes (default 50GB).
It may be emptied at any time, by hand or by another process: what is missing is fetched again.
"""

import os
import re
import secrets
import threading
from pathlib import Path

from kdcache.errors import ConfigError

LIMIT = "50GB"
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
SPARE = 0.9
"""Share of the limit that is left filled when something had to go: the next objects find room without a look."""


class Cache:
    """A cache folder; any number of processes use it at once.

    Attributes:
        root: The folder.
        limit: Bytes.
    """

    def __init__(self, root: Path | None = None, limit: int | None = None) -> None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.root = root or Path(os.environ.get("KDCACHE_CACHE") or home / "kdcache")
        self.limit = limit if limit is not None else _bytes(os.environ.get("KDCACHE_CACHE_LIMIT") or LIMIT)
        self._lock = threading.Lock()
        self._room: int | None = None

    def folder(self, digest: str) -> Path:
        """Return the folder of the store with a digest."""
        return self.root / digest

    def add(self, path: Path, data: bytes) -> None:
        """Write a file of the cache, whole or not at all; what was used longest ago goes if there is no room.

        Raises:
            OSError: It cannot be written.
        """
        with self._lock:
            if self._room is None or self._room < len(data):
                self._room = self._trim(len(data))
            self._room -= len(data)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
        try:
            draft.write_bytes(data)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)

    def touch(self, path: Path) -> bool:
        """Note that a file is being used; return whether it is there."""
        try:
            os.utime(path)
        except OSError:
            return False
        return True

    def _trim(self, needed: int) -> int:
        """Make room for some bytes; return how many there is room for."""
        files = []
        for folder, _, names in os.walk(self.root):
            for name in names:
                try:
                    found = os.stat(os.path.join(folder, name), follow_symlinks=False)
                except OSError:
                    continue  # gone meanwhile
                files.append((found.st_mtime_ns, found.st_size, os.path.join(folder, name)))
        held = sum(size for _, size, _ in files)
        if held + needed <= self.limit:
            return self.limit - held
        for _, size, path in sorted(files):
            if held + needed <= SPARE * self.limit:
                break
            try:
                os.unlink(path)
            except OSError:
                continue
            held -= size
        return max(0, self.limit - held)


def _bytes(text: str) -> int:
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)i?B?\s*", text, re.IGNORECASE)
    if found is None:
        raise ConfigError(
            f"{text!r} is not a number of bytes.", where="KDCACHE_CACHE_LIMIT", hint="Write it as 20GB, or 500MB."
        )
    return int(float(found[1]) * UNITS[found[2].upper()])
