"""Model sizes, initialization, loading and its errors, and LoRA folders."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.models.architectures import context_length
from rlhf_recipes.models.gpt2 import SIZES, build_gpt2
from rlhf_recipes.models.loading import (
    is_reward_model,
    load_causal_lm,
    load_config,
    load_reward_model,
    load_tokenizer,
    reward_label_count,
)
from rlhf_recipes.models.lora import build_lora_config

GPT2_VOCABULARY, BYTE_VOCABULARY = 50257, 262


def released_parameters(width: int, layers: int, positions: int, vocabulary: int) -> int:
    """Count parameters: embeddings; per layer attention 4 d^2, MLP 8 d^2, biases and norms 13 d; the final norm."""
    return (vocabulary + positions) * width + layers * (12 * width**2 + 13 * width) + 2 * width


def save(model: Any, tokenizer: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


class TokenizerStub:
    """The attributes of a tokenizer that decide a model's shape."""

    eos_token_id, pad_token_id = 0, 1

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


@pytest.mark.parametrize(
    ("size", "vocabulary", "millions"),
    [
        ("nano", 1024, 0.5),
        ("tiny", 1536, 1.0),
        ("mini", 8192, 10.0),
        ("gpt2", GPT2_VOCABULARY, 124.4),  # the parameter counts of the four released models
        ("medium", GPT2_VOCABULARY, 354.8),
        ("large", GPT2_VOCABULARY, 774.0),
        ("xl", GPT2_VOCABULARY, 1557.6),
    ],
)
def test_gpt2_sizes_have_the_expected_parameter_counts(size: str, vocabulary: int, millions: float) -> None:
    with torch.device("meta"):
        model = build_gpt2(size, TokenizerStub(vocabulary))  # type: ignore[arg-type]
    shape = SIZES[size]
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == released_parameters(shape["n_embd"], shape["n_layer"], shape["n_positions"], vocabulary)
    assert count / 1e6 == pytest.approx(millions, rel=0.1 if size in ("nano", "tiny", "mini") else 1e-3)


def test_a_new_model_has_the_loss_of_uniform_predictions(tokenizer: Any) -> None:
    """The loss is log(vocabulary), up to the small variance of the initial weights."""
    torch.manual_seed(0)
    model = build_gpt2("tiny", tokenizer, positions=64, dropout=0.0)
    ids = torch.randint(0, 256, (8, 64))
    assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(math.log(BYTE_VOCABULARY), abs=0.15)
    assert model.config.n_positions == 64 == context_length(model.config)
    assert (model.config.eos_token_id, model.config.pad_token_id) == (256, 257)
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (256, 257)
    assert model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()


def test_dropout_is_set_in_all_layers(tokenizer: Any) -> None:
    rates = {
        module.p
        for module in build_gpt2("tiny", tokenizer, dropout=0.3).modules()
        if type(module).__name__ == "Dropout"
    }
    assert rates == {0.3}
    with pytest.raises(UserError, match="tiny, mini, gpt2, medium, large, xl"):
        build_gpt2("huge", tokenizer)


