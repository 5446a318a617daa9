"""Cached against online against hard labels: the same student, batches, order and step function.

    python benchmarks/cached_vs_online.py [--rounds 5] [--steps 6] [--out benchmarks/results/...md]

One process holds all sides and takes turns (round by round, in changing order), so that what the machine does otherwise
falls on all of them; a step is `Objective` forward, backward and AdamW. Medians with the 20th and 80th percentile. Peak memory
is not shared out inside one process: `kdcache demo` measures it a process at a time. The last column is the number of passes over the data (epochs, of
one student or of several) after which capture and cached training together took less time than online training.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch
from machine import heading

from kdcache.batch import Batch
from kdcache.capture import capture
from kdcache.capture.config import CaptureConfig
from kdcache.config import parse_config
from kdcache.demo import teacher_folder, write_articles
from kdcache.online import online_targets
from kdcache.store import Store, open_store
from kdcache.stream import Loader, StreamConfig
from kdcache.teachers import TeacherConfig, load_teacher
from kdcache.train.config import LossConfig, StudentConfig
from kdcache.train.objective import Objective
from kdcache.train.student import build_student

STUDENTS = {"small": (96, 2), "demo": (160, 3), "larger": (320, 6)}


class Side:
    """One way to train: its own student, its own stream, the same order."""

    def __init__(self, store: Store, size: tuple[int, int], loss: LossConfig, fill: Callable[[Batch], Batch] | None):
        width, layers = size
        config = {
            "model_type": "llama",
            "hidden_size": width,
            "intermediate_size": 3 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 32,
            "num_key_value_heads": width // 32,
            "tie_word_embeddings": True,
        }
        student = build_student(StudentConfig(config=config), store, seed=0)
        self.objective = Objective(loss, student, store, live=fill is not None)
        self.optimizer = torch.optim.AdamW(self.objective.parameters(), lr=1e-4)
        self.fill = fill
        self.alpha = float(loss.alpha)  # type: ignore[arg-type]
        targets = self.alpha > 0 and fill is None
        self.batches = _endless(Loader(store, StreamConfig(batch_size=8, targets=targets)))
        self.parameters = sum(one.numel() for one in student.parameters())

    def step(self) -> tuple[float, float, int]:
        """Do a step; return its seconds, those spent waiting for data, and its positions."""
        began = time.perf_counter()
        batch = next(self.batches)
        waited = time.perf_counter() - began
        if self.fill is not None:
            batch = self.fill(batch)
        terms = self.objective(batch, self.alpha, 1.0, float(batch.mask.sum()))
        terms["loss"].backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - began, waited, batch.num_positions


def _endless(loader: Loader) -> Iterator[Batch]:
    while True:  # every epoch reads and decodes the store again
        yield from loader


def measure(store: Store, teacher_path: str, rounds: int, steps: int, capture_seconds: float) -> list[str]:
    """Return the table's lines for every student; `capture_seconds` a position were spent once, before."""
    teacher = load_teacher(TeacherConfig(model=teacher_path, dtype="bfloat16"))
    lines = []
    for name, size in STUDENTS.items():
        sides = {
            "hard labels": Side(store, size, LossConfig(alpha=0.0), None),
            "cached": Side(store, size, LossConfig(alpha=1.0), None),
            "online, k = 64": Side(store, size, LossConfig(alpha=1.0), online_targets(teacher, k=store.k)),
            "online, whole": Side(store, size, LossConfig(alpha=1.0, tail="exact"), online_targets(teacher, k=None)),
        }
        per_position: dict[str, list[float]] = {side: [] for side in sides}
        waits: dict[str, list[float]] = {side: [] for side in sides}
        for side in sides.values():
            side.step()
        for turn in range(rounds):
            order = list(sides)
            random.Random(turn).shuffle(order)
            for side in order:
                for _ in range(steps):
                    seconds, waited, positions = sides[side].step()
                    per_position[side].append(seconds / positions)
                    waits[side].append(waited / seconds)
        hard = statistics.median(per_position["hard labels"])
        cached = statistics.median(per_position["cached"])
        for side, values in per_position.items():
            cuts = statistics.quantiles(values, n=5)
            middle = statistics.median(values)
            parameters = sides[side].parameters / 1e6
            pays = f"{capture_seconds / (middle - cached):.2f}" if side.startswith("online") else ""
            lines.append(
                f"| {name}, {parameters:.1f}M | {side} | {middle * 1e6:.0f} ({cuts[0] * 1e6:.0f} to {cuts[3] * 1e6:.0f}) "
                f"| {1 / middle:,.0f} | {middle / hard:.2f} | {middle / cached:.2f} | {statistics.median(waits[side]):.2%} | {pays} |"
            )
    return lines


def main() -> None:
    """Capture, measure, write the results file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--articles", type=int, default=120)
    day = datetime.now(UTC).date().isoformat()
    parser.add_argument("--out", type=Path, default=Path(f"benchmarks/results/{day}-cached-vs-online.md"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = write_articles(Path(folder) / "data", arguments.articles, 10)
        teacher_path = str(teacher_folder())
        tree = {
            "source": {"path": str(data / "train.jsonl"), "id_field": "id"},
            "samples": {"max_length": 256},
            "teacher": {"model": teacher_path, "dtype": "bfloat16"},
            "targets": {"k": 64},
        }
        made = capture(parse_config(CaptureConfig, tree), Path(folder) / "store")
        store = open_store(Path(folder) / "store")
        lines = [
            heading("Cached against online against hard labels"),
            f"SmolLM2-135M-Instruct in bfloat16 over {store.num_positions:,} positions of articles, k = 64, bucket tail; students "
            f"Llama, V = {store.vocab_size:,}, float32, batches of 8 samples. {arguments.rounds} rounds of {arguments.steps} steps a side, "
            "interleaved; microseconds a position: median (20th to 80th percentile). The capture itself ran at "
            f"{made.positions_per_second:,.0f} positions/s. `python benchmarks/cached_vs_online.py` repeats it.\n",
            "| student | side | us a position | positions/s | / hard labels | / cached | data wait | capture pays after, passes over the data |",
            "|---|---|---|---|---|---|---|---|",
            *measure(store, teacher_path, arguments.rounds, arguments.steps, 1 / made.positions_per_second),
        ]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
