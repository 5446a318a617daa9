"""What a module says, and what can be read inside it by name: logits, hidden states, attention maps, any submodule.

Legend: `S` samples, `T` tokens, `D` width, `A` attention heads, `C` classes.

A tap is written `WHERE` or `WHERE|TAKE`:

    hidden_states.2        the model's own list of hidden states [S, T, D] (0 is the embedding)
    attentions.0           of attention maps [S, A, T, T]
    final                  the last hidden state, or what the submodule `final` gives
    bert.encoder.layer.1   what a submodule of that path gives

    |first   the first token of each sample [S, D]       |mean    the mean over real tokens, or over height and width
    |heads   the mean over attention heads [S, T, T]

Layers of a causal language model are named shorter, by what each of its positions has:

    embedding, 1, 2, ...           hidden states
    final                          after the last norm
    attentions.0, attentions.1     what a position attends to, itself and what is before it, the mean over the heads
    layers.20.self_attn.v_proj     what a submodule gives, by its path in the model without its output layer
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.errors import ConfigError, TeacherError

LISTS = ("hidden_states", "attentions")
TAKES = ("", "first", "mean", "heads")
MAP = "attentions."
"""Before the number of an attention map; its rows are as long as the sample."""


def of_layer(layer: str) -> str:
    """Return the tap of a layer of a causal language model."""
    if layer == "embedding" or layer.isdigit():
        return f"hidden_states.{layer if layer.isdigit() else 0}"
    return f"{layer}|heads" if layer.startswith(MAP) else layer


def attend_openly(module: Any) -> None:
    """Have a transformers model compute its attention maps as tensors, which its faster kernels do not.

    Raises:
        ConfigError: It cannot.
    """
    if getattr(getattr(module, "config", None), "_attn_implementation", "eager") == "eager":
        return
    try:
        module.set_attn_implementation("eager")
    except (AttributeError, ValueError) as error:
        raise ConfigError(f"The model gives no attention maps: {error}.", hint="Keep its hidden states.") from error


def run(module: Any, inputs: Mapping[str, Tensor], taps: Sequence[str] = ()) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a module's logits for some inputs by name, and what its taps give; as `read` otherwise."""
    out, found = read(module, inputs, taps)
    return logits_of(out), found


def read(
    module: Any, inputs: Mapping[str, Any], taps: Sequence[str] = (), *, inside: Any = None
) -> tuple[Any, dict[str, Tensor]]:
    """Return what a module gives for some inputs by name, and what its taps give.

    Args:
        module: An nn.Module, or any callable without taps of submodules.
        inputs: By the name of the parameter.
        taps: As above; the results go by the same names.
        inside: The part of the module in which submodules are named; default: the module.

    Raises:
        ConfigError: There is no such place in the module.
        TeacherError: It gives no tensor where one is due.
    """
    wanted = {tap: tap.partition("|") for tap in taps}
    for tap, (_, _, take) in wanted.items():
        if take not in TAKES:
            raise ConfigError(f"The tap {tap!r} takes {take!r}.", hint=f"Choose of {', '.join(TAKES[1:])}.")
    places = {where for where, _, _ in wanted.values()}
    own = {name: any(place.split(".")[0] == name for place in places) for name in LISTS}
    own["hidden_states"] = own["hidden_states"] or ("final" in places and not _has(module, "final"))
    asked = {f"output_{name}": True for name, needed in own.items() if needed}
    if asked and not _accepts(module, asked):
        raise ConfigError(f"The model has no {' or '.join(asked)}.", hint="Name a submodule by its path instead.")
    listed = {place for place in places if place.split(".")[0] in LISTS or (place == "final" and own["hidden_states"])}
    if listed:
        _require_every_layer(module)
    with _hooked(module if inside is None else inside, sorted(places - listed)) as seen:
        out = module(**inputs, **asked)
    if unseen := sorted(places - listed - seen.keys()):
        raise TeacherError(f"The submodule {unseen[0]!r} was not run.", hint="Name one that every input goes through.")
    found = {**seen, **{place: _of_list(out, place) for place in listed}}
    mask = inputs.get("attention_mask")
    taken = {}
    for tap, (where, _, take) in wanted.items():
        weighted = take == "mean" and found[where].ndim == 3
        taken[tap] = _taken(found[where], take, _mask_of(module, mask, found[where], tap) if weighted else None)
    return out, taken


