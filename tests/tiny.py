"""Tiny real things: a two-layer Llama with a real byte-level tokenizer, and stores written from dense rows."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kdcache.store import (
    HiddenSpec,
    Kept,
    SampleTable,
    ShardPlan,
    Store,
    StorePlan,
    StoreWriter,
    open_store,
    standard_columns,
)
from kdcache.targets.measure import measure_rows

TEXT = (
    "The lighthouse keeper counted the ships at dusk. One, two, three; the fourth was late again. "
    "When the fog came, he rang the bell by hand and wrote the hour in his book. "
    "Nobody had told him that the war was over, and nobody had told the sea. "
)
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer(vocabulary: int = 300, *, text: str = TEXT) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on a few sentences."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([text], trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = TEMPLATE
    return wrapped


def llama(vocabulary: int, *, seed: int = 0, width: int = 16, layers: int = 2) -> LlamaForCausalLM:
    """A random Llama whose logits are spread enough to have an opinion."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
    return model


def save_teacher(folder: Path, *, vocabulary: int = 300, seed: int = 0) -> Path:
    """Write a tiny teacher as a transformers folder with its tokenizer."""
    words = tokenizer(vocabulary)
    llama(len(words), seed=seed).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def write_text(folder: Path, *, documents: int = 12) -> Path:
    """Write a JSON Lines file of documents of different lengths."""
    path = folder / "text.jsonl"
    lines = [json.dumps({"id": f"doc-{n}", "text": TEXT[n : n + 40 + 17 * (n % 5)]}) for n in range(documents)]
    path.write_text("\n".join(lines) + "\n")
    return path


def capture_tree(folder: Path, **targets: Any) -> dict[str, Any]:
    """A capture config of the tiny teacher over the tiny text, both written to the folder."""
    return {
        "source": {"path": str(write_text(folder)), "id_field": "id"},
        "samples": {"max_length": 24},
        "teacher": {"model": str(save_teacher(folder / "teacher")), "dtype": "float32", "batch_positions": 96},
        "targets": {"k": 8, **targets},
        "store": {"shard_positions": 64, "chunk_positions": 16},
    }


def plan(
    columns: tuple[Any, ...],
    rows: Sequence[Sequence[int]],
    *,
    vocabulary: int,
    k: int,
    shard_rows: int = 64,
    **extra: Any,
) -> StorePlan:
    """A store plan for samples of these many rows, shard by shard."""
    shards, first = [], 0
    for shard in rows:
        shards.append(ShardPlan(first, len(shard), sum(shard)))
        first += len(shard)
    keys: dict[str, Any] = {
        "kind": "causal_lm",
        "columns": columns,
        "shard_rows": shard_rows,
        "chunk_rows": 16,
        "vocab_size": vocabulary,
        "k": k,
        "teacher": {"name": "tiny", "weights": "0" * 64},
        "tokenizer": None,
        "source": {"kind": "test"},
        "capture": {},
        "licences": {},
        "skipped": {},
        "shards": tuple(shards),
    }
    return StorePlan(**{**keys, **extra})


def dense_rows(count: int, vocabulary: int, seed: int = 0) -> NDArray[np.float32]:
    """Random raw logits."""
    return np.random.default_rng(seed).normal(0, 3, (count, vocabulary)).astype(np.float32)


def token_columns(counts: Sequence[int], vocabulary: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels of samples of these many positions, labels being the next tokens."""
    random = np.random.default_rng(seed)
    samples = [random.integers(0, vocabulary, count + 1) for count in counts]
    return np.concatenate([one[:-1] for one in samples]), np.concatenate([one[1:] for one in samples])


def shard_columns(
    logits: NDArray[np.float32], inputs: NDArray[Any], labels: NDArray[Any], k: int
) -> dict[str, NDArray[Any]]:
    """The standard columns of some rows, measured from dense logits."""
    targets = measure_rows(torch.from_numpy(logits), torch.from_numpy(labels.astype(np.int64)), k=k).numpy()
    return {
        "input_ids": inputs,
        "labels": labels,
        "loss_mask": np.ones(len(labels), dtype=np.int32),
        "head_ids": targets.ids,
        "head_logits": targets.logits,
        "tail_log_partition": targets.tail,
        "label_logit": targets.label_logit,
    }


def write_store(
    folder: Path,
    *,
    rows: Sequence[Sequence[int]] = ((20, 20, 11), (30, 9)),
    vocabulary: int = 50,
    k: int = 8,
    kept: Kept | None = None,
    hidden: Mapping[str, int] | None = None,
    seed: int = 0,
) -> Store:
    """Write and open a store of random samples."""
    widths = hidden or {}
    columns = standard_columns(
        k=k,
        vocab_size=vocabulary,
        kept=kept or Kept("float32"),
        hidden=[HiddenSpec(layer, width, "float32") for layer, width in widths.items()],
    )
    ranking = np.random.default_rng(7).permutation(vocabulary).astype(np.int32) if kept and kept.ranked else None
    writer = StoreWriter.open(folder, plan(columns, rows, vocabulary=vocabulary, k=k, ranking=ranking))
    random = np.random.default_rng(seed)
    for index, counts in enumerate(rows):
        tokens = [random.integers(0, vocabulary, count + 1) for count in counts]
        inputs = np.concatenate([one[:-1] for one in tokens])
        labels = np.concatenate([one[1:] for one in tokens])
        values = shard_columns(dense_rows(len(labels), vocabulary, seed + index), inputs, labels, k)
        for layer, width in widths.items():
            values[f"hidden.{layer}"] = random.normal(size=(len(labels), width)).astype(np.float32)
        ids = [f"sample-{index}-{number}" for number in range(len(counts))]
        writer.write_shard(index, values, SampleTable(ids, np.asarray(counts)))
    writer.finish({"test": True})
    return open_store(folder)
