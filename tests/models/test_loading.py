"""Sizes, initialisation, loading with its refusals, LoRA folders, and what is decided for the hardware."""

import copy
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.models.gpt2 import SIZES, build_gpt2
from rlhf_recipes.models.loading import (
    build_lora_config,
    context_length,
    is_reward_model,
    load_causal_lm,
    load_config,
    load_reward_model,
    load_tokenizer,
    reward_label_count,
)
from rlhf_recipes.system.hardware import choose_precision, configure_cpu_runtime_

GPT2_VOCABULARY, BYTE_VOCABULARY = 50257, 262


def released_parameters(width: int, layers: int, positions: int, vocabulary: int) -> int:
    """Counted on paper: embeddings; a layer's attention 4 d^2, MLP 8 d^2, biases and norms 13 d; a last norm."""
    return (vocabulary + positions) * width + layers * (12 * width**2 + 13 * width) + 2 * width


def saved(model: Any, tokenizer: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


class Words:
    """As much of a tokenizer as a model's shape depends on."""

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
        ("gpt2", GPT2_VOCABULARY, 124.4),  # the four counts of the released models
        ("medium", GPT2_VOCABULARY, 354.8),
        ("large", GPT2_VOCABULARY, 774.0),
        ("xl", GPT2_VOCABULARY, 1557.6),
    ],
)
def test_sizes_have_their_parameter_counts(size: str, vocabulary: int, millions: float) -> None:
    with torch.device("meta"):
        model = build_gpt2(size, Words(vocabulary))  # type: ignore[arg-type]
    shape = SIZES[size]
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == released_parameters(shape["n_embd"], shape["n_layer"], shape["n_positions"], vocabulary)
    assert count / 1e6 == pytest.approx(millions, rel=0.1 if size in ("nano", "tiny", "mini") else 1e-3)


def test_a_new_model_starts_from_knowing_nothing(tokenizer: Any) -> None:
    """Its loss is that of guessing: log(vocabulary), up to the small spread of the first weights."""
    torch.manual_seed(0)
    model = build_gpt2("tiny", tokenizer, positions=64, dropout=0.0)
    ids = torch.randint(0, 256, (8, 64))
    assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(math.log(BYTE_VOCABULARY), abs=0.15)
    assert model.config.n_positions == 64 == context_length(model.config)
    assert (model.config.eos_token_id, model.config.pad_token_id) == (256, 257)
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (256, 257)
    assert model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()


def test_dropout_is_where_it_was_asked_for(tokenizer: Any) -> None:
    rates = {
        module.p
        for module in build_gpt2("tiny", tokenizer, dropout=0.3).modules()
        if type(module).__name__ == "Dropout"
    }
    assert rates == {0.3}
    with pytest.raises(UserError, match="tiny, mini, gpt2, medium, large, xl"):
        build_gpt2("huge", tokenizer)


