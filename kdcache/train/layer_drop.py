"""A student that begins as some of the layers of a larger checkpoint, its teacher's as a rule.

Embeddings, norms and output layer are kept whole, so width and vocabulary are the checkpoint's. Sources: DistilBERT
(Sanh et al. 2019, section 3), which takes every other layer of its teacher; Sajjad et al. 2023, "On the effect of
dropping layers of pre-trained transformer models", section 3, on which ones.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from kdcache.errors import ConfigError


def keep_layers(model: Any, layers: int | Sequence[int]) -> None:
    """Leave some of a transformers model's layers out, in place; its configuration says so, and it saves and loads.

    Args:
        model: With one stack of layers, as long as its configuration's num_hidden_layers.
        layers: How many, spread evenly from the first to the last; or which, counted from 1, rising.

    Raises:
        ConfigError: There is no such layer, no one stack of them, or what is left would load as another model.
    """
    config = model.config.get_text_config()
    count = int(getattr(config, "num_hidden_layers", 0))
    stacks = {name: one for name, one in model.named_modules() if isinstance(one, nn.ModuleList) and len(one) == count}
    if len(stacks) != 1 or count == 0:
        raise ConfigError(
            f"Layers cannot be left out of {type(model).__name__}: it has {len(stacks)} stacks of {count} layers.",
            where="student.keep_layers",
            hint="Take a model with one stack of layers, or make the student by student.factory.",
        )
    kept = _chosen(layers, count)
    name_of_stack, stack = stacks.popitem()
    chosen = [stack[number] for number in kept]
    del stack[len(kept) :]
    for place, layer in enumerate(chosen):
        stack[place] = layer
        # attention finds its place in the cache of keys and values by it
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", place)  # noqa: B010
    for name, value in list(vars(config).items()):
        # one entry a layer, such as layer_types; of several ids that end a text there may be as many
        others = name.startswith("_") or name.endswith("_token_id")
        if isinstance(value, list | tuple) and len(value) == count and not others:
            setattr(config, name, [value[number] for number in kept])
    config.num_hidden_layers = len(kept)
    _require_the_same(model, name_of_stack)


def _require_the_same(model: Any, name_of_stack: str) -> None:
    """Refuse a model that its configuration does not make again: saved, it would load as another.

    Some configurations say by numbers which layers have experts, and some layers take numbers from their place.
    """
    try:
        with torch.device("meta"):
            again = type(model)(type(model.config).from_dict(model.config.to_dict()))
    except Exception as error:
        raise _of_places(model, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}") from error
    stacks = model.get_submodule(name_of_stack), again.get_submodule(name_of_stack)
    sides = [{name: _facts(module) for name, module in one.named_modules()} for one in stacks]
    if wrong := [name for name in {**sides[0], **sides[1]} if sides[0].get(name) != sides[1].get(name)]:
        raise _of_places(model, f"{name_of_stack}.{wrong[0]} would be another")


def _facts(module: nn.Module) -> tuple[Any, ...]:
    """Return what a module is, but for the values of its weights."""
    told = {name: value for name, value in vars(module).items() if isinstance(value, bool | int | float | str)}
    told = {name: value for name, value in told.items() if not name.startswith("_") and name != "training"}
    return type(module), told, {name: tuple(one.shape) for name, one in module.named_parameters(recurse=False)}


def _of_places(model: Any, why: str) -> ConfigError:
    return ConfigError(
        f"{type(model).__name__} without some layers is not what its configuration makes: {why}.",
        where="student.keep_layers",
        hint="Its layers differ by their places: keep others, or make the student by student.factory.",
    )


def _chosen(layers: int | Sequence[int], count: int) -> list[int]:
    """Return the layers' places from 0."""
    if isinstance(layers, int):
        if not 1 <= layers <= count:
            raise ConfigError(
                f"{layers} layers cannot be kept of {count}.", where="student.keep_layers", hint=f"Write 1 to {count}."
            )
        return [round(one * (count - 1) / max(1, layers - 1)) for one in range(layers)]
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 1 or layers[-1] > count:
        raise ConfigError(
            f"The layers {list(layers)} are not rising numbers from 1 to {count}.",
            where="student.keep_layers",
            hint="Write them as [1, 4, 8], or a number of layers to keep.",
        )
    return [one - 1 for one in layers]