def test_a_saved_model_reloads_bit_for_bit(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> None:
    model = make_model(seed=3)
    folder = save(model, tokenizer, tmp_path)
    loaded = load_causal_lm(folder)
    assert loaded.dtype == torch.float32
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name
    assert load_tokenizer(folder).get_vocab() == tokenizer.get_vocab()
    assert not is_reward_model(folder)


def test_a_lora_folder_loads_merged_into_its_base(
    make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    """Compare the merged weights with W + (alpha / r) B A in float64."""
    from peft import get_peft_model
    from trl import ModelConfig

    base = save(make_model(seed=1), tokenizer, tmp_path / "base")
    before = load_causal_lm(base).state_dict()
    config = build_lora_config(ModelConfig(use_peft=True, lora_r=2, lora_alpha=6), load_config(base))
    adapted = get_peft_model(load_causal_lm(base), config)
    weights = {name: weight for name, weight in adapted.named_parameters() if "lora_" in name}
    for index, weight in enumerate(weights.values()):
        torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(index))
    adapted.save_pretrained(tmp_path / "adapter")
    merged = load_causal_lm(str(tmp_path / "adapter")).state_dict()
    changed = [name for name in before if not torch.equal(before[name], merged[name])]
    assert len(changed) == 2 * 4, "c_attn, both c_proj and c_fc of two layers"
    for name in changed:
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        down, up = (weights[f"{stem}.lora_{letter}.default.weight"].detach().double() for letter in "AB")
        expected = before[name].double() + 3.0 * (up @ down).T  # Conv1D stores its weights transposed
        assert torch.allclose(merged[name].double(), expected, atol=1e-5), name
    assert build_lora_config(ModelConfig(), load_config(base)) is None


def test_an_adapter_on_a_merged_adapter_loads_with_both(make_model: Any, tmp_path: Path) -> None:
    """PPO with LoRA saves such a folder if it starts from the LoRA folder of SFT."""
    from peft import LoraConfig, get_peft_model

    make_model(0).save_pretrained(tmp_path / "base")
    source, ids = str(tmp_path / "base"), torch.tensor([[1, 2, 3]])
    for name in ("first", "second"):
        torch.manual_seed(len(name))
        config = LoraConfig(
            task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False
        )
        model = get_peft_model(load_causal_lm(source), config).eval()
        model.save_pretrained(tmp_path / name)
        source = str(tmp_path / name)
        with torch.no_grad():
            torch.testing.assert_close(load_causal_lm(source).eval()(ids).logits, model(ids).logits)


@pytest.mark.parametrize("labels", [1, 2])
def test_reward_label_count_is_read_from_the_config(
    make_reward_model: Callable[..., Any], tokenizer: Any, tmp_path: Path, labels: int
) -> None:
    folder = save(make_reward_model(num_labels=labels), tokenizer, tmp_path)
    assert reward_label_count(folder) == labels == load_reward_model(folder).config.num_labels
    assert is_reward_model(folder)


def test_invalid_reward_models_are_refused_before_loading_weights(
    make_model: Callable[..., Any], make_reward_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    model = save(make_model(), tokenizer, tmp_path / "model")
    many = save(make_reward_model(num_labels=3), tokenizer, tmp_path / "many")
    for folder in (model, many):
        (Path(folder) / "model.safetensors").unlink()
    with pytest.raises(UserError, match="not a sequence classifier"):
        load_reward_model(model)
    with pytest.raises(UserError, match="has 3 labels"):
        load_reward_model(many)


def test_a_language_model_loads_as_a_reward_model_with_its_trunk(
    make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    model = make_model(seed=2)
    reward_model = load_reward_model(save(model, tokenizer, tmp_path), labels=1)
    assert reward_model.score.weight.shape == (1, 32)
    trunk = reward_model.transformer.state_dict()
    assert all(torch.equal(weight, trunk[name]) for name, weight in model.transformer.state_dict().items())


def test_errors_name_the_missing_model_or_tokenizer(
    make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    folder = save(make_model(), tokenizer, tmp_path / "model")
    cases: list[tuple[Callable[..., Any], str, str]] = [
        (load_config, f"{folder}/config.json", "is a file"),
        (load_causal_lm, str(tmp_path / "nowhere"), "no such folder"),
        (load_tokenizer, "runs/not/made", "no such folder"),
        (load_causal_lm, "somebody/something", "HF_HUB_OFFLINE=1"),
        (load_config, str(tmp_path), "cannot be loaded"),
        (load_tokenizer, str(tmp_path), "cannot be loaded"),
    ]
    for load, name, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            load(name)
        assert "\n" not in str(caught.value)


def test_pickled_weights_are_refused(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> None:
    """Loading a pickle can run code."""
    folder = Path(save(make_model(), tokenizer, tmp_path))
    torch.save(make_model().state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="safetensors"):
        load_causal_lm(str(folder))


@pytest.mark.parametrize(("token", "word"), [("eos_token", "EOS"), ("pad_token", "pad")])
def test_a_tokenizer_without_eos_or_pad_is_refused(tokenizer: Any, tmp_path: Path, token: str, word: str) -> None:
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({key: value for key, value in config.items() if key != token}), encoding="utf-8"
    )
    with pytest.raises(UserError, match=f"has no {word} token; set {token}"):
        load_tokenizer(str(tmp_path))
