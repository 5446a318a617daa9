"""Ten thousand random harms to the files of a store: each is refused by name, or changes nothing that is read."""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from kdcache.errors import DamageError, RefusedError
from kdcache.store import Kept, check, open_store
from kdcache.stream import Loader, StreamConfig, output_head_of
from tests import tiny

COMPACT = Kept("levels", {"steps_per_nat": 64}, ranked=True, differences=2)
ROWS = ((5, 9, 3), (7, 7), (12,))


def everything(folder: Path) -> list[bytes]:
    """Every number that a store gives, by sample, by batch and packed."""
    store = open_store(folder)
    found = []
    for sample in store:
        parts = [sample.input_ids, sample.labels, sample.loss_mask, sample.targets.ids, sample.targets.logits]
        parts += [sample.targets.tail, sample.targets.label_logit, *sample.hidden.values()]
        found.append(sample.id.encode() + b"".join(np.ascontiguousarray(part).tobytes() for part in parts))
    for packed in (False, True):
        for batch in Loader(store, StreamConfig(batch_size=3, packed=packed, hidden=("final",))):
            here = batch.to("cpu")
            assert here.targets is not None
            tensors = [here.input_ids, here.labels, here.mask, here.offsets, here.hidden["final"], here.targets.ids]
            tensors += [here.targets.logits, here.targets.tail, here.targets.label_logit]
            found.append(b"".join(tensor.numpy().tobytes() for tensor in tensors))
    if store.manifest.part("output_head"):
        found.append(output_head_of(store).weight.float().numpy().tobytes())
    return found


def harmed(data: bytes, others: list[bytes], chance: random.Random) -> bytes | None:
    """Return a file's content after some accident; None where the file is gone."""
    match chance.randrange(7):
        case 0 | 1 if data:
            changed = bytearray(data)
            changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            return bytes(changed)
        case 2:
            return data[: chance.randrange(len(data))] if data else b"x"
        case 3:
            return None
        case 4:
            return chance.choice(others)
        case 5:
            start = chance.randrange(len(data)) if data else 0
            stop = min(len(data), start + chance.randrange(1, 513))
            return data[:start] + bytes(stop - start) + data[stop:]  # a block that never reached the disk
    return data + chance.randbytes(chance.randrange(1, 64))


def accidents(folder: Path, trials: int, seed: int) -> tuple[int, int]:
    """Harm a copy again and again; return how often it was refused, and how often reading did not need the file."""
    chance = random.Random(seed)
    sound = everything(folder)
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    contents = [(folder / name).read_bytes() for name in files]
    refused = unneeded = 0
    for trial in range(trials):
        place = trial % len(files)
        after = harmed(contents[place], contents, chance)
        if after == contents[place]:
            continue
        hurt = copy / files[place]
        if after is None:
            hurt.unlink()
        else:
            hurt.write_bytes(after)
        try:
            found = everything(copy)
        except (DamageError, RefusedError):
            refused += 1
        else:
            assert found == sound, f"{files[place]} was harmed, and other numbers were read"
            unneeded += 1
            named = str(files[place].as_posix())
            if named in open_store(copy).manifest.objects:
                assert named in {problem.path for problem in check(open_store(copy))}
        hurt.write_bytes(contents[place])
    return refused, unneeded


def stores(folder: Path, seed: int) -> Path:
    """Write a store of either kind."""
    kept = COMPACT if seed % 2 else Kept()
    tiny.write_store(folder / "store", rows=ROWS, vocabulary=300, hidden={"final": 4}, kept=kept)
    return folder / "store"


@pytest.mark.parametrize("seed", range(2))
def test_some_accidents(seed: int, tmp_path: Path) -> None:
    refused, unneeded = accidents(stores(tmp_path, seed), 150, seed)
    assert refused > 90
    assert refused + unneeded > 140


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(2, 12))
def test_ten_thousand_accidents(seed: int, tmp_path: Path) -> None:
    refused, unneeded = accidents(stores(tmp_path, seed), 1000, seed)
    assert refused > 600
    assert refused + unneeded > 950
