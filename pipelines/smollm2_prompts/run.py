"""Students of the references, of the answers that the demo's teacher gives to prompts, and of its logits of those.

    python pipelines/smollm2_prompts/run.py [--out runs/smollm2_prompts] [--prompts 80] [--held-out 40] [--seeds 3]

Needs `make models`. Stopped, the same command goes on. Ends in the table of the README beside this file, written to
`table.md` and `results.json`.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from kdcache import display
from kdcache.capture import capture
from kdcache.capture.config import CaptureConfig
from kdcache.config import load_config
from kdcache.demo import articles, teacher_folder
from kdcache.generate import GenerateConfig, GenerateResult, generate
from kdcache.generate.report import Row, likeness, score
from kdcache.metrics import rouge, summary
from kdcache.process import machine
from kdcache.train import train
from kdcache.train.config import TrainConfig

HERE = Path(__file__).parent
VARIANTS = {
    "hard labels (references)": ("references", 0.0),
    "sequence level (the teacher's answers)": ("answers", 0.0),
    "token level (its distribution there)": ("answers", 1.0),
}
"""Store and alpha: how the articles go on, what the teacher says, and its distribution at the same tokens."""


def prompts() -> Iterator[dict[str, str]]:
    """Yield {id, prompt, completion} of the articles that begin with "TITLE is": the title, and how it goes on."""
    for article in articles():
        title, text = article["id"], article["text"]
        if text.startswith(f"{title} is "):
            yield {
                "id": title,
                "prompt": title,
                "completion": text.removeprefix(f"{title} is ").split(". ")[0].strip("."),
            }


def write_prompts(folder: Path, train_on: int, held_out: int) -> None:
    """Write train.jsonl and held-out.jsonl, no title in both; the held-out ones come first, whatever `train_on` is."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(one, ensure_ascii=False) for one in islice(prompts(), held_out + train_on)]
    (folder / "held-out.jsonl").write_text("\n".join(lines[:held_out]) + "\n")
    (folder / "train.jsonl").write_text("\n".join(lines[held_out:]) + "\n")


def answers(out: Path, name: str, teacher: str) -> GenerateResult:
    """Return what came of asking the teacher the prompts of a name."""
    overrides = [f"source.path={out / 'prompts' / name}.jsonl", f"teacher.model={teacher}"]
    config = load_config(GenerateConfig, HERE / "generate.yaml", overrides)
    with display.count_progress(f"answers, {name}", quiet=False) as progress:
        return generate(config, out / f"{name}-answers.jsonl", progress=progress)


def references(answered: Path, path: Path) -> Path:
    """Write the references of the prompts that the teacher answered, in place of its answers; return the file."""
    lines = [json.loads(line) for line in answered.read_text().splitlines()]
    kept = [{name: one[name] for name in ("id", "prompt")} | {"completion": f" {one['reference']}"} for one in lines]
    path.write_text("\n".join(json.dumps(one, ensure_ascii=False) for one in kept) + "\n")
    return path


def one_for_all(train_answers: Path, held_out: Path) -> Row:
    """Return the floor: the training answer that is most like the others, given to every prompt."""
    known = [json.loads(line)["completion"] for line in train_answers.read_text().splitlines()]
    lines = [json.loads(line) for line in held_out.read_text().splitlines()]
    best = max(known[:100], key=lambda one: rouge([one] * len(known[:100]), known[:100]).rouge_l)
    said, references = ([one[name] for one in lines] for name in ("completion", "reference"))
    same = [best] * len(lines)
    return Row(f'always "{best.strip()}"', likeness(same, said), likeness(same, references), 0.0, 1.0, None)


def table(rows: Sequence[Row]) -> str:
    """Return Markdown: mean and, over several seeds, standard deviation of each way; names end in the seed."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.name.split(", seed")[0], []).append(row)
    head = ["answers", "BLEU to teacher", "ROUGE-1", "ROUGE-2", "ROUGE-L", "BLEU to reference", "ROUGE-L", "ended"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name, group in groups.items():
        cells = []
        for other, metrics in (
            ("teacher", ("bleu", "rouge1", "rouge2", "rouge_l")),
            ("reference", ("bleu", "rouge_l")),
        ):
            found = [getattr(one, other) for one in group]
            for metric in metrics:
                scale = 1 if metric == "bleu" else 100
                cells.append("" if None in found else spread([scale * getattr(one, metric) for one in found]))
        lines.append([name, *cells, spread([one.ended for one in group], 2)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Return mean ± standard deviation, or the one value."""
    found = summary(values)
    return f"{found.mean:.{digits}f}" + (f" ± {found.deviation:.{digits}f}" if found.deviation is not None else "")


def main() -> None:
    """Ask, capture, train all ways, compare on prompts that no student has seen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2_prompts"))
    parser.add_argument("--prompts", type=int, default=80, help="to train on")
    parser.add_argument("--held-out", type=int, default=40, help="to measure on")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="laid over train.yaml")
    arguments = parser.parse_args()
    out, teacher = arguments.out, str(teacher_folder())
    write_prompts(out / "prompts", arguments.prompts, arguments.held_out)
    made: dict[str, Any] = {name: answers(out, name, teacher).as_dict() for name in ("held-out", "train")}
    for name, one in made.items():
        display.say(f"{name}: {one}")
    answered = Path(made["train"]["path"])
    captured = {}
    for name, path in (("answers", answered), ("references", references(answered, out / "references.jsonl"))):
        overrides = [f"source.path={path}", f"teacher.model={teacher}"]
        captured[name] = capture(load_config(CaptureConfig, HERE / "capture.yaml", overrides), out / name)
        display.say(f"{name}: {captured[name].positions:,} positions")
    students, seconds = {}, {}
    for seed in range(arguments.seeds):
        for name, (store, alpha) in VARIANTS.items():
            keys = [f"student.model={teacher}", f"loss.alpha={alpha}", f"run.seed={seed}", *arguments.set]
            folder = out / f"{store}-alpha{alpha:g}-seed{seed}"
            done = train(load_config(TrainConfig, HERE / "train.yaml", keys), out / store, folder)
            students[f"{name}, seed {seed}"], seconds[f"{name}, seed {seed}"] = folder, done.seconds
    report = score(students, made["held-out"]["path"])
    floor = one_for_all(Path(made["train"]["path"]), Path(made["held-out"]["path"]))
    shown = table([report.rows[0], floor, *report.rows[1:]])
    (out / "table.md").write_text(shown)
    result = {
        "answers": made,
        "capture": {name: one.as_dict() for name, one in captured.items()},
        "train_seconds": seconds,
        "report": report.as_dict(),
        "floor": asdict(floor),
        "machine": machine(),
    }
    (out / "results.json").write_text(json.dumps(result, indent=2))
    print(shown)


if __name__ == "__main__":
    main()
