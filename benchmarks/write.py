"""How fast are rows written, and by what? kdcache's presets against the formats a user would pick instead.

    python benchmarks/write.py [--store STORE | --articles 420] [--repeat 4] [--rounds 3] [--out benchmarks/results/...md]

The rows of a real capture, repeated; the peers and their records are those of benchmarks/read.py. kdcache's time is that of `StoreWriter`: ranks, codecs,
compression, digests, fsync and sample tables, in one thread, as a capture does it behind the teacher. Peers get their records ready made.
"""

import argparse
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from machine import heading
from read_data import KEPT, captured_samples, records_of, write_store
from read_peers import PEERS, pack


def main() -> None:
    """Write with every side in turns; write the results file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--articles", type=int, default=420)
    parser.add_argument("--store", type=Path, help="a capture with the preset lossless, in place of one of articles")
    parser.add_argument("--repeat", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    day = datetime.now(UTC).date().isoformat()
    parser.add_argument("--out", type=Path, default=Path(f"benchmarks/results/{day}-write.md"))
    arguments = parser.parse_args()
    missing: dict[str, str] = {}
    spent: dict[str, list[float]] = {}
    sizes: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        samples, counts = captured_samples(arguments.store, arguments.articles)
        samples = samples * arguments.repeat
        write_store(folder / "source", samples, KEPT["raw"], counts)
        records, positions = records_of(folder / "source", pack)
        sides = [*KEPT, *(peer for peer, (write, _, _) in PEERS.items() if write is not None)]
        for turn in range(arguments.rounds):
            for side in np.random.default_rng(turn).permutation(sides).tolist():
                if side in missing:
                    continue
                where = folder / f"{side}-{turn}"
                where.mkdir()
                began = time.perf_counter()
                try:
                    if side in KEPT:
                        write_store(where / "store", samples, KEPT[side], counts)
                    else:
                        PEERS[side][0](where, records)
                except (
                    Exception
                ) as error:  # a peer that is not installed, or does not work here, is named in the report
                    missing[side] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                    continue
                spent.setdefault(side, []).append(time.perf_counter() - began)
                sizes[side] = sum(path.stat().st_size for path in where.rglob("*") if path.is_file()) / positions
    lines = [
        heading("Writing rows"),
        f"Real heads of SmolLM2-135M (k = 64, V = 49,152), {positions:,} positions; {arguments.rounds} rounds in turns. Thousand positions/s: median (lowest to highest). A capture "
        "on a fast accelerator makes some tens of thousands a second. `python benchmarks/write.py` repeats it.\n",
        "| side | thousand positions/s | bytes a position |",
        "|---|---|---|",
    ]
    for side in sorted(spent, key=lambda one: statistics.median(spent[one])):
        speeds = sorted(positions / one / 1e3 for one in spent[side])
        name = f"kdcache {side}" if side in KEPT else side
        lines.append(
            f"| {name} | {statistics.median(speeds):,.0f} ({speeds[0]:,.0f} to {speeds[-1]:,.0f}) | {sizes[side]:.0f} |"
        )
    lines += ["", *(f"- Left out: {side} ({why})." for side, why in missing.items())]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
