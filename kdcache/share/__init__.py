"""Send a store to a place that others read from, and bring one here: data first, manifest last, verified on arrival."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdcache.errors import AccessError, ConfigError, CorruptObjectError, Interrupted, MismatchError
from kdcache.fingerprint import canonical_json, digest_bytes
from kdcache.process import stop_signals
from kdcache.remotes import Remote, connect, fetch, is_remote, listing, send
from kdcache.remotes.folder import place_of
from kdcache.share.card import CARD, PREVIEW, card, preview
from kdcache.store import Store, open_store
from kdcache.store.manifest import FILE, load_manifest, strict_json
from kdcache.store.objects import Object, check_name, write_object

MARK = "upload.json"
"""Says which store is being uploaded, before its first object: what lies there of another one is never taken for it."""
AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Transfer:
    """What a push or a pull did.

    Attributes:
        url: Of the shared store.
        digest: Of it.
        pin: The location that opens exactly this store, wherever it is opened.
        objects: Of the store.
        bytes: Of them.
        moved_objects: Those that this run had to move.
        moved_bytes: Of them.
    """

    url: str
    digest: str
    pin: str
    objects: int
    bytes: int
    moved_objects: int
    moved_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form."""
        return asdict(self)


def push(
    path: Path | str, url: str, *, progress: Callable[[int, int], None] | None = None, card_text: str | None = None
) -> Transfer:
    """Upload a store; what is there already stays, so that the same call goes on after any end.

    The manifest comes last: whoever looks meanwhile finds no store. Beside it come a dataset card and a preview that
    the hub shows.

    Args:
        path: Folder of a finished store; every object is verified as it is read.
        url: Where it goes: `hf://datasets/OWNER/NAME[/FOLDER]`, `s3://`, `gs://`, `az://`, `file:`.
        progress: Called with bytes done and all.
        card_text: Replaces the card that is written by default.

    Raises:
        MismatchError: Another store is there, or part of one.
        AccessError: The place cannot be written to, or has not what was sent.
        Interrupted: SIGTERM or Ctrl-C.
    """
    if is_remote(path):
        raise ConfigError("A store is pushed from a folder.", where=str(path), hint="Pull it to one first.")
    store, place = open_store(path), connect(url)
    there = listing(place)
    _require_same(place, there, store.digest)
    listed = store.manifest.objects
    lacking = [name for name, one in listed.items() if there.get(name) != one.bytes]
    moved = sum(listed[name].bytes for name in lacking)
    if FILE not in there or lacking:
        with stop_signals() as stopped:
            if MARK not in there:
                send(place, [(MARK, canonical_json({"digest": store.digest}))])
            done = store.nbytes - moved
            for batch in _batches(store, lacking, place.batch):
                if stopped.is_set():
                    raise Interrupted(
                        "The upload was stopped.", where=url, hint="Run the same command again; it goes on from there."
                    )
                send(place, batch)
                done += sum(len(data) for _, data in batch)
                if progress:
                    progress(done, store.nbytes)
            _require_arrived(place, listed)
        manifest = (Path(store.path) / FILE).read_bytes()
        text = card_text or card(store, place.url)
        send(place, [(CARD, text.encode()), (PREVIEW, preview(store))])
        send(place, [(FILE, manifest)], last=True)
    return Transfer(
        place.url, store.digest, f"{place.url}#blake3={store.digest}", len(listed), store.nbytes, len(lacking), moved
    )


