"""How right are the stored targets? Log-partition, tail mass and kept probabilities against the teacher's whole rows.

    python benchmarks/fidelity.py [--positions 3000] [--out benchmarks/results/...md]

On held-out articles of the demo, through the codecs, at temperatures on and off the nodes. Dense float64 is the judge.
"""

import argparse
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from machine import heading

from kdcache.codecs import codec
from kdcache.demo import articles, teacher_folder
from kdcache.targets import Targets
from kdcache.targets.log_partition import dequantise, quantise
from kdcache.targets.measure import measure_rows
from kdcache.teachers import TeacherConfig, load_teacher

TEMPERATURES = (0.3, 0.5, 0.6, 0.7, 0.85, 1, 1.25, 1.5, 1.75, 2, 2.4, 3, 4, 5, 6, 8, 20)
BAR = (0.5, 0.7, 1, 1.5, 2, 3, 4, 8)


def rows_of(positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits [N, V] and labels of held-out articles, a window of at most 256 tokens each."""
    teacher = load_teacher(TeacherConfig(model=str(teacher_folder()), dtype="bfloat16"))
    tokenizer = teacher.tokenizer()
    parts, labels, count = [], [], 0
    for article in articles():
        ids = np.asarray(tokenizer(article["text"])["input_ids"][:256])
        if len(ids) < 32:
            continue
        output = teacher.forward([ids[:-1]])
        assert output.head is not None
        with torch.inference_mode():
            parts.append(output.head.logits(output.rows))
        labels.append(torch.from_numpy(ids[1:]))
        count += len(ids) - 1
        if count >= positions:
            break
    return torch.cat(parts)[:positions], torch.cat(labels)[:positions]


def through_codec(targets: Targets, name: str) -> Targets:
    """Return the targets as a store gives them back."""
    kept = codec(name)
    logits = kept.decode(kept.encode(targets.logits))
    return Targets(targets.ids, logits, dequantise(quantise(targets.tail)), targets.label_logit, targets.vocab_size)


Errors = tuple[float, float, float, float, float]


def errors(sides: dict[str, Targets], dense: torch.Tensor, temperature: float) -> dict[str, Errors]:
    """Return, for each codec, mean and worst tail-mass error, and mean, 99.9 % and worst relative error of kept ids."""
    tails: dict[str, list[np.ndarray]] = {name: [] for name in sides}
    relative: dict[str, list[np.ndarray]] = {name: [] for name in sides}
    for start in range(0, len(dense), 64):
        scaled = dense[start : start + 64].double() / temperature
        whole = torch.logsumexp(scaled, 1, keepdim=True)
        ids = torch.from_numpy(next(iter(sides.values())).ids[start : start + 64].astype(np.int64))
        kept = torch.exp(scaled.gather(1, ids) - whole).numpy()
        mass = torch.exp(torch.logsumexp(scaled.scatter(1, ids, -torch.inf), 1) - whole[:, 0]).numpy()
        for name, targets in sides.items():
            some = targets[start : start + 64]
            tails[name].append(np.abs(some.tail_mass(temperature) - mass))
            ours = some.probabilities(temperature)
            relative[name].append(np.abs(ours / np.maximum(kept, 1e-300) - 1)[kept > 1e-30])
    found = {}
    for name in sides:
        tail, rest = np.concatenate(tails[name]), np.concatenate(relative[name])
        found[name] = (tail.mean(), tail.max(), rest.mean(), float(np.quantile(rest, 0.999)), rest.max())
    return found


def main() -> None:
    """Measure and write the results file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--positions", type=int, default=2000)
    parser.add_argument("--k", type=int, default=64)
    day = datetime.now(UTC).date().isoformat()
    parser.add_argument("--out", type=Path, default=Path(f"benchmarks/results/{day}-fidelity.md"))
    arguments = parser.parse_args()
    dense, labels = rows_of(arguments.positions)
    whole = measure_rows(dense, labels, k=arguments.k).numpy()
    lines = [
        heading("Fidelity of stored targets"),
        f"SmolLM2-135M-Instruct in bfloat16, {len(dense)} positions of held-out articles, V = {dense.shape[1]}, "
        f"k = {arguments.k}; log-partition 16 bytes a position. Judged by float64 over whole rows. "
        "`python benchmarks/fidelity.py` repeats it. Bold temperatures are those of the bar; T = 8, 4, 2, 1, 0.5 are nodes.\n",
        "| T | tail mass, mean error | worst | levels: kept p, mean relative error | 99.9 % | worst "
        "| steps8: mean | 99.9 % | worst |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    compact = {name: through_codec(whole, name) for name in ("levels", "steps8")}
    table = {}
    for temperature in TEMPERATURES:
        table[temperature] = errors(compact, dense, temperature)
        fine, coarse = table[temperature]["levels"], table[temperature]["steps8"]
        mark = "**" if temperature in BAR else ""
        lines.append(
            f"| {mark}{temperature}{mark} | {fine[0]:.2e} | {fine[1]:.2e} | {fine[2]:.2e} | {fine[3]:.2e} | {fine[4]:.2e} "
            f"| {coarse[2]:.2e} | {coarse[3]:.2e} | {coarse[4]:.2e} |"
        )
    worst = {key: max(table[t]["levels"][i] for t in BAR) for i, key in enumerate(("mean", "worst"))}
    kept = {name: max(table[t][name][4] for t in BAR) for name in ("levels", "steps8")}
    lines.append(
        f"\nOver the bar's temperatures: tail mass, mean {worst['mean']:.1e} (asked 1e-3), worst {worst['worst']:.1e} (asked 2e-2); "
        f"kept probabilities, worst {kept['levels']:.2%} with levels of 1/128 nat (asked 1 %), {kept['steps8']:.2%} with steps8 (asked 3 %)."
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
