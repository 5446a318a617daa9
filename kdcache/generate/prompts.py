"""From documents to prompts: every document once with each template, and what a chat template makes of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kdcache.errors import ConfigError, SampleError, SourceError
from kdcache.generate.config import PLACE
from kdcache.sources import Document, Source, SourceConfig, open_source


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question to the model.

    Attributes:
        id: The document's id with `~` and the template's number.
        text: As the model reads it.
        template: Number of the template, from 0.
        reference: The answer that the source gives, if it does.
    """

    id: str
    text: str
    template: int
    reference: str | None = None


def open_prompts(config: SourceConfig) -> Source:
    """Return a source whose documents are prompts, all of them read once.

    Raises:
        SourceError: There is none, a document is no prompt, or two have one id.
        AccessError: It may not be read.
    """
    if "text_field" not in config.model_fields_set:
        # a record without an answer is its prompt alone
        config = config.model_copy(update={"text_field": config.prompt_field})
    source = open_source(config)
    seen: set[str] = set()
    for number in range(len(source)):
        document = source[number]
        if document.text is None and document.prompt is None:
            raise SourceError(
                "The document is no prompt.",
                where=document.id,
                hint=f"Give records with a field {config.prompt_field!r}, or text.",
            )
        if document.id in seen:
            raise SourceError(
                f"Two prompts have the id {document.id!r}.", hint="Set source.id_field to a field that is unique."
            )
        seen.add(document.id)
    return source


def prompts_of(document: Document, templates: Sequence[str], tokenizer: Any, *, chat: bool) -> list[Prompt]:
    """Return a document's prompts, one a template, in their order.

    Raises:
        ConfigError: A chat is wanted, and the tokenizer has no chat template.
        SampleError: The chat template refuses the prompt.
    """
    own = document.text if document.prompt is None else document.prompt
    assert own is not None  # open_prompts has looked
    texts = [template.replace(PLACE, own) for template in templates]
    if chat:
        texts = [_as_chat(text, document.id, tokenizer) for text in texts]
    return [
        Prompt(f"{document.id}~{number}", text, number, document.completion if document.prompt is not None else None)
        for number, text in enumerate(texts)
    ]


def _as_chat(text: str, id: str, tokenizer: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("The teacher's tokenizer has no chat template.", where="chat", hint="Set chat to false.")
    try:
        written: str = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:
        raise SampleError(f"The chat template refuses the prompt: {error}.", where=id) from error
    begin = tokenizer.bos_token
    if begin and written.startswith(begin) and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        # the tokenizer begins every text with the token that the template has written: it must not stand there twice
        return written[len(begin) :]
    return written
