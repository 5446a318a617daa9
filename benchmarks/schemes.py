"""What do bytes buy? Schemes for keeping a teacher's row: bytes a position, distance to the teacher, error of the gradient.

    python benchmarks/schemes.py [--teacher FOLDER|FILE.gguf] [--articles 170] [--positions 1500] [--out benchmarks/results/...md]

kdcache's are captured to real stores and read back; their bytes are those of the stored columns of the teacher's row (ids, logits, log-partition, label;
draws where kept). The peers' schemes are written out here from their papers and code, in the form that is kindest to them:

- renormalised top-k: ids and bfloat16 log-probabilities at T = 1, the rest thrown away;
- ghost bucket: the same, the rest as one more id, tempered like an id;
- polynomial: ids bit-packed, 16 log-probabilities in bfloat16, the others by least squares on 1, t, t^2, sqrt(t) in float32; the rest as one more id
  (the coding of DistillKit, with its default of no residual bins);
- 50 pure draws at T = 1: ids bit-packed with 7 bits of count (Random Sampling KD); at T != 1 the counts are tempered, as nothing else is kept.

Columns of ids and values are compressed with zstd 3 where that makes them smaller. The student is the teacher with a normal deviate of one nat on every
logit. Its gradient is (student - target) / T; `error` is the norm of what a scheme changes in it over the norm of the exact gradient, both summed over positions;
`bias` is the norm of the mean change over the same: what more data does not average out (of changes at random, a share of 1/sqrt(positions) is left). KL is of the teacher to the distribution that a
scheme gives back, with a known rest spread evenly over the other ids.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import heading
from numcodecs import Zstd

from kdcache.capture import capture
from kdcache.capture.config import CaptureConfig
from kdcache.config import parse_config
from kdcache.demo import teacher_folder, write_articles
from kdcache.store import Store, open_store
from kdcache.targets import Targets
from kdcache.teachers import Teacher, load_teacher

Array = np.ndarray[Any, Any]
TEMPERATURES = (1.0, 2.0, 4.0)
TEACHER_COLUMNS = ("head_ids", "head_logits", "tail_log_partition", "label_logit", "draw_ids", "draw_logits")
CAPTURES: dict[str, dict[str, Any]] = {
    **{f"kdcache compact, k = {k}": {"targets": {"k": k}} for k in (16, 32, 64, 128, 256)},
    "kdcache lossless, k = 64": {"targets": {"k": 64}, "store": {"preset": "lossless"}},
    "kdcache compact, k = 64, 8 draws": {"targets": {"k": 64, "draws": 8}},
}
PEER_K, EXACT, DRAWS = 64, 16, 50


@dataclass
class Kept:
    """What a scheme says of one sample at one temperature: N positions, K ids.

    `tail` [N] is the mass of the other ids where it is known; `even` says that the loss spreads it as the student does.
    """

    ids: Array
    mass: Array
    tail: Array | None = None


@dataclass
class Score:
    """Sums over positions."""

    kl: float = 0.0
    error: float = 0.0
    norm: float = 0.0
    positions: int = 0
    mean: Array | float = 0.0
    bytes: list[Array] = field(default_factory=list)

    def add(self, kept: Kept, p: Array, s: Array) -> None:
        """Take in one sample: the teacher p and the student s [N, V]."""
        rows = np.arange(len(p))[:, None]
        target, guess = np.zeros_like(p), np.zeros_like(p)
        if kept.tail is not None:
            outside = np.ones_like(p)
            outside[rows, kept.ids] = 0
            guess[:] = (kept.tail / outside.sum(1))[:, None] * outside
            target[:] = s * outside
            target *= (kept.tail / target.sum(1))[:, None]
        np.add.at(target, (rows, kept.ids), kept.mass)
        np.add.at(guess, (rows, kept.ids), kept.mass)
        with np.errstate(divide="ignore", invalid="ignore"):
            self.kl += float(np.where(p > 0, p * (np.log(p) - np.log(guess)), 0).sum())
        wrong, whole = target - p, s - p
        self.error += float(np.linalg.norm(wrong, axis=1).sum())
        self.norm += float(np.linalg.norm(whole, axis=1).sum())
        self.mean = self.mean + wrong.sum(0)
        self.positions += len(p)

    def row(self) -> tuple[float, float, float]:
        """Return KL, error and bias."""
        bias = float(np.linalg.norm(self.mean)) / self.norm
        return self.kl / self.positions, self.error / self.norm, bias


def softmax(z: Array) -> Array:
    """Return the rows' probabilities."""
    power = np.exp(z - z.max(1, keepdims=True))
    return np.asarray(power / power.sum(1, keepdims=True))


