"""Values as pure functions of the step: alpha, temperature, learning rate."""

import math

from kdcache.train.config import EntropyTemperature, LearnedTemperature, OptimConfig, Schedule


def value_at(value: float | Schedule, step: int, steps: int) -> float:
    """Return a constant or scheduled value at a step of 0 to steps - 1."""
    if not isinstance(value, Schedule):
        return float(value)
    return value.start + (value.end - value.start) * _progress(value.schedule, step / max(1, steps - 1))


def extremes(value: float | Schedule | EntropyTemperature | LearnedTemperature) -> tuple[float, float]:
    """Return the smallest and the largest value that a setting takes."""
    if isinstance(value, EntropyTemperature):
        return min(value.sure, value.unsure), max(value.sure, value.unsure)
    if isinstance(value, LearnedTemperature):
        return value.low, value.high
    if not isinstance(value, Schedule):
        return float(value), float(value)
    ends = (value.start,) if value.schedule == "constant" else (value.start, value.end)
    return min(ends), max(ends)


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Return the learning rate at a step: a linear rise, then down to `final_share` of it."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    left = 1 - (1 - config.final_share) * _progress(config.schedule, min(1.0, share))
    return config.learning_rate * left


def _progress(schedule: str, share: float) -> float:
    if schedule == "constant":
        return 0.0
    return share if schedule == "linear" else (1 - math.cos(math.pi * share)) / 2
