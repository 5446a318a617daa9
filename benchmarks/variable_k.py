"""Does it pay to keep as many logits as reach a share of the mass, rather than the same number everywhere?

    python benchmarks/variable_k.py [--positions 1500] [--out benchmarks/results/...md]

The gradient of the loss with the whole tail as one outcome, for a student one normal deviate of a nat off in every logit, against the exact gradient: the norm of the
difference over the norm of the gradient, both summed over positions. Float64, whole rows. The tail's mass is taken as exact on both sides.
"""

import argparse
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from machine import heading
from schemes import softmax

from kdcache.demo import articles, teacher_folder
from kdcache.teachers import TeacherConfig, load_teacher

TEMPERATURES = (1.0, 2.0, 4.0)
FIXED = (8, 16, 24, 32, 48, 64, 96, 128)
BY_MASS = [(cap, mass) for cap in (64, 128, 256) for mass in (0.8, 0.9, 0.95, 0.98)]


def main() -> None:
    """Measure and write the results file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--positions", type=int, default=1500)
    day = datetime.now(UTC).date().isoformat()
    parser.add_argument("--out", type=Path, default=Path(f"benchmarks/results/{day}-variable-k.md"))
    arguments = parser.parse_args()
    teacher = load_teacher(TeacherConfig(model=str(teacher_folder()), dtype="bfloat16"))
    tokenizer, random = teacher.tokenizer(), np.random.default_rng(0)
    sides = [f"k = {k}" for k in FIXED] + [f"mass {mass:g}, at most {cap}" for cap, mass in BY_MASS]
    wrong, kept = np.zeros((len(sides), len(TEMPERATURES))), np.zeros(len(sides))
    norms, count = np.zeros(len(TEMPERATURES)), 0
    for article in articles():
        ids = np.asarray(tokenizer(article["text"])["input_ids"][:128])
        if len(ids) < 32:
            continue
        output = teacher.forward([ids[:-1]])
        assert output.head is not None
        with torch.inference_mode():
            z = output.head.logits(output.rows).double().numpy()
        z = -np.sort(-z, axis=1)
        student = z + random.standard_normal(z.shape)
        mass = softmax(z).cumsum(1)
        many = [np.full(len(z), k) for k in FIXED] + [np.minimum(cap, (mass < m).sum(1) + 1) for cap, m in BY_MASS]
        for column, temperature in enumerate(TEMPERATURES):
            p, q = softmax(z / temperature), softmax(student / temperature)
            norms[column] += np.linalg.norm(q - p, axis=1).sum()
            for row, k in enumerate(many):
                head = np.arange(z.shape[1]) < k[:, None]
                tails = (p * ~head).sum(1, keepdims=True) / np.maximum((q * ~head).sum(1, keepdims=True), 1e-300)
                wrong[row, column] += np.linalg.norm(np.where(head, 0, q * tails - p), axis=1).sum()
        kept += [k.sum() for k in many]
        count += len(z)
        if count >= arguments.positions:
            break
    lines = [
        heading("As many logits everywhere, or as many as reach a share of the mass"),
        f"SmolLM2-135M-Instruct in bfloat16, V = 49,152, {count:,} positions of articles. Error of the gradient, by temperature. `python benchmarks/variable_k.py` repeats it.\n",
        "| kept | mean k | " + " | ".join(f"T = {t:g}" for t in TEMPERATURES) + " |",
        "|---|---|" + "---|" * len(TEMPERATURES),
    ]
    for row in np.argsort(kept, kind="stable"):
        cells = " | ".join(f"{one:.4f}" for one in wrong[row] / norms)
        lines.append(f"| {sides[row]} | {kept[row] / count:.1f} | {cells} |")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
