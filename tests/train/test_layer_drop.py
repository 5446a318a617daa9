"""A student that begins as some layers of a checkpoint: which, in every kind of model, saved and loaded again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from kdcache.capture import capture
from kdcache.capture.config import CaptureConfig
from kdcache.config import parse_config
from kdcache.errors import ConfigError
from kdcache.train import train
from kdcache.train.config import StudentConfig
from kdcache.train.layer_drop import keep_layers
from tests import tiny
from tests.train.test_train import losses

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (AutoModelForCausalLM, {**SMALL, "num_hidden_layers": 6, "num_key_value_heads": 2}),
    "gpt2": (AutoModelForCausalLM, {"n_embd": 16, "n_head": 2, "n_layer": 6, "vocab_size": 50}),
    "gemma3_text": (
        AutoModelForCausalLM,
        {**SMALL, "num_hidden_layers": 6, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 4},
    ),
    "bert": (AutoModelForSequenceClassification, {**SMALL, "num_hidden_layers": 6}),
    "distilbert": (AutoModelForSequenceClassification, {"dim": 16, "n_heads": 2, "n_layers": 6, "hidden_dim": 32}),
}


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    auto, sizes = MODELS[kind]
    return auto.from_config(AutoConfig.for_model(kind, **sizes)).eval()


@pytest.mark.parametrize("kind", list(MODELS))
def test_the_kept_layers_are_those_of_the_checkpoint_and_it_loads_again(kind: str, tmp_path: Path) -> None:
    whole, model = model_of(kind), model_of(kind)
    keep_layers(model, [1, 4, 6])
    weights = dict(whole.named_parameters())
    renamed = 0
    for name, value in model.named_parameters():
        parts = name.split(".")
        number = next((place for place, part in enumerate(parts) if part.isdigit()), None)
        if number is not None:
            parts[number] = str([0, 3, 5][int(parts[number])])
            renamed += 1
        assert torch.equal(value, weights[".".join(parts)]), name
    assert renamed
    assert model.config.num_hidden_layers == 3
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    said = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    again = MODELS[kind][0].from_pretrained(tmp_path).eval()
    assert torch.allclose(again(input_ids=ids).logits, said, atol=1e-6)
    assert not torch.equal(whole(input_ids=ids).logits, said)


def test_a_kept_causal_model_generates_with_its_cache() -> None:
    model = model_of("llama")
    keep_layers(model, 2)
    ids = torch.tensor([[3, 1, 4]])
    made = [model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*made)


def test_a_number_of_layers_is_spread_from_the_first_to_the_last() -> None:
    for count, expected in ((1, [0]), (2, [0, 5]), (3, [0, 2, 5]), (6, [0, 1, 2, 3, 4, 5])):
        whole, model = model_of("llama"), model_of("llama")
        keep_layers(model, count)
        kept = [one.mlp.up_proj.weight for one in model.model.layers]
        assert [
            next(n for n, one in enumerate(whole.model.layers) if torch.equal(one.mlp.up_proj.weight, weight))
            for weight in kept
        ] == expected


def test_as_many_ids_that_end_a_text_as_layers_stay() -> None:
    torch.manual_seed(0)
    sizes = {**MODELS["llama"][1], "eos_token_id": [1, 2, 3, 4, 5, 6]}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes))
    keep_layers(model, 2)
    assert model.config.eos_token_id == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("layers", [0, 7, (), (0, 1), (2, 2), (3, 1), (1, 7)])
def test_layers_that_are_not_there_are_refused(layers: Any) -> None:
    with pytest.raises(ConfigError, match="layers"):
        keep_layers(model_of("llama"), layers)


def test_a_model_without_one_stack_of_layers_is_refused() -> None:
    sizes = {"d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 32, "num_layers": 2, "vocab_size": 50}
    with pytest.raises(ConfigError, match="stacks"):
        keep_layers(AutoModel.from_config(AutoConfig.for_model("t5", **sizes)), 1)


SIX = {**SMALL, "num_hidden_layers": 6, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8}


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        (
            "qwen3_moe",
            {**SIX, **EXPERTS, "mlp_only_layers": [1, 2]},
        ),
        ("diffllama", {**SMALL, "num_hidden_layers": 6, "num_key_value_heads": 2}),
        (
            "gpt_neo",
            {"hidden_size": 16, "num_heads": 2, "num_layers": 6, "attention_types": [[["global", "local"], 3]]},
        ),
    ],
)
def test_layers_that_would_load_as_others_are_refused(kind: str, sizes: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{"vocab_size": 50, **sizes}))
    with pytest.raises(ConfigError, match="is not what its configuration makes"):
        keep_layers(model, [1, 4, 6])


def test_layers_are_kept_of_a_checkpoint_only() -> None:
    with pytest.raises(ConfigError, match="keep_layers goes with model"):
        parse_config(StudentConfig, {"config": {"model_type": "llama"}, "keep_layers": 2})


def test_a_student_of_its_teachers_layers_begins_ahead_of_one_from_scratch(tmp_path: Path) -> None:
    tree = tiny.capture_tree(tmp_path)
    capture(parse_config(CaptureConfig, tree), tmp_path / "store")
    from kdcache.train.config import TrainConfig

    teacher = str(tree["teacher"]["model"])
    scratch = {"model_type": "llama", **{k: v for k, v in SMALL.items() if k != "vocab_size"}, "num_hidden_layers": 1}
    first = {}
    for name, student in (("kept", {"model": teacher, "keep_layers": 1}), ("scratch", {"config": scratch})):
        config = {"student": student, "loss": {"alpha": 1.0}, "run": {"steps": 2, "device": "cpu"}}
        result = train(parse_config(TrainConfig, config), tmp_path / "store", tmp_path / name)
        first[name] = losses(tmp_path / name)[0]
    assert first["kept"] < first["scratch"]
    assert result.student_parameters > 0
    assert AutoConfig.from_pretrained(tmp_path / "kept").num_hidden_layers == 1
