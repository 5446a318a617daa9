"""`torchvision`: a classification model of images or clips by name, with `teacher.weights`, a safetensors file.

`teacher.options` are arguments of `torchvision.models.get_model`, such as {num_classes: 10}.
"""

from pathlib import Path
from typing import Any

from kdcache.classifiers._vision import Built, ImageClassifier, library, load_weights, made
from kdcache.errors import ConfigError
from kdcache.teachers import TeacherConfig


def build(config: TeacherConfig) -> Built:
    """Return a model of torchvision with its weights.

    Raises:
        ConfigError: torchvision has no such model of classes, or no weights are named.
        AccessError: The weights are not there, or not the model's.
    """
    models: Any = library("torchvision.models")
    known = [*models.list_models(module=models), *models.list_models(module=models.video)]
    if config.model not in known:
        near = [name for name in known if name[:4] == config.model[:4]]
        raise ConfigError(
            f"torchvision has no model {config.model!r} that classifies.",
            where="teacher.model",
            hint=f"It has {', '.join(near or known)}.",
        )
    if config.weights is None:
        raise ConfigError(
            f"The name {config.model!r} alone has no weights.",
            where="teacher.weights",
            hint="Write them by safetensors.torch.save_file(model.state_dict(), FILE), and give the file.",
        )
    model = made(config.model, lambda: models.get_model(config.model, weights=None, **config.options))
    load_weights(model, Path(config.weights))
    return Built(model, config.model, _wants(models, config.model))


def _wants(models: Any, name: str) -> str:
    # of the library's own weights: what others were trained on it does not know
    usual = models.get_model_weights(name).DEFAULT.transforms()
    return (
        f"torchvision's own weights of it want floats of {usual.crop_size} pixels, less {list(usual.mean)} and "
        f"divided by {list(usual.std)}."
    )


def plugin(config: TeacherConfig) -> ImageClassifier:
    """Return the classifier of a config."""
    return ImageClassifier(config, "torchvision", build)
