"""Places that stores are shared from: one file is one way to reach them.

Objects are fetched whole and compared with their digests: nothing is appended to what another try left, and a server
that ignores ranges, changes an object under way or answers with something else can do no harm.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from kdcache import registry
from kdcache.errors import AccessError, ConfigError, CorruptObjectError, Interrupted, OutageError
from kdcache.fingerprint import digest_bytes

T = TypeVar("T")

KINDS = {
    "s3": "cloud",
    "gs": "cloud",
    "az": "cloud",
    "https": "https",
    "http": "https",
    "hf": "hub",
    "file": "folder",
}

AGAIN = (408, 425, 429, 500, 502, 503, 504)
"""Answers of a web server after which another try may do better."""


class TransientError(Exception):
    """A try that failed, after which another one may not.

    Attributes:
        what: Happened.
        wait: Seconds that the server asked for, or 0.
    """

    def __init__(self, what: str, wait: float = 0.0) -> None:
        super().__init__(what)
        self.what = what
        self.wait = wait


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a place is waited for; times in seconds.

    Attributes:
        tries: Of one object.
        first: Wait after the first failure; it doubles.
        longest: Wait between two tries, unless the server asks for more.
        outage: Waits of one object together.
        stall: Without a byte, after which a try has failed.
    """

    tries: int = 10
    first: float = 0.5
    longest: float = 60.0
    outage: float = 600.0
    stall: float = 30.0

    def backoff(self, number: int) -> float:
        """Return the wait after the try of a number, counted from 0; by chance, so that many do not come at once."""
        return min(self.longest, self.first * 2.0**number) * random.uniform(0.5, 1.0)


class Remote(Protocol):
    """A folder somewhere else, with the objects of a store in it."""

    @property
    def url(self) -> str:
        """Where; holds no secret."""

    @property
    def batch(self) -> tuple[int, int]:
        """Objects and bytes that are written at a time at most."""

    def get(self, name: str, limit: int, stall: float) -> bytes:
        """Return an object, one try.

        Args:
            name: Of the object.
            limit: Bytes it may have.
            stall: Seconds without a byte after which the try has failed.

        Raises:
            FileNotFoundError: There is no such object.
            AccessError: It may not be read, or never will be.
            TransientError: Another try may do better.
        """

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every object that is there, as far as the place can list them; errors as `get`."""

    def put(self, objects: Sequence[tuple[str, bytes]], *, last: bool = False) -> None:
        """Write a batch of objects, each whole or not at all, one try; errors as `get`.

        Args:
            objects: Name and content of each.
            last: Nothing comes after them: a place that keeps versions refuses if somebody else has written since.
        """


def is_remote(location: object) -> bool:
    """Say whether a location is a URL of one of these places; all else is a folder."""
    return "://" in str(location) and not str(location).startswith("file:")


def local_path(location: object) -> Path:
    """Return the folder that a path, or a URL of the kind `file:`, names."""
    text = str(location)
    return Path(unquote(urlsplit(text).path)) if text.startswith("file:") else Path(text)


def connect(url: str) -> Remote:
    """Return the place of a URL; nothing is asked of it yet.

    Raises:
        ConfigError: No such kind of place, or a package that it needs is missing.
    """
    scheme = urlsplit(url).scheme
    if scheme not in KINDS:
        raise ConfigError(
            f"Stores cannot be reached by {scheme!r}.", where=url, hint=f"Use a folder, or one of {', '.join(KINDS)}."
        )
    place: Remote = registry.find("kdcache.remotes", KINDS[scheme])(url.rstrip("/"))
    return place


def fetch(
    place: Remote,
    name: str,
    *,
    size: int | None = None,
    digest: str | None = None,
    limit: int = 1 << 30,
    patience: Patience | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> bytes:
    """Return an object of a place, with patience, and only if it is what it should be.

    Args:
        place: Where.
        name: Of the object.
        size: Bytes it must have; None for any number up to the limit.
        digest: Its BLAKE3; None where it is not known.
        limit: Bytes.
        patience: How long to try.
        stopped: Asked before each try; true ends it.

    Raises:
        FileNotFoundError: There is no such object.
        AccessError: It may not be read, or the place could not be reached in time.
        CorruptObjectError: It came whole twice, and is not what it should be.
    """
    wrong = 0

    def attempt() -> bytes:
        nonlocal wrong
        if stopped():
            raise Interrupted(
                "The transfer was stopped; what arrived is kept.",
                where=f"{place.url}/{name}",
                hint="Run the same command again; it goes on from there.",
            )
        data = place.get(name, limit if size is None else size, (patience or Patience()).stall)
        if (size is None or len(data) == size) and (digest is None or digest_bytes(data) == digest):
            return data
        what, wrong = _difference(data, size), wrong + 1
        if wrong == 2:
            raise CorruptObjectError(
                f"An object is not what the manifest says: {what}.",
                where=f"{place.url}/{name}",
                hint="Tell whoever shares the store; nothing of this object was used.",
            )
        raise TransientError(what)

    return _patiently(attempt, f"{place.url}/{name}", patience or Patience())


def send(
    place: Remote, objects: Sequence[tuple[str, bytes]], *, last: bool = False, patience: Patience | None = None
) -> None:
    """Write a batch of objects, with patience.

    Args:
        place: Where to.
        objects: Name and content of each.
        last: Nothing comes after them; see `Remote.put`.
        patience: How long to try.

    Raises:
        AccessError: It may not be written, or the place could not be reached in time.
    """
    with _present(place):
        _patiently(lambda: place.put(objects, last=last), place.url, patience or Patience())


def listing(place: Remote, patience: Patience | None = None) -> dict[str, int]:
    """Return the bytes of every object of a place, as `Remote.sizes` does, with patience; errors as `send`."""
    with _present(place):
        return _patiently(place.sizes, place.url, patience or Patience())


@contextmanager
def _present(place: Remote) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise AccessError("There is no such bucket or repository.", where=place.url) from error


def _patiently(act: Callable[[], T], where: str, patience: Patience) -> T:
    waited = 0.0
    for number in range(patience.tries):
        try:
            return act()
        except TransientError as error:
            what = error.what
            wait = max(error.wait, patience.backoff(number))
        waited += wait
        if waited > patience.outage or number + 1 == patience.tries:
            break
        time.sleep(wait)
    raise OutageError(
        f"The place did not answer as it should, in {number + 1} tries: {what}.",
        where=where,
        hint="Check the network and the URL, and run the same command again: what was moved stays.",
    )


def _difference(data: bytes, size: int | None) -> str:
    start = data[:512].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "a web page came in its place (a login, or a network that asks for one?)"
    if size is not None and len(data) != size:
        return f"{len(data):,} bytes came, not {size:,}"
    return "its digest is another"
