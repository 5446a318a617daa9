"""Every hostile store is refused with a typed error, soon, in little memory, and nothing outside of it is touched."""

import shutil
import time
from pathlib import Path

import pyarrow as pa
import pytest

from kdcache import describe
from kdcache.errors import DamageError, KdcacheError
from kdcache.store import Kept, check, open_store
from kdcache.stream import Loader, StreamConfig
from tests import tiny
from tests.hostile.corpus import ATTACKS, Attack

SECONDS, MEMORY = 2.0, 64 << 20


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "store"
    tiny.write_store(
        folder, kept=Kept("levels", {"steps_per_nat": 64}, ranked=True, differences=2), hidden={"final": 4}
    )
    return folder


def use(folder: Path) -> None:
    """Do with a store all that a user does."""
    store = open_store(folder)
    describe.summary(folder)
    describe.first_samples(folder, 2, positions=2, candidates=2, temperature=1.0)
    for _ in store:
        pass
    for _ in Loader(store, StreamConfig(batch_size=2, hidden=("final",))):
        pass
    if problems := check(store):
        raise DamageError(problems[0].what)


def memory(key: str) -> int:
    """A field of this process's memory in bytes: VmHWM is the peak since it was last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) * 1024


def test_the_corpus_is_large_and_its_original_is_sound(original: Path) -> None:
    assert len({one.name for one in ATTACKS}) == len(ATTACKS) >= 60
    use(original)


@pytest.mark.parametrize("one", ATTACKS, ids=lambda one: one.name)
def test_it_is_refused(one: Attack, original: Path, tmp_path: Path) -> None:
    folder, outside = tmp_path / "store", tmp_path / "outside"
    shutil.copytree(original, folder)
    outside.write_bytes(b"untouched")
    one.act(folder, outside)
    pa.default_memory_pool().release_unused()  # what making the attack took would hide what reading it takes
    Path("/proc/self/clear_refs").write_text("5")
    before, began = memory("VmRSS"), time.monotonic()
    with pytest.raises(KdcacheError) as caught:
        use(folder)
    seconds, grown = time.monotonic() - began, memory("VmHWM") - before
    assert caught.value.code != "KD000"
    assert outside.read_bytes() == b"untouched"
    assert seconds < SECONDS
    assert grown < MEMORY, f"{grown >> 20} MiB"
