"""What the student's loss takes at a large vocabulary: memory beside weights and gradients, and time.

    python benchmarks/loss.py [--vocabulary 262144] [--positions 4096] [--width 640] [--rounds 3] [--out benchmarks/results/...md]

Forward and backward from the last hidden state to the gradients of hidden state and output layer, float32. kdcache: the fused layer with head, bucket and
label. Beside it: cross-entropy in chunks with recomputation (what a careful training loop does), dense cross-entropy, and dense KL against a
full teacher row, as far as they fit. Each run is a process of its own; extra memory is its peak less inputs, weights and gradients.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

CHUNK = 128


def fused(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """kdcache: head of 64, bucket, label."""
    from kdcache.losses import divergence
    from kdcache.losses.cross_entropy import cross_entropy
    from kdcache.losses.output_layer import log_partition, output_layer, suitable_chunk
    from kdcache.losses.tails import policy
    from kdcache.targets.tensor import OutputHead, TensorTargets

    rows, size = len(hidden), len(weight)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, size // 64, (rows, 64), generator=generator) + torch.arange(64) * (size // 64)
    logits = torch.randn(rows, 64, generator=generator).sort(1, descending=True).values
    targets = TensorTargets(ids, logits, torch.full((rows, 8), 5.0), logits[:, 0], size)
    head, extra, rest = output_layer(
        hidden, OutputHead(weight), ids, labels[:, None], (1.0,), chunk=suitable_chunk(size, hidden.device)
    )
    kl = divergence("forward_kl")(policy("bucket")(targets, head, rest[:, 0], 1.0))
    return 0.9 * kl.mean() + 0.1 * cross_entropy(extra[:, 0], log_partition(head, rest[:, 0], 1.0)).mean()


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in chunks, whose logits are made again in the backward pass."""

    def part(rows: Tensor, ids: Tensor) -> Tensor:
        return functional.cross_entropy(functional.linear(rows, weight), ids, reduction="sum")

    total = hidden.new_zeros(())
    for start in range(0, len(hidden), CHUNK):
        here = slice(start, start + CHUNK)
        total = total + checkpoint(part, hidden[here], labels[here], use_reentrant=False)
    return total / len(hidden)


def dense_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy over all rows at once."""
    return functional.cross_entropy(functional.linear(hidden, weight), labels)


def dense_kl(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """KL against a full teacher row a position."""
    teacher = torch.randn(len(hidden), len(weight), generator=torch.Generator().manual_seed(0)).log_softmax(1)
    return functional.kl_div(
        functional.linear(hidden, weight).log_softmax(1), teacher, log_target=True, reduction="batchmean"
    )


SIDES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "kdcache, fused": fused,
    "cross-entropy, chunked": chunked_cross_entropy,
    "cross-entropy, dense": dense_cross_entropy,
    "KL, dense": dense_kl,
}


def measure(side: str, size: int, positions: int, width: int) -> dict[str, float]:
    """Return seconds of a forward and backward pass, and extra bytes."""
    from kdcache.process import peak_memory_bytes

    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(size, width).normal_(0, 0.02, generator=generator).requires_grad_()
    labels = torch.randint(0, size, (positions,), generator=generator)
    small = torch.randn(64, width, generator=generator).requires_grad_()
    SIDES[side](small, weight, labels[:64]).backward()  # libraries and threads are there, gradients allocated
    hidden = torch.randn(positions, width, generator=generator).requires_grad_()
    weight.grad = None
    status = Path("/proc/self/status").read_text()
    before = int(next(line for line in status.splitlines() if line.startswith("VmRSS:")).split()[1]) * 1024
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again from here
    began = time.perf_counter()
    SIDES[side](hidden, weight, labels).backward()
    seconds = time.perf_counter() - began
    gradients = 4 * (weight.numel() + hidden.numel())
    return {"seconds": seconds, "extra_bytes": peak_memory_bytes() - before - gradients}


def main() -> None:
    """Measure in turns and write the results file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--vocabulary", type=int, default=262144)
    parser.add_argument("--positions", type=int, default=4096)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", metavar="SIDE")
    day = datetime.now(UTC).date().isoformat()
    parser.add_argument("--out", type=Path, default=Path(f"benchmarks/results/{day}-loss.md"))
    arguments = parser.parse_args()
    sizes = (arguments.vocabulary, arguments.positions, arguments.width)
    if arguments.one:
        print(json.dumps(measure(arguments.one, *sizes)))
        return
    from machine import heading

    found: dict[str, list[dict[str, float]]] = {}
    failed: dict[str, str] = {}
    for turn in range(arguments.rounds):
        order = list(SIDES)[turn % len(SIDES) :] + list(SIDES)[: turn % len(SIDES)]
        for side in order:
            if side in failed:
                continue
            own = [f"--{name}={value}" for name, value in zip(("vocabulary", "positions", "width"), sizes, strict=True)]
            done = subprocess.run(
                [sys.executable, __file__, "--one", side, *own], capture_output=True, text=True, check=False
            )
            if done.returncode:
                failed[side] = f"exit code {done.returncode}"
                continue
            found.setdefault(side, []).append(json.loads(done.stdout))
    base = statistics.median(one["seconds"] for one in found["cross-entropy, chunked"])
    lines = [
        heading("The student's loss at a large vocabulary"),
        f"V = {sizes[0]:,}, {sizes[1]:,} positions, width {sizes[2]}, float32; forward and backward, medians of {arguments.rounds} processes taken in turns (lowest to highest). "
        "`python benchmarks/loss.py` repeats it.\n",
        "| side | seconds | / chunked cross-entropy | extra memory, MB |",
        "|---|---|---|---|",
    ]
    for side, runs in found.items():
        seconds, extra = sorted(one["seconds"] for one in runs), statistics.median(one["extra_bytes"] for one in runs)
        middle = statistics.median(seconds)
        lines.append(
            f"| {side} | {middle:.2f} ({seconds[0]:.2f} to {seconds[-1]:.2f}) | {middle / base:.2f} | {extra / 1e6:,.0f} |"
        )
    lines += [f"\n- {side} did not finish: {why}." for side, why in failed.items()]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
