"""SmolLM2 to a small Llama with a tokenizer of its own, from a store of the teacher's tokens; three seeds.

    python -m pipelines.smollm2_tokenizer.recipe [--out runs/smollm2_tokenizer] [--articles 420] [--seeds 3]

Needs `make models`. Stopped, the same command goes on. Ends in the table of the README beside this file.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kdcache.demo import write_articles
from kdcache.seeds import compare_variants
from pipelines.smollm2_wiki.methods import store

VOCABULARY = 4000

STUDENT = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}

SPANS = {"divergence": "span_likelihood", "alpha": 0.5}
VARIANTS: dict[str, dict[str, Any]] = {
    "hard labels": {"loss": {"alpha": 0.0}},
    "span likelihood, half hard labels": {"loss": SPANS},
    "span likelihood alone": {"loss": {**SPANS, "alpha": 1.0}},
    "ULD, half hard labels": {"loss": {"divergence": "uld", "alpha": 0.5}},
}


def tokenizer(articles: Path, folder: Path, vocabulary: int = VOCABULARY) -> Path:
    """Train a byte-level BPE on the articles that students see; return the folder that transformers loads."""
    if not (folder / "tokenizer.json").is_file():
        model = Tokenizer(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=["<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        model.train_from_iterator((json.loads(line)["text"] for line in articles.read_text().splitlines()), trainer)
        PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|end|>").save_pretrained(folder)
    return folder


def main() -> None:
    """Run the recipe and print its table."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    arguments.add_argument("--out", type=Path, default=Path("runs/smollm2_tokenizer"))
    arguments.add_argument("--articles", type=int, default=420, help="articles to train on")
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--epochs", type=int, default=6)
    given = arguments.parse_args()
    out: Path = given.out
    data = write_articles(out / "data", given.articles, 80)
    trained, held_out = (store(out, data, name) for name in ("train", "held-out"))
    base = {
        "student": {"config": STUDENT, "tokenizer": str(tokenizer(data / "train.jsonl", out / "tokenizer"))},
        "data": {"batch_size": 8, "validation": str(held_out)},
        "optim": {"learning_rate": 0.006, "warmup_steps": 20},
        "run": {"epochs": given.epochs, "device": "cpu", "validate_every": 10**9},
    }
    table = compare_variants(base, VARIANTS, trained, out / "students", seeds=range(given.seeds))
    print(table.markdown())


if __name__ == "__main__":
    main()
