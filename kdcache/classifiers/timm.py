"""`timm`: a model of timm by name with `teacher.weights`, a folder as timm writes it for the hub, or a hub's name.

A folder holds config.json and model.safetensors. A hub's name has a slash (`timm/resnet18.a1_in1k`); only those two
files are fetched. `teacher.options` are arguments of `timm.create_model`, such as {num_classes: 10, in_chans: 1}.
"""

from pathlib import Path
from typing import Any

from kdcache.classifiers._vision import FILE, Built, ImageClassifier, first_line, library, load_weights, made
from kdcache.errors import AccessError, ConfigError
from kdcache.teachers import TeacherConfig

SOURCE = "hf-hub:"
"""What timm writes before a hub's name; it may be left out."""

FACTS = ("input_size", "mean", "std", "interpolation", "crop_pct")
"""What timm knows of the images that a model was made for."""


def build(config: TeacherConfig) -> Built:
    """Return a model of timm with its weights.

    Raises:
        ConfigError: timm has no such model, or a name alone has no weights.
        AccessError: The weights are not there, or not the model's.
    """
    timm = library("timm")
    name = config.model
    if not Path(name).is_dir() and "/" not in name.removeprefix(SOURCE):
        if not timm.is_model(name):
            near = timm.list_models(f"*{name.split('.')[0]}*")[:8]
            raise ConfigError(
                f"timm has no model {name!r}, and there is no such folder.",
                where="teacher.model",
                hint=f"It has {', '.join(near)}." if near else "timm.list_models() lists what there is.",
            )
        if config.weights is None:
            raise ConfigError(
                f"The name {name!r} alone has no weights.",
                where="teacher.weights",
                hint="Give a safetensors file, or a hub's name as teacher.model, such as timm/resnet18.a1_in1k.",
            )
        path = Path(config.weights)
        model: Any = made(name, lambda: timm.create_model(name, pretrained=False, **config.options))
    else:
        if config.weights is not None:
            raise ConfigError(
                "A folder or a hub's name has weights of its own.",
                where="teacher.weights",
                hint="Leave it out, or give the architecture's name as teacher.model.",
            )
        path = Path(name) if Path(name).is_dir() else _fetched(name.removeprefix(SOURCE), config.revision)
        if not (path / "config.json").is_file():
            raise AccessError(
                "The folder has no config.json that names its architecture.",
                where=str(path),
                hint="Give the architecture as teacher.model, and the safetensors file as teacher.weights.",
            )
        model = made(name, lambda: timm.create_model(f"local-dir:{path}", pretrained=False, **config.options))
    load_weights(model, path)
    data = timm.data.resolve_data_config({}, model=model)
    facts = {one: list(data[one]) if isinstance(data[one], tuple) else data[one] for one in FACTS}
    wants = f"It was made for floats {facts['input_size']} less {facts['mean']} and divided by {facts['std']}."
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or Path(name).name
    return Built(model, name, wants, {"preprocessing": facts})


def _fetched(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["config.json", FILE]))
    except Exception as error:
        raise AccessError(
            f"The model is not fetched: {first_line(error)}",
            where=name,
            hint="Give a folder, the name of a model on the hub, or an architecture with teacher.weights.",
        ) from error


def plugin(config: TeacherConfig) -> ImageClassifier:
    """Return the classifier of a config."""
    return ImageClassifier(config, "timm", build)
