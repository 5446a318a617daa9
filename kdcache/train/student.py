"""The model that is trained: built, checked against the store, and run to what the losses need.

Legend: `S` samples, `T` longest, `N` positions, `D` width, `V` vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdcache import registry
from kdcache.batch import Batch
from kdcache.errors import AccessError, ConfigError, MismatchError, TrainingError
from kdcache.store import Store
from kdcache.taps import MAP, of_layer, read
from kdcache.taps import run as run_tapped
from kdcache.targets.tensor import OutputHead
from kdcache.tasks import model_class, outputs_key
from kdcache.tokenizer import differences, load_tokenizer, tokenizer_fingerprint
from kdcache.train.config import StudentConfig
from kdcache.train.layer_drop import keep_layers

PROBE = (5, 1, 4, 2, 3, 6, 0, 7)
"""Ids of the input on which the fused output layer is compared with the model's own logits."""


@dataclass(frozen=True, slots=True)
class StudentOutput:
    """What the student gives for a batch, flat: either hidden states and an output head, or logits.

    Attributes:
        hidden: Last hidden states [N, D], or None for a student that only gives logits.
        head: Its output layer, or None.
        logits: [N, V], or None.
        layers: Layer name to features [N, D]; of students of examples [S, ...].
    """

    hidden: Tensor | None
    head: OutputHead | None
    logits: Tensor | None
    layers: Mapping[str, Tensor]


def build_student(config: StudentConfig, store: Store, *, seed: int, tokenizer: Any = None) -> nn.Module:
    """Return the student with its weights, checked against the store before any step.

    Args:
        config: Which model.
        store: That it is trained from.
        seed: Of its weights.
        tokenizer: Its own, where that is not the teacher's; its vocabulary then stands in for the teacher's.

    Raises:
        MismatchError: Its vocabulary is smaller than the teacher's, its tokenizer or chat template is another, or it
            sees the tokens that it is to predict.
        AccessError: The checkpoint does not load.
        ConfigError: The configuration or factory does not make a model.
    """
    torch.manual_seed(seed)
    if store.manifest.kind != "causal_lm":
        return _classifier(config, store.vocab_size)
    vocab_size = store.vocab_size if tokenizer is None else len(tokenizer)
    recorded = store.manifest.part("tokenizer") if tokenizer is None else tokenizer_fingerprint(tokenizer)
    model = _built(config, vocab_size, recorded)
    _require_causal(model, vocab_size)
    return model


def _classifier(config: StudentConfig, classes: int) -> nn.Module:
    """Return a student of examples with as many outputs as the teacher."""
    if config.factory is not None:
        return _from_factory(config.factory, classes)
    kind = model_class(config.task or "sequence-classification")
    try:
        if config.config is not None:
            from transformers import AutoConfig

            sizes = {outputs_key(config.task): classes, "attn_implementation": "eager", **config.config}
            made = kind.from_config(AutoConfig.for_model(sizes.pop("model_type"), **sizes))
            return made.to(getattr(torch, config.dtype))  # type: ignore[no-any-return]
        model = kind.from_pretrained(
            config.model,
            num_labels=classes,
            dtype=getattr(torch, config.dtype),
            revision=config.revision,
            attn_implementation="eager",
            ignore_mismatched_sizes=True,
            use_safetensors=True,
        )
        if config.keep_layers is not None:
            keep_layers(model, config.keep_layers)
        return model  # type: ignore[no-any-return]
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"The student is not made: {type(error).__name__}: {str(error).splitlines()[0]}",
            where="student",
            hint="Give a model_type and its sizes, or a checkpoint, and student.task.",
        ) from error


def _built(config: StudentConfig, vocab_size: int, recorded: dict[str, Any] | None) -> nn.Module:
    if config.factory is not None:
        return _from_factory(config.factory, vocab_size)
    from transformers import AutoConfig, AutoModelForCausalLM

    if config.config is not None:
        sizes = {"vocab_size": vocab_size, **config.config}
        try:
            kind = sizes.pop("model_type")
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
        except Exception as error:
            raise ConfigError(
                f"The student's config makes no model: {type(error).__name__}: {str(error).splitlines()[0]}",
                where="student.config",
                hint="Write model_type: llama and the sizes of that type's transformers configuration.",
            ) from error
        model = model.to(getattr(torch, config.dtype))
    else:
        model = _from_checkpoint(config, recorded)
        if config.keep_layers is not None:
            keep_layers(model, config.keep_layers)
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < vocab_size:
        raise MismatchError(
            f"The student has {rows} embeddings, and the vocabulary is {vocab_size}: {_whose(config)}.",
            where="student",
            hint="Use a student with that tokenizer, or resize its embeddings.",
        )
    return model  # type: ignore[no-any-return]