def test_a_saved_model_comes_back_bit_for_bit(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> None:
    model = make_model(seed=3)
    folder = saved(model, tokenizer, tmp_path)
    loaded = load_causal_lm(folder)
    assert loaded.dtype == torch.float32
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name
    assert load_tokenizer(folder).get_vocab() == tokenizer.get_vocab()
    assert not is_reward_model(folder)


def test_a_lora_folder_is_its_base_with_the_product_added(
    make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    """Merged weights against W + (alpha / r) A B, worked out in float64."""
    from peft import get_peft_model
    from trl import ModelConfig

    base = saved(make_model(seed=1), tokenizer, tmp_path / "base")
    before = load_causal_lm(base).state_dict()
    config = build_lora_config(ModelConfig(use_peft=True, lora_r=2, lora_alpha=6))
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
        wanted = before[name].double() + 3.0 * (up @ down).T  # Conv1D keeps its weights transposed
        assert torch.allclose(merged[name].double(), wanted, atol=1e-5), name
    assert build_lora_config(ModelConfig()) is None


def test_an_adapter_on_a_merged_adapter_is_read_with_both(make_model: Any, tmp_path: Path) -> None:
    """As ppo with LoRA leaves it, if it started from the LoRA folder of sft."""
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
def test_reward_models_say_how_many_labels_they_have(
    make_reward_model: Callable[..., Any], tokenizer: Any, tmp_path: Path, labels: int
) -> None:
    folder = saved(make_reward_model(num_labels=labels), tokenizer, tmp_path)
    assert reward_label_count(folder) == labels == load_reward_model(folder).config.num_labels
    assert is_reward_model(folder)


def test_what_is_no_reward_model_is_refused_before_its_weights_are_read(
    make_model: Callable[..., Any], make_reward_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    model = saved(make_model(), tokenizer, tmp_path / "model")
    many = saved(make_reward_model(num_labels=3), tokenizer, tmp_path / "many")
    for folder in (model, many):
        (Path(folder) / "model.safetensors").unlink()
    with pytest.raises(UserError, match="not a sequence classifier"):
        load_reward_model(model)
    with pytest.raises(UserError, match="has 3 labels"):
        load_reward_model(many)


def test_a_language_model_becomes_a_reward_model_with_its_trunk(
    make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    model = make_model(seed=2)
    reward_model = load_reward_model(saved(model, tokenizer, tmp_path), labels=1)
    assert reward_model.score.weight.shape == (1, 32)
    trunk = reward_model.transformer.state_dict()
    assert all(torch.equal(weight, trunk[name]) for name, weight in model.transformer.state_dict().items())


def test_wrong_places_are_named(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> None:
    folder = saved(make_model(), tokenizer, tmp_path / "model")
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


def test_pickled_weights_are_not_read(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> None:
    """A pickle can run code while it is read."""
    folder = Path(saved(make_model(), tokenizer, tmp_path))
    torch.save(make_model().state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="safetensors"):
        load_causal_lm(str(folder))


@pytest.mark.parametrize(("token", "word"), [("eos_token", "EOS"), ("pad_token", "pad")])
def test_a_tokenizer_needs_eos_and_pad(tokenizer: Any, tmp_path: Path, token: str, word: str) -> None:
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({key: value for key, value in config.items() if key != token}), encoding="utf-8"
    )
    with pytest.raises(UserError, match=f"has no {word} token; set {token}"):
        load_tokenizer(str(tmp_path))


class Training:
    """The fields of a TrainingArguments that `choose_precision` and `configure_cpu_runtime_` read."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update({"use_cpu": True, "bf16": False, "mixed_precision": "no", **fields})


@pytest.mark.parametrize(
    ("width", "unit", "by_hardware", "expected"),
    [(320, "unit", True, True), (128, "unit", True, False), (320, "", True, False), (320, "unit", False, False)],
)
def test_bf16_is_chosen_where_it_pays_and_nobody_chose(
    monkeypatch: pytest.MonkeyPatch, width: int, unit: str, by_hardware: bool, expected: bool
) -> None:
    monkeypatch.setattr(import_module("rlhf_recipes.system.hardware"), "bf16_support", lambda: unit)
    training = Training(_bf16_by_hardware=by_hardware)
    before = copy.copy(training.__dict__)
    fitted = choose_precision(training, width)  # type: ignore[type-var]
    assert fitted.bf16 is expected and fitted.mixed_precision == ("bf16" if expected else "no")
    assert training.__dict__ == before, "the caller's own arguments are left alone"
    assert choose_precision(fitted, width) is fitted, "decided once"


def test_bf16_is_not_chosen_where_deepspeed_was_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("rlhf_recipes.system.hardware"), "bf16_support", lambda: "unit")
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 2}, "bf16": {"enabled": False}})
    training = Training(_bf16_by_hardware=True, deepspeed_plugin=plugin)
    assert choose_precision(training, 320).bf16 is False  # type: ignore[type-var]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept_for_the_next_tensor() -> None:
    """In a process of its own: of 64 MiB that were freed, all are still held, or next to none without the call."""
    script = (
        "import sys, torch\n"
        "from rlhf_recipes.system.hardware import keep_freed_memory_\n"
        "held = lambda: int(open('/proc/self/statm').read().split()[1]) // 256\n"
        "keep_freed_memory_() if sys.argv[1] == 'yes' else None\n"
        "before = held(); x = torch.ones(2**24); del x; print(held() - before)\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    found = [
        int(subprocess.check_output([sys.executable, "-c", script, word], env=environment, text=True).split()[-1])
        for word in ("yes", "no")
    ]
    assert found[0] >= 60 and found[1] <= 4


def test_onednn_keeps_few_kernels_unless_the_environment_names_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.setenv(name, "7")
    configure_cpu_runtime_(Training(), 64)  # type: ignore[arg-type]
    assert os.environ[name] == "7"
    monkeypatch.delenv(name)
    configure_cpu_runtime_(Training(use_cpu=False), 64)  # type: ignore[arg-type]
    assert name not in os.environ, "a GPU does not need it"
    configure_cpu_runtime_(Training(), 64)  # type: ignore[arg-type]
    assert 0 < int(os.environ[name]) < 1024


def test_threads_are_the_callers_where_the_environment_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    configure_cpu_runtime_(Training(), 64)  # type: ignore[arg-type]
    assert chosen == [], "OMP_NUM_THREADS is set in the tests"
    monkeypatch.delenv("OMP_NUM_THREADS")
    configure_cpu_runtime_(Training(), 64)  # type: ignore[arg-type]
    assert chosen == [1], "small layers run on one thread"
    training = Training()
    configure_cpu_runtime_(training, 64)  # type: ignore[arg-type]
    configure_cpu_runtime_(training, 64)  # type: ignore[arg-type]
    assert chosen == [1, 1], "once for each arguments object"
