"""What a run writes down of its steps: a line each in `metrics.jsonl`, and the sums that its report is made of."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdcache.train.result import METRICS, TrainProgress


class Record:
    """The steps of this process, and the lines of those before it.

    Args:
        root: The run's folder.
        writes: Whether this rank writes.
        progress: Called after every step, where this rank writes.
    """

    def __init__(self, root: Path, *, writes: bool, progress: Callable[[TrainProgress], None] | None) -> None:
        self._path = root / METRICS
        self._writes = writes
        self._progress = progress
        self._losses: list[float] = []
        self._times: list[float] = []
        self._waited = 0.0
        self._made = 0

    def begin(self, step: int) -> None:
        """Keep the lines up to a step, the last one of a checkpoint; none of 0."""
        if step == 0:
            self._path.unlink(missing_ok=True)
        elif self._path.is_file() and self._writes:
            lines = [line for line in self._path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            self._path.write_text("".join(kept))
            self._losses = [one["loss"] for one in map(json.loads, kept) if "loss" in one]

    def step(self, line: dict[str, Any], *, tokens: int, seconds: float, waited: float, of: tuple[int, int]) -> None:
        """Write a step down and tell how far the run is.

        Args:
            line: With `step` and `loss`, in nats a position.
            tokens: Positions of this rank.
            seconds: The step took, waiting for data included.
            waited: Seconds for data.
            of: Epoch, and steps of the whole run.
        """
        self._losses.append(line["loss"])
        self._times.append(seconds)
        self._waited += waited
        self._made += tokens
        times = {"step_seconds": round(seconds, 5), "data_wait_seconds": round(waited, 5)}
        rounded = {name: round(one, 8) if isinstance(one, float) else one for name, one in line.items()}
        self.note({**rounded, "tokens": tokens, **times})
        if self._progress is None or not self._writes:
            return
        recent, total = self._times[-20:], max(1e-9, sum(self._times))
        self._progress(
            TrainProgress(
                step=line["step"],
                steps=of[1],
                epoch=of[0],
                loss=line["loss"],
                tokens_per_second=self._made / total,
                data_wait_share=self._waited / total,
                eta_seconds=(of[1] - line["step"]) * sum(recent) / len(recent),
            )
        )

    def note(self, line: dict[str, Any]) -> None:
        """Write a line."""
        if self._writes:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def report(self) -> dict[str, Any]:
        """Return the members of a result that steps make: the loss over all processes' steps, times of this one's."""
        seconds = sum(self._times)
        tenth = self._losses[-max(1, len(self._losses) // 10) :]
        return {
            "loss": statistics.fmean(tenth) if tenth else float("nan"),
            "seconds": round(seconds, 3),
            "step_seconds": round(statistics.median(self._times), 5) if self._times else 0.0,
            "tokens_per_second": round(self._made / seconds, 1) if seconds else 0.0,
            "data_wait_share": round(self._waited / seconds, 5) if seconds else 0.0,
        }