@torch.no_grad()
def _require_causal(model: Any, vocab_size: int) -> None:
    """Refuse a model whose row t knows token t + 1, which the store's row t asks it to predict: its loss would be 0."""
    training, state = model.training, torch.random.get_rng_state()
    model.eval()
    try:
        one = torch.tensor([PROBE]) % vocab_size
        other = one.clone()
        other[0, -1] = (other[0, -1] + 1) % vocab_size
        said, changed = (_logits(model, ids, torch.ones_like(ids))[0, :-1].float() for ids in (one, other))
    finally:
        model.train(training)
        torch.random.set_rng_state(state)
    # a causal model's earlier rows are the same numbers; NaN is for the loss to find
    if (said - changed).abs().nan_to_num(0).max() > 1e-5 * said.abs().nan_to_num(0).max():
        raise MismatchError(
            "The student sees the tokens that it is to predict: another last token changes what it says before it.",
            where="student",
            hint="Use a causal model; of an encoder set is_decoder: true in student.config.",
        )


def _logits(model: Any, ids: Tensor, attention_mask: Tensor) -> Tensor:
    # not every model of transformers takes the mask second
    named = hasattr(model, "save_pretrained")
    out = model(input_ids=ids, attention_mask=attention_mask) if named else model(ids, attention_mask)
    return out if isinstance(out, Tensor) else out.logits


def is_fused(model: Any) -> bool:
    """Say whether the model's logits are its output layer on its last hidden state, by trying one input."""
    if not (hasattr(model, "get_output_embeddings") and hasattr(model, "base_model")):
        return False
    if not isinstance(model.get_output_embeddings(), nn.Linear):
        return False
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            device = next(model.parameters()).device
            ids = torch.tensor([PROBE], device=device) % model.get_input_embeddings().weight.shape[0]
            own = model(input_ids=ids).logits.float()
            ours = head_of(model).logits(model.base_model(input_ids=ids, use_cache=False).last_hidden_state).float()
            return own.shape == ours.shape and torch.allclose(own, ours, rtol=1e-2, atol=1e-2)
    except (TypeError, AttributeError, RuntimeError):
        return False
    finally:
        model.train(training)


def head_of(model: Any) -> OutputHead:
    """Return the output layer of a transformers model, with the scale and softcap its configuration gives."""
    layer = model.get_output_embeddings()
    text = model.config.get_text_config()
    scaling = getattr(text, "logits_scaling", None)
    scale = getattr(text, "logit_scale", None) or (1 / scaling if scaling else 1.0)
    return OutputHead(layer.weight, layer.bias, float(scale), getattr(text, "final_logit_softcapping", None))


def run_student(model: Any, batch: Batch, layers: Sequence[str], *, fused: bool) -> StudentOutput:
    """Return the student's flat output for a batch.

    Raises:
        ConfigError: It has no layer of a name.
        MismatchError: It has other outputs than the teacher, or does not answer for every token where the teacher did.
    """
    if batch.inputs:
        return _run_on_examples(model, batch, layers)
    padded = batch.padded()
    if not fused:
        logits = _logits(model, padded.input_ids, padded.attention_mask)
        if layers:
            raise ConfigError("This student gives logits only: hidden losses need a transformers model.")
        return StudentOutput(None, None, logits.flatten(0, 1)[padded.index], {})
    out, found = _read(model, padded.input_ids, layers)
    hidden = out.last_hidden_state.flatten(0, 1)[padded.index]
    flat = {layer: values.flatten(0, 1)[padded.index] for layer, values in found.items()}
    return StudentOutput(hidden, head_of(model), None, {layer: flat.get(layer, hidden) for layer in layers})


def _read(model: Any, ids: Tensor, layers: Sequence[str]) -> tuple[Any, dict[str, Tensor]]:
    """Return what a causal model's body gives for ids [S, T], and of its layers but the final one [S, T, ...]."""
    taps = {layer: of_layer(layer) for layer in layers if layer != "final"}
    try:
        out, found = read(model.base_model, {"input_ids": ids, "use_cache": False}, list(taps.values()))
    except ConfigError as error:
        raise ConfigError(
            f"The student has no such layer: {error.what}",
            where="loss.hidden",
            hint=f"It has final, embedding, 1, 2, ..., {MAP}0, ... and submodules by their paths. {error.hint}",
        ) from error
    return out, {layer: found[tap] for layer, tap in taps.items()}


