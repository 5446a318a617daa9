"""Heads of transformers models that are no causal language models, by the name of their task."""

from typing import Any

from kdcache.errors import ConfigError

TASKS = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "masked-lm": "AutoModelForMaskedLM",
    "image-classification": "AutoModelForImageClassification",
    "audio-classification": "AutoModelForAudioClassification",
    "ctc": "AutoModelForCTC",
    "encoder": "AutoModel",
}

VOCABULARIES = ("masked-lm", "ctc")
"""Tasks whose outputs are a vocabulary."""


def outputs_key(task: str | None) -> str:
    """Return the key of a model's configuration that says how many outputs the head of a task has."""
    return "vocab_size" if task in VOCABULARIES else "num_labels"


def model_class(task: str) -> Any:
    """Return the Auto class of a task.

    Raises:
        ConfigError: There is no such task, or transformers is missing.
    """
    if task not in TASKS:
        raise ConfigError(f"There is no task {task!r}.", where="task", hint=f"Choose one of {', '.join(TASKS)}.")
    try:
        import transformers
    except ImportError as error:
        raise ConfigError("This needs the package transformers.", hint="pip install 'kdcache[teacher]'") from error
    return getattr(transformers, TASKS[task])
