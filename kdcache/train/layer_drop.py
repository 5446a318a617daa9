"""A student that begins as some of the layers of a larger checkpoint, its teacher's as a rule.

Embeddings, norms and output layer are kept whole, so width and vocabulary are the checkpoint's. Sources: DistilBERT
(Sanh et al. 2019, section 3), which takes every other layer of its teacher; Sajjad et al. 2023, "On the effect of
dropping layers of pre-trained transformer models", section 3, on which ones.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from kdcache.errors import ConfigError


def keep_layers(model: Any, layers: int | Sequence[int]) -> None:
    """Leave some of a transformers model's layers out, in place; its configuration says so, and it saves and loads.

    Args:
        model: With one stack of layers, as long as its configuration's num_hidden_layers.
        layers: How many, spread evenly from the first to the last; or which, counted from 1, rising.

    Raises:
        ConfigError: There is no such layer, or no one stack of them.
    """
    config = model.config.get_text_config()
    count = int(getattr(config, "num_hidden_layers", 0))
    stacks = [one for one in model.modules() if isinstance(one, nn.ModuleList) and len(one) == count]
    if len(stacks) != 1 or count == 0:
        raise ConfigError(
            f"Layers cannot be left out of {type(model).__name__}: it has {len(stacks)} stacks of {count} layers.",
            where="student.keep_layers",
            hint="Take a model with one stack of layers, or make the student by student.factory.",
        )
    kept = _chosen(layers, count)
    stack = stacks[0]
    chosen = [stack[number] for number in kept]
    del stack[len(kept) :]
    for place, layer in enumerate(chosen):
        stack[place] = layer
        # attention finds its place in the cache of keys and values by it
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", place)  # noqa: B010
    for name, value in list(vars(config).items()):
        # one entry a layer, such as layer_types
        if isinstance(value, list | tuple) and len(value) == count and not name.startswith("_"):
            setattr(config, name, [value[number] for number in kept])
    config.num_hidden_layers = len(kept)


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