def _run_on_examples(model: Any, batch: Batch, layers: Sequence[str]) -> StudentOutput:
    logits, found = run_tapped(model, batch.inputs, layers)
    if (logits.ndim == 3) != (batch.places is not None):
        raise MismatchError(
            f"The student gives logits of shape {tuple(logits.shape)}; the teacher gave "
            f"{'one answer a sample' if batch.places is None else 'one for each token'}.",
            where="student",
        )
    if batch.answers is not None and logits.shape[1] != batch.answers:
        raise MismatchError(
            f"The student answers for {logits.shape[1]} tokens of a sample, and the teacher did for {batch.answers}.",
            where="student",
            hint="Its frames must be the teacher's: the same strides and the same length of input.",
        )
    flat = logits if batch.places is None else logits.flatten(0, 1)[batch.places]
    return StudentOutput(None, None, flat, found)


@torch.no_grad()
def layer_shapes(model: Any, layers: Sequence[str], probe: Mapping[str, Tensor] | None) -> dict[str, tuple[int, ...]]:
    """Return the shape of a row of each of the student's layers.

    Args:
        model: The student, on the CPU.
        layers: Their names.
        probe: Inputs of two samples, of students of examples; others are given a few ids, and of their attention maps
            the shape says nothing.
    """
    training = model.training
    model.eval()
    try:
        if probe is not None:
            return {name: tuple(value.shape[1:]) for name, value in run_tapped(model, probe, layers)[1].items()}
        ids = torch.tensor([PROBE]) % model.get_input_embeddings().weight.shape[0]
        out, found = _read(model, ids, layers)
        return {name: tuple(found.get(name, out.last_hidden_state).shape[2:]) for name in layers}
    finally:
        model.train(training)


def save_student(model: Any, config: StudentConfig, tokenizer_files: Mapping[str, bytes], folder: Path) -> None:
    """Write the student as a folder that transformers loads, with its tokenizer beside it.

    A student made by a factory becomes model.safetensors; its factory is recorded by the run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
    else:
        from safetensors.torch import save_model

        save_model(model, str(folder / "model.safetensors"))
    for name, data in tokenizer_files.items():
        (folder / name).write_bytes(data)


def load_student(folder: Path, factory: str | None, vocab_size: int, task: str | None = None) -> nn.Module:
    """Return a saved student.

    Args:
        folder: Of the run.
        factory: That made it, or None.
        vocab_size: Outputs.
        task: Head of a transformers model; None for a causal language model.

    Raises:
        AccessError: The folder holds no student that loads.
    """
    try:
        if factory is not None:
            from safetensors.torch import load_model

            model = _from_factory(factory, vocab_size)
            load_model(model, str(folder / "model.safetensors"))
            return model
        if task is not None:
            kind = model_class(task)
            options = {"use_safetensors": True, "attn_implementation": "eager"}
            return kind.from_pretrained(str(folder), **options)  # type: ignore[no-any-return]
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(str(folder), use_safetensors=True)  # type: ignore[no-any-return]
    except (OSError, ValueError, RuntimeError) as error:
        raise AccessError(
            f"The student does not load: {str(error).splitlines()[0]}",
            where=str(folder),
            hint="Give the --out folder of a finished `kdcache train`.",
        ) from error


def _from_checkpoint(config: StudentConfig, recorded: dict[str, Any] | None) -> Any:
    from transformers import AutoModelForCausalLM

    name = str(config.model)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=getattr(torch, config.dtype), revision=config.revision, use_safetensors=True
        )
    except Exception as error:
        raise AccessError(
            f"The student does not load: {str(error).splitlines()[0]}",
            where=name,
            hint="Give a folder or hub name of a causal language model with safetensors weights.",
        ) from error
    folder = Path(name)
    if recorded is None or (folder.is_dir() and not (folder / "tokenizer.json").is_file()):
        return model
    found = tokenizer_fingerprint(load_tokenizer(name, revision=config.revision))
    if config.any_template:
        found["chat_template"] = recorded.get("chat_template")
    if lines := differences(recorded, found):
        raise MismatchError(
            f"The student's tokenizer is not {_whose(config)}: {'; '.join(lines)}.",
            where=name,
            hint="Name the student's own in student.tokenizer, or take a student that has this one.",
        )
    return model


def _whose(config: StudentConfig) -> str:
    return "the teacher's" if config.tokenizer is None else "the one in student.tokenizer"


def _from_factory(path: str, vocab_size: int) -> nn.Module:
    try:
        factory = registry.attribute(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"There is no student factory {path!r}: {error}.",
            where="student.factory",
            hint="Write it as module:function; the function takes vocab_size.",
        ) from error
    model = factory(vocab_size=vocab_size)
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"The factory {path!r} gave {type(model).__name__}, not an nn.Module.", where="student.factory"
        )
    return model


def require_finite_weights(model: nn.Module) -> None:
    """Refuse to save a student whose weights are not finite.

    Raises:
        TrainingError: A weight is NaN or infinite.
    """
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise TrainingError(f"The student's weight {name} is not finite.", hint="Lower optim.learning_rate.")
