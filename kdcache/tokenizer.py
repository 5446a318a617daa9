"""Load a tokenizer, say which one it is, and keep it with a store so that a stranger can decode.

Loading uses transformers, imported on first use; decoding from a store uses the `tokenizers` library alone.
"""

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kdcache.errors import AccessError, ConfigError
from kdcache.fingerprint import digest_bytes, digest_json

PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "Zürich, naïve café — 東京 Москва 🙂",
    "def f(x):\n\treturn x ** 2  # 3.14159\n",
    "  leading and   inner spaces \n\n",
    "don't won't I'll 1,234,567.89 USD",
    "<|im_start|>user\nhello<|im_end|>",
)
"""Texts whose ids are part of a tokenizer's fingerprint: they reach merges, normalisation and special tokens."""


def load_tokenizer(
    model: str, *, gguf_file: str | None = None, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """Return the transformers tokenizer of a folder, a hub name or a GGUF file.

    Raises:
        ConfigError: transformers is not installed.
        AccessError: There is no tokenizer there, or it does not load.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ConfigError(
            "Tokenising needs the package transformers.", hint="Run: pip install 'kdcache[teacher]'"
        ) from error
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision:
        options["revision"] = revision
    if gguf_file:
        options["gguf_file"] = gguf_file
    try:
        return AutoTokenizer.from_pretrained(model, **options)
    except Exception as error:
        raise AccessError(
            f"The tokenizer cannot be loaded: {str(error).splitlines()[0]}",
            where=model,
            hint="Give a folder with tokenizer.json, a hub name, or a GGUF file.",
        ) from error


def tokenizer_fingerprint(tokenizer: Any) -> dict[str, Any]:
    """Return the identity of a tokenizer: vocabulary, special ids, chat template and probe texts, each by digest."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    special = {
        name: getattr(tokenizer, f"{name}_token_id", None)
        for name in ("bos", "eos", "pad", "unk", "sep", "cls", "mask")
    }
    added = sorted((int(i), str(token)) for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items())
    return {
        "vocabulary": digest_json([[token, int(number)] for token, number in vocabulary]),
        "vocabulary_size": len(vocabulary),
        "special": special,
        "added": digest_json([list(one) for one in added]),
        "chat_template": digest_json(getattr(tokenizer, "chat_template", None) or ""),
        "probes": digest_json([[int(i) for i in tokenizer(probe)["input_ids"]] for probe in PROBES]),
    }


def differences(ours: dict[str, Any] | None, theirs: dict[str, Any] | None) -> list[str]:
    """Return one line for each way in which two fingerprints differ.

    The pad token is the student's own affair. A chat template is one only where both have one: a student without it
    learns the teacher's from the store's ids, a student with another would be asked in words that it was not taught.
    """
    if ours is None or theirs is None:
        return []
    lines = [
        f"{name} differs ({str(theirs.get(name))[:12]} here, {str(ours.get(name))[:12]} in the store)"
        for name in ("vocabulary", "vocabulary_size", "probes")
        if ours.get(name) != theirs.get(name)
    ]
    templates = [one.get("chat_template") for one in (theirs, ours)]
    if templates[0] != templates[1] and digest_json("") not in templates:
        lines.append("chat_template differs (set student.any_template=true where that is meant)")
    special = [(name, theirs["special"].get(name), ours["special"].get(name)) for name in ("bos", "eos", "unk")]
    return lines + [f"{name} token is {a} here, {b} in the store" for name, a, b in special if a != b]


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """Return the files that reload a tokenizer, by name; their bytes depend on nothing but the tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {}
        for path in sorted(Path(folder).iterdir()):
            if path.suffix in (".json", ".jinja", ".txt", ".model") and path.is_file():
                files[path.name.lower()] = path.read_bytes()
    if "tokenizer_config.json" in files:
        config = json.loads(files["tokenizer_config.json"])
        for key in ("name_or_path", "_commit_hash", "auto_map"):
            config.pop(key, None)
        files["tokenizer_config.json"] = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False).encode()
    return files


def kept_tokenizer(files: dict[str, bytes]) -> Any:
    """Return the transformers tokenizer that a store's files are of.

    Raises:
        ConfigError: transformers is not installed.
        AccessError: They do not load.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)
        return load_tokenizer(folder)


def decoder(files: dict[str, bytes]) -> Callable[[Sequence[int]], str]:
    """Return a function from ids to text, from the files a store keeps.

    Without a fast tokenizer among them, or without the `tokenizers` library, it gives ids in angle brackets.
    """
    data = files.get("tokenizer.json")
    if data is None:
        return lambda ids: " ".join(f"<{int(one)}>" for one in ids)
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return lambda ids: " ".join(f"<{int(one)}>" for one in ids)
    tokenizer = Tokenizer.from_str(data.decode("utf-8"))
    return lambda ids: str(tokenizer.decode([int(one) for one in ids], skip_special_tokens=False))


def token_bytes(tokenizer: Any) -> list[bytes]:
    """Return the bytes that each id of a vocabulary of `V` stands for [V].

    Special and added tokens stand for their own text. What is not byte-level, with `▁` for a space or with `<0x0A>` for
    a byte stands for its own characters.
    """
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    added = {int(one) for one in getattr(tokenizer, "added_tokens_decoder", {})}
    alphabet = _byte_alphabet()
    spaces = any(str(one).startswith("▁") for one in pieces)
    found = []
    for number, piece in enumerate(pieces):
        text = "" if piece is None else str(piece)
        if number in added:
            found.append(text.encode())
        elif not spaces and all(one in alphabet for one in text):
            found.append(bytes(alphabet[one] for one in text))
        elif len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            found.append(bytes([int(text[3:5], 16)]))
        else:
            found.append(text.replace("▁", " ").encode())
    return found


def _byte_alphabet() -> dict[str, int]:
    """Return the byte of every character of byte-level vocabularies: printable ones are themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [one for one in range(256) if one not in printable]
    return {chr(one): one for one in printable} | {chr(256 + place): one for place, one in enumerate(others)}


def files_digest(files: dict[str, bytes]) -> str:
    """Return the identity of a tokenizer's files."""
    return digest_json({name: digest_bytes(data) for name, data in files.items()})
