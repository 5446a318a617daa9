"""The same student trained several ways on the same data, ending in one table.

Every step (capture, train, evaluate) is a `kdcache` command in a process of its own: peak memory is measured a
process at a time, and the process that trains from a store cannot hold a teacher that another step loaded. A finished
step is kept under `steps/` and not run again, so a stopped comparison goes on where it was.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from kdcache import display
from kdcache.config import Section
from kdcache.errors import KdcacheError
from kdcache.fingerprint import digest_json
from kdcache.process import machine

COLUMNS = ("", "held-out perplexity", "KL to teacher", "same top-1", "tokens/s", "step ms", "peak memory")


class Variant(Section):
    """One way to train the student.

    Attributes:
        name: What the table calls it.
        train: Keys laid over the recipe's `train`.
        online: Run the live teacher in every step instead of reading its targets.
    """

    name: str
    train: dict[str, Any] = Field(default_factory=dict)
    online: bool = False


class CompareConfig(Section):
    """A recipe: one capture, one held-out capture, one student, several ways to train it.

    Attributes:
        title: Heading of the table.
        capture: A capture config.
        held_out: Keys laid over `capture` for the store that students are measured on.
        train: A training config.
        variants: The ways to train.
        seeds: Every variant is trained once for each.
    """

    title: str
    capture: dict[str, Any]
    held_out: dict[str, Any]
    train: dict[str, Any]
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...] = (0,)


@dataclass(frozen=True, slots=True)
class _Steps:
    folder: Path
    quiet: bool

    def run(self, name: str, config: dict[str, Any] | None, arguments: Sequence[str]) -> dict[str, Any]:
        """Return the JSON a command printed, from its earlier run if config and arguments are the same."""
        identity = digest_json({"config": config, "arguments": list(arguments)})
        kept = self.folder / "steps" / f"{name}.json"
        if kept.is_file():
            earlier: dict[str, Any] = json.loads(kept.read_text())
            if earlier["identity"] == identity:
                return dict(earlier["result"])
        display.say(f"== {name}")
        kept.parent.mkdir(parents=True, exist_ok=True)
        command, *rest = arguments
        line = [sys.executable, "-m", "kdcache", command]
        if config is not None:
            path = kept.with_suffix(".yaml")
            path.write_text(yaml.safe_dump(config, sort_keys=False))
            line.append(str(path))
        line += [*rest, "--json"]
        if self.quiet and command != "info":
            line.append("--quiet")
        began = time.perf_counter()
        done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise _failure(name, done)
        result: dict[str, Any] = json.loads(done.stdout)
        result["wall_seconds"] = round(time.perf_counter() - began, 2)
        kept.write_text(json.dumps({"identity": identity, "result": result}, indent=2))
        return result


class StepError(KdcacheError):
    """A step of a comparison ended with an error; its own message says why."""

    code = "KD800"


def compare(config: CompareConfig, out: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Run a recipe and return its table with every measurement behind it, also written to `out/results.json`.

    Returns:
        title, columns, rows (texts), notes, machine, and `measurements` with all numbers: perplexities,
        KL in nats a position, seconds, bytes.

    Raises:
        StepError: A command failed; everything finished before it is kept.
    """
    steps = _Steps(out, quiet)
    store, held_out = out / "store", out / "held-out"
    captured = steps.run("capture", config.capture, ["capture", "--out", str(store)])
    held = steps.run(
        "capture-held-out", _laid_over(config.capture, config.held_out), ["capture", "--out", str(held_out)]
    )
    info = steps.run("info", None, ["info", str(store)])
    runs: dict[str, list[dict[str, Any]]] = {}
    for seed in config.seeds:
        for variant in config.variants:
            name = f"{variant.name.replace(' ', '-')}-seed{seed}"
            keys = _laid_over(_laid_over(config.train, variant.train), {"run": {"seed": seed}})
            arguments = ["train", "--store", str(store), "--out", str(out / name)]
            if variant.online:
                arguments += ["--teacher", str(config.capture["teacher"]["model"])]
            trained = steps.run(f"train-{name}", keys, arguments)
            measured = steps.run(f"eval-{name}", None, ["eval", str(out / name), "--store", str(held_out)])
            runs.setdefault(variant.name, []).append({"train": trained, "eval": measured, "seed": seed})
    result = _table(config, captured, held, info, runs)
    (out / "results.json").write_text(json.dumps(result, indent=2))
    return result


