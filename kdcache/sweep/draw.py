"""The point of the next trial: drawn by optuna, as a function of the seed and the trials before."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kdcache.errors import ConfigError
from kdcache.fingerprint import canonical_json
from kdcache.sweep.result import Trial
from kdcache.sweep.space import Axis


def next_point(axes: Mapping[str, Axis], seed: int, before: Sequence[Trial]) -> dict[str, Any]:
    """Return the point of the next trial.

    A sampler of its own for each trial, seeded with (seed, number), needs no state but what is told to it here.

    Args:
        axes: Key to axis.
        seed: Of the search.
        before: The finished trials, in order.

    Raises:
        ConfigError: optuna is not installed.
    """
    optuna = load_optuna()
    kinds = {key: _distribution(axis) for key, axis in axes.items()}
    own = int(np.random.SeedSequence([seed % 2**32, len(before)]).generate_state(1)[0])
    study = optuna.create_study(direction="minimize", sampler=optuna.samplers.TPESampler(seed=own))
    for one in before:
        ended = {"value": one.value} if one.value is not None else {"state": optuna.trial.TrialState.FAIL}
        inner = {key: _index(axes[key], value) for key, value in one.point.items()}
        study.add_trial(optuna.trial.create_trial(params=inner, distributions=kinds, **ended))
    drawn = study.ask(kinds).params
    return {key: _outer(axes[key], drawn[key]) for key in axes}


def _distribution(axis: Axis) -> Any:
    kinds = load_optuna().distributions
    if axis.choices is not None:
        # optuna takes scalars only, and a choice may be a schedule: so it draws the place of one
        return kinds.CategoricalDistribution(range(len(axis.choices)))
    return (kinds.IntDistribution if axis.integer else kinds.FloatDistribution)(*axis.ends, log=axis.log)


def _index(axis: Axis, value: Any) -> Any:
    if axis.choices is None:
        return value
    return [canonical_json(one) for one in axis.choices].index(canonical_json(value))


def _outer(axis: Axis, drawn: Any) -> Any:
    return drawn if axis.choices is None else axis.choices[drawn]


def load_optuna() -> Any:
    """Return optuna, which then says nothing of its own.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise ConfigError("A search needs the package optuna.", hint="Run: pip install 'kdcache[sweep]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