def pull(
    url: str, out: Path | str, *, progress: Callable[[int, int], None] | None = None, digest: str | None = None
) -> Transfer:
    """Bring a whole store to a folder; what is there already and right stays, so that the same call goes on.

    Args:
        url: Of a shared store; `#blake3=DIGEST` at its end pins it.
        out: The folder.
        progress: Called with bytes done and all.
        digest: The digest it must have.

    Raises:
        MismatchError: The folder holds another store, or the digest is another.
        MissingObjectError, CorruptObjectError, AccessError: An object could not be had as it should be.
        StorageFullError: There is no room; what arrived is kept.
        Interrupted: SIGTERM or Ctrl-C.
    """
    store = open_store(url, digest=digest)
    place = place_of(store.path) if store.origin is None else store.origin.place
    root, listed = Path(out), store.manifest.objects
    if (root / FILE).is_file() and (found := load_manifest(root).digest) != store.digest:
        raise MismatchError(
            f"The folder holds another store, {found[:16]}, not {store.digest[:16]}.",
            where=str(root),
            hint="Choose another folder.",
        )
    manifest = (store.path / FILE).read_bytes()  # now: the cache may let go of it while the objects come
    done = moved_objects = moved_bytes = 0
    with stop_signals() as stopped, ThreadPoolExecutor(AT_ONCE, thread_name_prefix="kdcache-pull") as pool:

        def one(name: str, expected: Object) -> bool:
            if _is_there(root, name, expected):
                return False
            write_object(root, name, _fetched(place, name, expected, stopped.is_set))
            return True

        tasks = {pool.submit(one, name, expected): expected.bytes for name, expected in listed.items()}
        try:
            for task, size in tasks.items():
                if task.result():
                    moved_objects, moved_bytes = moved_objects + 1, moved_bytes + size
                done += size
                if progress:
                    progress(done, store.nbytes)
        finally:
            for task in tasks:
                task.cancel()
    write_object(root, FILE, manifest)
    pin = f"{place.url}#blake3={store.digest}"
    return Transfer(place.url, store.digest, pin, len(listed), store.nbytes, moved_objects, moved_bytes)


def _fetched(place: Remote, name: str, expected: Object, stopped: Callable[[], bool]) -> bytes:
    try:
        return fetch(place, name, size=expected.bytes, digest=expected.digest, stopped=stopped)
    except FileNotFoundError as error:
        raise CorruptObjectError(
            "The shared store lacks an object that its manifest names.",
            where=f"{place.url}/{name}",
            hint="Tell whoever shares it; what arrived is kept.",
        ) from error


def _is_there(root: Path, name: str, expected: Object) -> bool:
    path = root / check_name(name)
    if path.is_symlink() or not path.is_file() or path.stat().st_size != expected.bytes:
        return False
    return digest_bytes(path.read_bytes()) == expected.digest


def _require_same(place: Remote, there: dict[str, int], digest: str) -> None:
    for name in (FILE, MARK):
        if name in there:
            found = strict_json(fetch(place, name), f"{place.url}/{name}").get("digest")
            if found != digest:
                raise MismatchError(
                    f"Another store is there, or a part of one: {str(found)[:16]}, not {digest[:16]}.",
                    where=place.url,
                    hint="Push to another URL, or remove what is there first.",
                )
            return
    if any(name.startswith("columns/") for name in there):
        raise MismatchError(
            "Files of a store of unknown origin are there.",
            where=place.url,
            hint="Push to another URL, or remove what is there first.",
        )


def _batches(store: Store, names: list[str], most: tuple[int, int]) -> Iterator[list[tuple[str, bytes]]]:
    batch: list[tuple[str, bytes]] = []
    count = 0
    for name in names:
        size = store.manifest.objects[name].bytes
        if batch and (len(batch) == most[0] or count + size > most[1]):
            yield batch
            batch, count = [], 0
        batch.append((name, store.content(name)))
        count += size
    if batch:
        yield batch


def _require_arrived(place: Remote, listed: Any) -> None:
    there = listing(place)
    wrong = [name for name, one in listed.items() if there.get(name) != one.bytes]
    if wrong:
        raise AccessError(
            f"{len(wrong)} objects are not there after the upload, {wrong[0]} first.",
            where=place.url,
            hint="Run the same command again.",
        )


__all__ = ["Transfer", "pull", "push"]
