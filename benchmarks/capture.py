"""How much longer does a capture take than running the teacher alone over the same batches? And where does the rest go?

    python benchmarks/capture.py [--articles 60] [--rounds 3] [--out benchmarks/results/...md]

Bare: the model's own forward pass to its logits, in its dtype, on exactly the batches that the capture runs, each freed before the next. Capture: k = 64,
log-partition, the last hidden state, preset compact, to disk. Making samples, loading the model and the ranking of ids stand outside of both.
"""

import argparse
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import heading

from kdcache.capture import capture
from kdcache.capture.config import CaptureConfig
from kdcache.capture.rows import RowMaker
from kdcache.config import parse_config
from kdcache.demo import teacher_folder, write_articles
from kdcache.samples import SampleSet, prepare
from kdcache.sources import open_source
from kdcache.targets.measure import measure_rows
from kdcache.teachers import load_teacher, padded
from kdcache.teachers.transformers import TransformersTeacher


@torch.inference_mode()
def bare(model: Any, samples: SampleSet, batches: list[np.ndarray]) -> float:
    """Return the seconds of the model's own forward passes."""
    began = time.perf_counter()
    for batch in batches:
        ids, mask, _ = padded([samples[int(number)].tokens[:-1] for number in batch], torch.device("cpu"))
        model(input_ids=ids, attention_mask=mask.long())
    return time.perf_counter() - began


@torch.inference_mode()
def parts(
    teacher: TransformersTeacher, samples: SampleSet, batches: list[np.ndarray], k: int, fused: bool
) -> dict[str, float]:
    """Return the seconds of the body's forward pass, the product with the output layer, and the measuring."""
    spent = {"body": 0.0, "output layer": 0.0, "measuring": 0.0}
    for batch in batches:
        inputs = [samples[int(number)].tokens for number in batch]
        began = time.perf_counter()
        output = teacher.forward([one[:-1] for one in inputs], ["final"])
        spent["body"] += time.perf_counter() - began
        began = time.perf_counter()
        for start in range(0, len(output.rows), 341):
            output.head.logits(output.rows[start : start + 341])
        product = time.perf_counter() - began
        labels = torch.from_numpy(np.concatenate([one[1:] for one in inputs]))
        began = time.perf_counter()
        measure_rows(output.rows, labels, k=k, head=output.head, fused=fused)
        spent["output layer"] += product
        spent["measuring"] += time.perf_counter() - began - product
    return spent


def sides(config: CaptureConfig, folder: Path, rounds: int) -> tuple[list[str], int, int]:
    """Measure one config in turns; return the lines of its table, positions and batches."""
    teacher = load_teacher(config.teacher)
    assert isinstance(teacher, TransformersTeacher)
    tokenizer = teacher.tokenizer()
    samples = prepare(
        open_source(config.source),
        tokenizer,
        config.samples,
        limits=(teacher.max_length, teacher.vocab_size),
        identity={},
        folder=folder / "samples",
    )
    batches = list(RowMaker(config, teacher, samples)._batches(samples.lengths - 1))
    alone, whole, where = [], [], []
    for turn in range(-1, rounds):  # the first turn warms, and compiles
        found = (
            bare(teacher.model, samples, batches),
            capture(config, folder / f"store{turn}", teacher=teacher).seconds,
            parts(teacher, samples, batches, config.targets.k, config.targets.fused),
        )
        if turn >= 0:
            for kept, one in zip((alone, whole, where), found, strict=True):
                kept.append(one)
    ratios = sorted(b / a for a, b in zip(alone, whole, strict=True))
    rest = {key: statistics.median(one[key] for one in where) for key in where[0]}
    lines = [
        f"| bare teacher | {spread(alone)} |",
        f"| capture | {spread(whole)} |",
        f"| **capture / bare** | **{statistics.median(ratios):.3f}** ({ratios[0]:.3f} to {ratios[-1]:.3f}) |",
        *(f"| of it: {key} | {value:.2f} |" for key, value in rest.items()),
    ]
    return lines, samples.num_positions, len(batches)


def spread(seconds: list[float]) -> str:
    """Return the median and the range."""
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"


def main() -> None:
    """Measure in turns and write the results file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--articles", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    day = datetime.now(UTC).date().isoformat()
    parser.add_argument("--out", type=Path, default=Path(f"benchmarks/results/{day}-capture.md"))
    arguments = parser.parse_args()
    text = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_articles(folder / "data", arguments.articles, 1)
        for fused in (False, True):
            tree: dict[str, Any] = {
                "source": {"path": str(data / "train.jsonl"), "id_field": "id"},
                "samples": {"max_length": 256},
                "teacher": {
                    "model": str(teacher_folder()),
                    "dtype": "bfloat16",
                    "batch_positions": 2048,
                },
                "targets": {"k": 64, "fused": fused, "hidden": [{"layer": "final"}]},
            }
            config = parse_config(CaptureConfig, tree)
            lines, positions, batches = sides(config, folder / f"fused-{fused}", arguments.rounds)
            text += [
                f"\ntargets.fused = {str(fused).lower()}:\n\n| | seconds, median (lowest to highest) |\n|---|---|",
                *lines,
            ]
    head = [
        heading("Capture against the bare teacher"),
        f"SmolLM2-135M-Instruct in bfloat16, {positions:,} positions of articles in {batches} batches; {arguments.rounds} rounds in turns. "
        "`python benchmarks/capture.py` repeats it.",
    ]
    tail = "\nOn a CPU the measuring shares the cores with the teacher; on an accelerator it is memory-bound work beside matrix products. Not measured there yet."
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("\n".join([*head, *text, tail]) + "\n")
    print("\n".join([*head, *text, tail]))


if __name__ == "__main__":
    main()
