"""Any bytes in any file, under digests that are right: a typed error or some numbers, never anything else."""

import random
import shutil
from pathlib import Path

import pytest

from kdcache.errors import KdcacheError
from kdcache.store import Kept
from tests import tiny
from tests.hostile.corpus import document, put
from tests.hostile.test_hostile import use


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Return bytes after one to four small changes, such as a fuzzer makes."""
    found = bytearray(data)
    for _ in range(chance.randrange(1, 5)):
        place = chance.randrange(len(found)) if found else 0
        match chance.randrange(6):
            case 0 if found:
                found[place] ^= 1 << chance.randrange(8)
            case 1 if found:
                found[place] = chance.choice((0, 1, 0x7F, 0x80, 0xFF))
            case 2:
                del found[place : place + chance.randrange(1, 33)]
            case 3:
                found[place:place] = chance.randbytes(chance.randrange(1, 33))
            case 4 if len(found) > 8:
                found[place : place + 4] = chance.choice((b"\xff" * 4, b"\0" * 4, b"\0\0\0\x80"))
            case _:
                other = chance.randrange(len(found)) if found else 0
                found[place : place + 16] = found[other : other + 16]
    return bytes(found)


def fuzzed(folder: Path, seed: int, trials: int) -> tuple[int, int]:
    """Open a store again and again with one of its files changed; return how often it was refused, how often read."""
    chance = random.Random(seed)
    kept = Kept("levels", {"steps_per_nat": 64}, ranked=True, differences=2) if seed % 2 else Kept("bits", ranked=True)
    tiny.write_store(folder / "store", kept=kept, hidden={"final": 4})
    names = [*document(folder / "store")["objects"], "manifest.json"]
    refused = read = 0
    for trial in range(trials):
        shutil.rmtree(folder / "copy", ignore_errors=True)
        shutil.copytree(folder / "store", folder / "copy")
        name = names[trial % len(names)]
        after = mutated((folder / "copy" / name).read_bytes(), chance)
        if name == "manifest.json":
            (folder / "copy" / name).write_bytes(after)
        else:
            put(folder / "copy", name, after)
        try:
            use(folder / "copy")
            read += 1
        except KdcacheError:
            refused += 1
        except Exception as error:
            kept_as = folder / f"found-{seed}-{trial}"
            shutil.copytree(folder / "copy", kept_as)
            raise AssertionError(f"trial {trial}, {name}: {error!r}; kept as {kept_as}") from error
    return refused, read


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(2, 22))])
def test_any_bytes_give_a_typed_error_or_numbers(seed: int, tmp_path: Path) -> None:
    refused, read = fuzzed(tmp_path, seed, 200 if seed < 2 else 3000)
    assert refused > 100
    assert read + refused >= 200
