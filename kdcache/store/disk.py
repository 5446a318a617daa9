"""What a writer asks of a file system, each call durable or atomic by itself; everything written goes through here.

A test that puts its own calls in place of these has every way in which a disk can fail, or lose power, in its hands.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kdcache.errors import AccessError, KdcacheError, StorageFullError

NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)
"""What a file system without hard links answers."""


def write(path: Path, data: bytes) -> None:
    """Write a file; its bytes are durable, its name not before `sync` of its folder."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def move(source: Path, target: Path) -> None:
    """Rename a file, over one that may be there; durable after `sync` of both folders."""
    source.replace(target)


def link(source: Path, target: Path) -> bool:
    """Give a file a second name unless it is taken; return whether it got it. The name appears with all its bytes.

    Where there are no hard links the name is looked at and then taken, which two writers at once can both do.
    """
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if target.exists():
            return False
        source.replace(target)
    return True


def claim(path: Path, data: bytes) -> bool:
    """Create a file unless there is one; return whether it was created. Nothing depends on its being durable."""
    try:
        with path.open("xb") as file:
            file.write(data)
    except FileExistsError:
        return False
    return True


def remove(path: Path) -> None:
    """Remove a file, or a folder and what it holds; one that is gone already is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.unlink()


def make(folder: Path) -> None:
    """Make a folder and those it lies in, durably."""
    lacking = []
    while not folder.is_dir():
        lacking.append(folder)
        folder = folder.parent
    for one in reversed(lacking):
        with suppress(FileExistsError):
            one.mkdir()
        sync(one.parent)


def sync(folder: Path) -> None:
    """Make the names in a folder durable."""
    if os.name == "nt":  # has no handles of folders; NTFS journals names
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def storage_errors(path: Path, needed: int = 0) -> Iterator[None]:
    """Turn what the operating system says about a write into an error that says what to do next."""
    try:
        yield
    except Exception as error:
        number = _os_error(error)
        if number is None:
            raise
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = 0
            with suppress(OSError):
                free = shutil.disk_usage(path.parent if path.parent.exists() else Path.cwd()).free
            raise StorageFullError(
                f"There is no space left: {needed:,} bytes were needed and {free:,} are free.",
                where=str(path),
                hint="Free some space and run the same command again; finished shards are kept.",
            ) from error
        raise AccessError(
            f"The store cannot be written: {os.strerror(number) if number else error}.",
            where=str(path),
            hint="Check the folder's permissions, or choose another with --out.",
        ) from error


def _os_error(error: Exception) -> int | None:
    """Return the operating system's number of an error, 0 where it has none; None of an error that is not its."""
    if isinstance(error, OSError):
        return error.errno or 0
    # libraries written in Rust have errors of their own, with the number in the text
    found = re.search(r"\(os error (\d+)\)", "" if isinstance(error, KdcacheError) else str(error))
    return int(found[1]) if found else None