def top(p: Array, k: int) -> tuple[Array, Array]:
    """Return ids by falling probability, and their log-probabilities in bfloat16."""
    ids = np.argsort(-p, axis=1, kind="stable")[:, :k]
    logs = torch.from_numpy(np.log(np.take_along_axis(p, ids, 1))).bfloat16()
    return ids, logs.double().numpy()


def tempered(logs: Array, temperature: float) -> Array:
    """Return probabilities, summing to one, of log-probabilities at T = 1."""
    return softmax(logs / temperature)


def with_ghost(logs: Array) -> Array:
    """Return the log-probabilities with one more, of the rest."""
    rest = np.maximum(1 - np.exp(logs).sum(1, keepdims=True), 1e-9)
    return np.concatenate([logs, np.log(rest)], axis=1)


def renormalised(p: Array, _: np.random.Generator) -> tuple[Callable[[float], Kept], list[Array]]:
    """Keep the largest and forget the rest."""
    ids, logs = top(p, PEER_K)
    return lambda t: Kept(ids, tempered(logs, t)), [ids, bfloat16(logs)]


def ghost(p: Array, _: np.random.Generator) -> tuple[Callable[[float], Kept], list[Array]]:
    """Keep the largest, and the rest as one id."""
    ids, logs = top(p, PEER_K)
    every = with_ghost(logs)
    return lambda t: _ghostly(ids, every, t), [ids, bfloat16(logs)]


def polynomial(p: Array, _: np.random.Generator) -> tuple[Callable[[float], Kept], list[Array]]:
    """Keep some exactly, and a curve through the others."""
    ids, logs = top(p, PEER_K)
    t = np.arange(PEER_K - EXACT, dtype=np.float64)
    basis = np.stack([np.ones_like(t), t, t * t, np.sqrt(t)], axis=1)
    fit = np.linalg.lstsq(basis, logs[:, EXACT:].T, rcond=None)[0].astype(np.float32)
    curve = (basis @ fit.astype(np.float64)).T
    every = with_ghost(np.concatenate([logs[:, :EXACT], np.minimum(curve, 0)], axis=1))
    return lambda t: _ghostly(ids, every, t), [ids, bfloat16(logs[:, :EXACT]), fit.T.copy()]


def draws(p: Array, random: np.random.Generator) -> tuple[Callable[[float], Kept], list[Array]]:
    """Draw ids with replacement and keep how often each came."""
    counts = np.stack([random.multinomial(DRAWS, row / row.sum()) for row in p])
    ids = np.argsort(-counts, axis=1, kind="stable")[:, :DRAWS]
    often = np.take_along_axis(counts, ids, 1).astype(np.float64)

    def at(temperature: float) -> Kept:
        power = (often / DRAWS) ** (1 / temperature)
        return Kept(ids, power / power.sum(1, keepdims=True))

    return at, [ids[often > 0], often[often > 0].astype(np.uint8)]


def _ghostly(ids: Array, every: Array, temperature: float) -> Kept:
    mass = tempered(every, temperature)
    return Kept(ids, mass[:, :-1], mass[:, -1])


def bfloat16(values: Array) -> Array:
    """Return the bits."""
    return torch.from_numpy(values).bfloat16().view(torch.int16).numpy()


PEERS: dict[str, Callable[[Array, np.random.Generator], tuple[Callable[[float], Kept], list[Array]]]] = {
    f"renormalised top-{PEER_K}": renormalised,
    f"ghost bucket, top-{PEER_K}": ghost,
    f"polynomial, top-{PEER_K}": polynomial,
    f"{DRAWS} pure draws": draws,
}


def stored(targets: Targets) -> Callable[[float], Kept]:
    """Return what a store says at a temperature: by the bucket, or by draws where there are any."""

    def at(temperature: float) -> Kept:
        ids, mass = targets.ids.astype(np.int64), targets.probabilities(temperature)
        if targets.draw_ids is None:
            return Kept(ids, mass, targets.tail_mass(temperature))
        drawn = targets.draw_ids.astype(np.int64), targets.draw_weights(temperature)
        return Kept(np.concatenate([ids, drawn[0]], 1), np.concatenate([mass, drawn[1]], 1))

    return at


def column_bytes(store: Store) -> float:
    """Return the bytes a position of the columns that hold the teacher's row."""
    sizes = store.bytes_per_column()
    return sum(sizes[name] for name in TEACHER_COLUMNS if name in sizes) / store.num_positions


def peer_bytes(pieces: list[list[Array]], vocab_size: int, positions: int) -> float:
    """Return the bytes a position: ids at their bits, or compressed if that is less; values likewise."""
    bits = int(vocab_size - 1).bit_length()
    total = 0.0
    for column, arrays in enumerate(zip(*pieces, strict=True)):
        flat = np.concatenate([one.reshape(-1) for one in arrays])
        if column == 0:
            plain = flat.size * bits / 8
            flat = flat.astype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
        else:
            plain = flat.nbytes * (7 / 8 if flat.dtype == np.uint8 else 1)
        total += min(plain, len(Zstd(level=3).encode(np.ascontiguousarray(flat))))
    return total / positions


