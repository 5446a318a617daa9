"""Run the chain once a seed and write what it measured as one table: about two CPU minutes a seed.

    python -m pipelines.digits_chain.run [--out runs/digits_chain] [--seeds 0 1 2]

Stopped, the same command goes on.
"""

import argparse
from pathlib import Path

from kdcache.chain import ChainConfig, run_chain
from kdcache.config import load_config
from kdcache.metrics import summary
from pipelines.digits_chain.prepare import prepare

ROWS = {
    "teacher": "teacher, labels alone",
    "born-1": "born again, generation 1",
    "born-2": "born again, generation 2",
    "assistant": "assistant, from the teacher",
    "hard": "student, labels alone",
    "from-teacher": "student, from the teacher",
    "from-assistant": "student, from the assistant",
    "from-ensemble": "student, from teacher and born again",
}
COLUMNS = {"accuracy": "accuracy", "cross_entropy": "cross-entropy, nats", "kl": "KL to the teacher, nats"}


def main() -> None:
    """Prepare the digits, run the chains, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=Path("runs/digits_chain"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    out: Path = arguments.out
    prepare(Path("runs/digits_chain/data"), 2000)  # the folder that the chain names
    file = Path(__file__).with_name("chain.yaml")
    chains = [
        run_chain(load_config(ChainConfig, file, [f"base.train.run.seed={seed}"]), out / str(seed))
        for seed in arguments.seeds
    ]
    lines = [["", "parameters", *COLUMNS.values(), "accuracy, seed by seed"]]
    lines.append(["---"] * len(lines[0]))
    for name, said in ROWS.items():
        step = f"born-measured-{name[-1]}" if name.startswith("born") else f"{name}-measured"
        found = [chain[step] for chain in chains]
        cells = []
        for key in COLUMNS:
            spread = summary([float(one[key]) for one in found])
            cells.append(f"{spread.mean:.4f} ± {spread.deviation or 0:.4f}")
        each = ", ".join(f"{one['accuracy']:.4f}" for one in found)
        lines.append([said, f"{found[0]['parameters']:,}", *cells, each])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
    (out / "table.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