def logits_of(out: Any) -> Tensor:
    """Return the logits of what a model gave: a tensor, an object with `.logits`, a mapping or a tuple.

    Raises:
        TeacherError: There are none.
    """
    if isinstance(out, Tensor):
        return out
    found = out.get("logits") if isinstance(out, Mapping) else getattr(out, "logits", None)
    if found is None and isinstance(out, tuple | list) and out:
        found = out[0]
    if not isinstance(found, Tensor):
        raise TeacherError(
            f"The model gave {type(out).__name__} without logits.", hint="Return a tensor, or an object with .logits."
        )
    return found


def _has(module: Any, path: str) -> bool:
    if not isinstance(module, nn.Module):
        return False
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def _accepts(module: Any, names: Mapping[str, Any]) -> bool:
    call = module.forward if isinstance(module, nn.Module) else module
    parameters = inspect.signature(call).parameters
    return all(name in parameters for name in names) or any(one.kind == one.VAR_KEYWORD for one in parameters.values())


def _require_every_layer(module: Any) -> None:
    """Refuse a model whose list of layers is shorter in some steps: a number in it would be another layer's."""
    config = getattr(module, "config", None)
    if not getattr(module, "training", False) or config is None:
        return
    for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
        if getattr(config, name, 0):
            raise ConfigError(
                "The model leaves layers out at random while it trains, so that their numbers move.",
                where=name,
                hint=f"Set {name}: 0 in the model's configuration, or name its layers by their paths in it.",
            )


@contextmanager
def _hooked(module: Any, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    seen: dict[str, Tensor] = {}
    handles = []
    try:
        for path in paths:
            if not _has(module, path):
                known = [name for name, _ in module.named_modules() if name] if isinstance(module, nn.Module) else []
                raise ConfigError(
                    f"The model has nothing called {path!r}.",
                    hint=f"It has {', '.join(known[:40]) or 'no submodules'}.",
                )
            handles.append(module.get_submodule(path).register_forward_hook(_keeper(seen, path)))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _keeper(seen: dict[str, Tensor], path: str) -> Any:
    def keep(_module: nn.Module, _inputs: Any, out: Any) -> None:
        value = out[0] if isinstance(out, tuple | list) else getattr(out, "last_hidden_state", out)
        if not isinstance(value, Tensor):
            raise TeacherError(f"The submodule {path!r} gives {type(value).__name__}, not a tensor.")
        seen[path] = value

    return keep


def _of_list(out: Any, place: str) -> Tensor:
    name, _, number = ("hidden_states", "", "-1") if place == "final" else place.partition(".")
    found = getattr(out, name, None)
    if not found or not number.lstrip("-").isdigit() or not -len(found) <= int(number) < len(found):
        raise ConfigError(f"The model gives no {place!r}.", hint=f"It gives {len(found or ())} {name}, from 0.")
    value: Tensor = found[int(number)]
    if value is None:
        raise ConfigError("The model computes no attention maps.", hint="Load it with eager attention.")
    return value


def _mask_of(module: Any, mask: Tensor | None, value: Tensor, tap: str) -> Tensor | None:
    """Return the mask of a place's tokens [S, T]: that of the input, or as a model of sound says it for its frames."""
    if mask is None or mask.shape == value.shape[:2]:
        return mask
    shorter = getattr(module, "_get_feature_vector_attention_mask", None)  # of transformers' models of raw sound
    own: Tensor | None = None if shorter is None else shorter(value.shape[1], mask)
    if own is None or own.shape != value.shape[:2]:
        raise ConfigError(
            f"The mask is of {mask.shape[1]} tokens, and {tap!r} has {value.shape[1]}: which are real is not known.",
            hint="Keep all tokens, or leave the attention mask out of examples.fields.",
        )
    return own


def _taken(value: Tensor, take: str, mask: Tensor | None) -> Tensor:
    if take == "first":
        return value[:, 0]
    if take == "heads":
        return value.mean(1)
    if take == "mean" and value.ndim == 3:
        weight = torch.ones_like(value[..., 0]) if mask is None else mask.to(value.dtype)
        return (value * weight[..., None]).sum(1) / weight.sum(1).clamp(min=1)[:, None]
    return value.flatten(2).mean(2) if take == "mean" else value
