"""A store that is somewhere else: its objects are fetched, verified and kept on this machine when they are needed."""

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kdcache.errors import ConfigError, IncompleteStoreError, MismatchError, MissingObjectError
from kdcache.remotes import Remote, connect, fetch
from kdcache.remotes.cache import Cache
from kdcache.store.disk import storage_errors
from kdcache.store.manifest import FILE, MAX_BYTES, Manifest, parse_manifest
from kdcache.store.objects import Object, check_name

AT_ONCE = 8
"""Objects fetched side by side."""


class Origin:
    """Brings objects of one store into its cache folder; safe to use from many threads, and after a fork.

    Args:
        place: Where the store is.
        cache: Where its objects go.
        manifest: Of the store.
    """

    def __init__(self, place: Remote, cache: Cache, manifest: Manifest) -> None:
        self.place = place
        self.root = cache.folder(manifest.digest)
        self._cache = cache
        self._listed: Mapping[str, Object] = manifest.objects
        self._pool: tuple[int, ThreadPoolExecutor] | None = None
        shards = max(1, len(manifest.shards))
        needed = 2 * sum(one.bytes for one in manifest.objects.values()) // shards
        if cache.limit < needed:
            raise ConfigError(
                f"The cache may hold {cache.limit:,} bytes, and two shards of this store have {needed:,}.",
                where="KDCACHE_CACHE_LIMIT",
                hint="Raise it, or pull the store to a folder with `kdcache pull`.",
            )

    def bring(self, names: Iterable[str], *, again: bool = False) -> None:
        """Have objects in the cache folder.

        Args:
            names: Of the objects.
            again: Also those that are there: they turned out to be damaged.

        Raises:
            MissingObjectError, CorruptObjectError, AccessError: One could not be had; see `kdcache.remotes.fetch`.
            StorageFullError: There is no room on the disk.
        """
        lacking = [
            name
            for name in names
            if name in self._listed and (again or not self._cache.touch(self.root / check_name(name)))
        ]
        if len(lacking) == 1:
            self._one(lacking[0])
        elif lacking:
            list(self._threads().map(self._one, lacking))

    def _one(self, name: str) -> None:
        expected = self._listed[name]
        try:
            data = fetch(self.place, name, size=expected.bytes, digest=expected.digest)
        except FileNotFoundError as error:
            raise MissingObjectError(
                "An object that the manifest names is missing.",
                where=f"{self.place.url}/{name}",
                hint="Tell whoever shares the store; what was fetched is kept.",
            ) from error
        with storage_errors(self.root / name, len(data)):
            self._cache.add(self.root / name, data)

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None or self._pool[0] != os.getpid():
            self._pool = (os.getpid(), ThreadPoolExecutor(AT_ONCE, thread_name_prefix="kdcache-fetch"))
        return self._pool[1]


def load_remote(url: str, digest: str | None, *, cached: Callable[[Path], Manifest]) -> tuple[Manifest, Origin]:
    """Return the manifest of a store that is somewhere else, and what brings its objects.

    A store that is asked for by its digest is opened without the network if its manifest was fetched before.

    Args:
        url: Of the store.
        digest: That it must have, or None.
        cached: Reads a manifest from a folder.

    Raises:
        IncompleteStoreError: There is no manifest.
        MismatchError: It has another digest.
    """
    place, cache = connect(url), Cache()
    if digest is not None and (cache.folder(digest) / FILE).is_file():
        return (known := cached(cache.folder(digest))), Origin(place, cache, known)
    try:
        data = fetch(place, FILE, limit=MAX_BYTES)
    except FileNotFoundError as error:
        raise IncompleteStoreError(
            "There is no manifest: this is no store, or it was not uploaded to the end.",
            where=f"{url}/{FILE}",
            hint="Give the URL that `kdcache push STORE URL` wrote to.",
        ) from error
    manifest = parse_manifest(data, f"{url}/{FILE}")
    if digest is not None and manifest.digest != digest:
        raise MismatchError(f"The store's digest is {manifest.digest}, not {digest}.", where=url)
    with storage_errors(cache.root):
        cache.add(cache.folder(manifest.digest) / FILE, data)
    return manifest, Origin(place, cache, manifest)
