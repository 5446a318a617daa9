"""Damage done to a store's objects, in several ways."""

from pathlib import Path

from kdcache.store import open_store


def harm(folder: Path, kinds: tuple[str, ...]) -> list[str]:
    """Remove the first object of a kind, empty that of the second, change a bit of the others; return their names."""
    names = list(open_store(folder).manifest.objects)
    hurt = [next(name for name in names if name.startswith(kind)) for kind in kinds]
    (folder / hurt[0]).unlink()
    (folder / hurt[1]).write_bytes(b"")
    for name in hurt[2:]:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 4
        (folder / name).write_bytes(data)
    return sorted(hurt)