def stores_of(folder: Path, teacher: Teacher, data: Path) -> dict[str, Store]:
    """Capture one store a preset; a sample a batch, so that the rows to judge by are computed in the same way."""
    found = {}
    for name, more in CAPTURES.items():
        tree = {
            "source": {"path": str(data / "train.jsonl"), "id_field": "id"},
            "samples": {"max_length": 256},
            "teacher": {"model": "given", "dtype": "bfloat16", "batch_positions": 1},
            **more,
        }
        out = folder / name.replace(" ", "-")
        capture(parse_config(CaptureConfig, tree), out, teacher=teacher)
        found[name] = open_store(out)
    return found


@torch.inference_mode()
def scores(
    stores: dict[str, Store], teacher: Teacher, positions: int
) -> tuple[dict[tuple[str, float], Score], dict[str, float], int]:
    """Run the teacher again over samples, whole rows, and judge every scheme by them; return scores and peers' bytes."""
    random = np.random.default_rng(0)
    found = {(name, t): Score() for name in (*stores, *PEERS) for t in TEMPERATURES}
    pieces: dict[str, list[list[Array]]] = {name: [] for name in PEERS}
    any_store = next(iter(stores.values()))
    count = 0
    for number in range(0, len(any_store), 3):
        sample = any_store[number]
        output = teacher.forward([np.asarray(sample.input_ids)[:-1]])
        for start in range(0, len(output.rows), 32):
            rows = output.rows[start : start + 32]
            z = (rows if output.head is None else output.head.logits(rows)).double().numpy()
            student = z + random.standard_normal(z.shape)
            one = softmax(z)
            given = {name: stored(store[number].targets[start : start + 32]) for name, store in stores.items()}
            for name, scheme in PEERS.items():
                given[name], arrays = scheme(one, random)
                pieces[name].append(arrays)
            for t in TEMPERATURES:
                p, s = softmax(z / t), softmax(student / t)
                for name, at in given.items():
                    found[name, t].add(at(t), p, s)
            count += len(z)
        if count >= positions:
            break
    return found, {name: peer_bytes(list_, any_store.vocab_size, count) for name, list_ in pieces.items()}, count


def main() -> None:
    """Capture, judge, write the table and the numbers for the picture."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--teacher", help="folder, hub name or GGUF; default: the demo's")
    parser.add_argument("--name", default="SmolLM2-135M-Instruct")
    parser.add_argument("--articles", type=int, default=170)
    parser.add_argument("--positions", type=int, default=1500)
    day = datetime.now(UTC).date().isoformat()
    parser.add_argument("--out", type=Path, default=Path(f"benchmarks/results/{day}-schemes.md"))
    arguments = parser.parse_args()
    tree = {"model": arguments.teacher or str(teacher_folder()), "dtype": "bfloat16"}
    base = {"source": {"path": "-"}, "teacher": tree}
    teacher = load_teacher(parse_config(CaptureConfig, base).teacher)
    with tempfile.TemporaryDirectory() as name:
        data = write_articles(Path(name) / "data", arguments.articles, 1)
        stores = stores_of(Path(name), teacher, data)
        found, sizes, count = scores(stores, teacher, arguments.positions)
        held = next(iter(stores.values())).num_positions
        sizes |= {one: column_bytes(store) for one, store in stores.items()}
    lines = [
        heading(f"Schemes for keeping a teacher's row: {arguments.name}"),
        f"V = {teacher.vocab_size:,}, bfloat16; bytes over {held:,} positions of articles, errors over {count:,} of them at whole rows in float64. "
        "`python benchmarks/schemes.py` repeats it; its head says what each scheme and column is.\n",
        "| scheme | bytes a position | " + " | ".join(f"T = {t:g}: KL | error | bias" for t in TEMPERATURES) + " |",
        "|---|---|" + "---|" * 3 * len(TEMPERATURES),
    ]
    table = {}
    for one in sorted(sizes, key=lambda name: sizes[name]):
        values = [found[one, t].row() for t in TEMPERATURES]
        table[one] = {"bytes": sizes[one], **{f"{t:g}": list(row) for t, row in zip(TEMPERATURES, values, strict=True)}}
        cells = " | ".join(f"{kl:.4f} | {error:.4f} | {bias:.4f}" for kl, error, bias in values).replace("inf", "∞")
        lines.append(f"| {one} | {sizes[one]:.1f} | {cells} |")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("\n".join(lines) + "\n")
    arguments.out.with_suffix(".json").write_text(
        json.dumps({"teacher": arguments.name, "schemes": table}, indent=1) + "\n"
    )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