def _table(
    config: CompareConfig,
    captured: dict[str, Any],
    held: dict[str, Any],
    info: dict[str, Any],
    runs: dict[str, list[dict[str, Any]]],
) -> dict[str, Any]:
    first = next(iter(runs.values()))[0]["eval"]
    rows = [
        [
            "teacher",
            "?" if first["teacher_perplexity"] is None else f"{first['teacher_perplexity']:.1f}",
            "0",
            "1",
            f"{captured['positions_per_second']:,.0f}",
            "",
            display.size(captured["peak_memory_bytes"]),
        ]
    ]
    for name, seeds in runs.items():
        rows.append(
            [
                name,
                _spread([run["eval"]["perplexity"] for run in seeds], 1),
                _spread([run["eval"]["kl"] for run in seeds], 3),
                _spread([run["eval"]["top1_agreement"] for run in seeds], 3),
                _spread([run["train"]["tokens_per_second"] for run in seeds], 0),
                _spread([run["train"]["step_seconds"] * 1000 for run in seeds], 0),
                _spread([run["train"]["peak_memory_bytes"] / 1e6 for run in seeds], 0) + " MB",
            ]
        )
    host = machine()
    notes = [
        f"machine: {host['processor']}, {host['cores']} cores; Python {host['python']}",
        f"store: {info['positions']:,} positions, {info['bytes_per_position']:.1f} bytes a position, "
        f"k = {info['k']}, digest {info['digest'][:12]}; held out: {held['positions']:,} positions; "
        f"KL is {first['kl_kind']}, in nats a position",
        *_ratios(config, captured, runs),
    ]
    return {
        "title": config.title,
        "columns": list(COLUMNS),
        "rows": rows,
        "notes": notes,
        "machine": host,
        "measurements": {"capture": captured, "held_out": held, "store": info, "runs": runs},
    }


def _ratios(config: CompareConfig, captured: dict[str, Any], runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Cached against hard labels and against online: step time, and runs until the capture has paid."""

    def median(name: str, key: str) -> float:
        return statistics.median(float(run["train"][key]) for run in runs[name])

    online = [variant.name for variant in config.variants if variant.online]
    cached = [v.name for v in config.variants if not v.online and "hard" not in v.name]
    hard = [v.name for v in config.variants if "hard" in v.name]
    notes = []
    for name in cached:
        for other in hard:
            ratio = median(name, "step_seconds") / median(other, "step_seconds")
            notes.append(f"step time, {name} / {other}: {ratio:.2f}")
        for other in online:
            speed = median(name, "tokens_per_second") / median(other, "tokens_per_second")
            saved = median(other, "wall_seconds") - median(name, "wall_seconds")
            paid = f"{captured['wall_seconds'] / saved:.1f} runs" if saved > 0 else "never"
            notes.append(f"throughput, {name} / {other}: {speed:.2f}; the capture has paid after {paid}")
        if any(run["train"]["teacher_in_memory"] for run in runs[name]):
            raise StepError(f"The process that trained {name!r} imported a teacher.", where=name)
        notes.append(f"{name}: no teacher module was imported by the training process (checked)")
    return notes


def _spread(values: list[float], digits: int) -> str:
    middle = f"{statistics.fmean(values):,.{digits}f}"
    return f"{middle} ± {statistics.stdev(values):,.{digits}f}" if len(values) > 1 else middle


def _laid_over(tree: dict[str, Any], keys: dict[str, Any]) -> dict[str, Any]:
    merged = dict(tree)
    for key, value in keys.items():
        below = merged.get(key)
        merged[key] = _laid_over(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _failure(name: str, done: "subprocess.CompletedProcess[str]") -> StepError:
    what, hint = f"The step {name!r} ended with exit code {done.returncode}.", "Its message stands above."
    try:
        error = json.loads(done.stdout)
        what, hint = f"The step {name!r} failed: {error['what']}", str(error["next"])
    except (ValueError, KeyError, TypeError):
        pass  # it died before it could print an error object; the exit code is all there is
    return StepError(what, hint=hint)
