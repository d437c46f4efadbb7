"""Weights in 8 and 4 bits: what is kept of them, what they compute, and the traps of bitsandbytes on a CPU.

Each trap is shown to be there in plain bitsandbytes, on a CPU that has it, and closed at every door of ours. The truth
is a GPT-2 in float64 whose weights are decoded here by hand (Dettmers et al. 2023, "QLoRA", section 3 and appendix E).
"""

import logging
import math
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GPT2LMHeadModel,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D
from trl import ModelConfig

from rlhf_recipes import PPOConfig, PPOTrainer, UserError, generate, load_reward
from rlhf_recipes.evaluation.language_model import completion_perplexity, perplexity
from rlhf_recipes.evaluation.models import completion_log_probs, evaluate_model
from rlhf_recipes.generation.sampling import Sampling
from rlhf_recipes.models.loading import load_causal_lm, load_reward_model, save_reward_model_config
from rlhf_recipes.models.quantization import quantization_kwargs
from rlhf_recipes.optimizations.attention import fuse_kernels_
from rlhf_recipes.system import workarounds
from rlhf_recipes.system.workarounds import apply_bitsandbytes_workarounds_
from rlhf_recipes.training.trainer import SafeTrainer

Make = Callable[..., Any]

KINDS: dict[str, dict[str, Any]] = {
    "8 bits": {"bits": 8},
    "4 bits": {"bits": 4},
    "4 bits, nested": {"bits": 4, "nested": True},
    "fp4": {"bits": 4, "quant_type": "fp4"},
}
FOUR = [name for name, each in KINDS.items() if each["bits"] == 4]
IDS = torch.tensor([[5, 6, 7, 8, 9, 100, 250, 3], [1, 2, 3, 4, 11, 12, 13, 14]])
avx512 = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="the kernel that counts blocks by rows is for AVX512"
)
repacks = pytest.mark.skipif(
    not has_avx512bf16(),
    reason="bitsandbytes packs 4-bit weights on processors with AVX512_BF16 only, not on this one",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, make_model: Make, tokenizer: Any) -> Path:
    """A folder that serves as policy, and as reward model beside it."""
    return left(tmp_path_factory.mktemp("bits") / "base", make_model, tokenizer)


def left(folder: Path, make_model: Make, tokenizer: Any, **shape: Any) -> Path:
    make_model(0, **{"n_embd": 64, "initializer_range": 0.1} | shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reward_model(base: Path, make_reward_model: Make, tokenizer: Any) -> Path:
    folder = base.parent / "reward_model"
    make_reward_model(3, n_embd=64, initializer_range=0.2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def plain(folder: Path, kind: str, auto: Any = AutoModelForCausalLM) -> Any:
    """As a user reads it without us."""
    return auto.from_pretrained(
        folder, dtype=torch.float32, device_map="cpu", **quantization_kwargs(**KINDS[kind])
    ).eval()


def ours(folder: Path, kind: str) -> Any:
    return load_causal_lm(str(folder), **quantization_kwargs(**KINDS[kind])).eval()


def adapted(model: Any, task: str = "CAUSAL_LM") -> Any:
    """With an adapter that says something, the same one each time."""
    torch.manual_seed(1)
    shape = {"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"], "init_lora_weights": False}
    prepared = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return get_peft_model(prepared, LoraConfig(task_type=task, **shape)).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.train()
    model(IDS, labels=IDS).loss.backward()
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def quantized_layers(model: Any) -> dict[str, Any]:
    return {name: each for name, each in model.named_modules() if isinstance(each, (Linear4bit, Linear8bitLt))}


def packed(model: Any) -> int:
    states = [each.weight.quant_state for each in model.modules() if isinstance(each, Linear4bit)]
    return sum(getattr(state, "packing_format_for_cpu", False) for state in states)


def files(model: Any, folder: Path) -> bytes:
    model.save_pretrained(folder)
    return (folder / "model.safetensors").read_bytes()


# The truth: decoded by hand, computed in float64.

NF4 = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], dtype=torch.float64,
)  # fmt: skip
FP4 = torch.tensor([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0], dtype=torch.float64) / 12


def decoded(layer: Any) -> torch.Tensor:
    """(out, in) in float64: two values a byte, the first in its upper half; a scale for each 64 of them."""
    if isinstance(layer, Linear8bitLt):
        scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
        return layer.weight.data.double() * scales.double()[:, None] / 127
    state, data = layer.weight.quant_state, layer.weight.data.reshape(-1).long()
    codes = torch.stack([data >> 4, data & 15], dim=1).reshape(-1)
    table = NF4 if state.quant_type == "nf4" else torch.cat([FP4, -FP4])
    scales = state.absmax
    if state.nested:
        blocks = torch.arange(len(scales)) // 256
        scales = state.state2.code.double()[scales.long()] * state.state2.absmax.double()[blocks] + state.offset
    shape = (layer.out_features, layer.in_features)
    return (table[codes].reshape(-1, 64) * scales.double()[:, None]).reshape(shape)


def truth(folder: Path, layers: dict[str, torch.Tensor], adapter: dict[str, torch.Tensor] | None = None) -> Any:
    """The logits of a GPT-2 in float64 with these weights (out, in), and with twice B x A of an adapter, if any."""
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float64).eval()
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            weight = layers.get(name, module.weight.data.T)
            if adapter is not None:
                down, up = (adapter[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
                weight = weight + 2.0 * up @ down  # lora_alpha 8 over r 4
            module.weight.data = weight.T.contiguous()
    return logits(model)


def computes_as_it_should(model: Any) -> bool:
    """Whether the output of each quantized layer is what it should be for its own input, as the model reads `IDS`.

    In 8 bits a state that lies in the middle may be rounded to either side; 0.02 is more than one of them moves.
    """
    seen: list[tuple[Any, Any, Any]] = []
    layers = quantized_layers(model).values()
    hooks = [each.register_forward_hook(lambda *call: seen.append(call)) for each in layers]
    logits(model)
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(hooks) > 0
    errors = [(output - product(layer, states)).abs() for layer, (states,), output in seen]
    furthest = 0.02 if isinstance(seen[0][0], Linear8bitLt) else 1e-4
    return all(error.median() < 1e-4 and error.max() < furthest for error in errors)


def product(layer: Any, states: torch.Tensor) -> torch.Tensor:
    """In 8 bits the states are rounded as well, by the largest of each (Dettmers et al. 2022, "LLM.int8()")."""
    states = states.double()
    if isinstance(layer, Linear8bitLt):
        states = states.half().double()
        scale = states.abs().amax(-1, keepdim=True) / 127
        states = (states / scale).round() * scale
    return states @ decoded(layer).T + layer.bias.detach().double()


def hand(model: Any) -> dict[str, torch.Tensor]:
    """Each quantized layer, decoded, under the name it has in the float model."""
    names = {name.removeprefix("base_model.model.").removesuffix(".base_layer") for name in quantized_layers(model)}
    assert len(names) == len(quantized_layers(model)) > 0
    return {
        name.removeprefix("base_model.model.").removesuffix(".base_layer"): decoded(layer)
        for name, layer in quantized_layers(model).items()
    }


# What is quantized, and what that computes.


@pytest.mark.parametrize("kind", KINDS)
def test_every_conv1d_is_really_quantized(kind: str, base: Path) -> None:
    model, whole = ours(base, kind), GPT2LMHeadModel.from_pretrained(base)
    conv1d = {name: each for name, each in whole.named_modules() if isinstance(each, Conv1D)}
    found = quantized_layers(model)
    assert set(found) == set(conv1d) and len(found) == 8
    assert {type(each) for each in found.values()} == {Linear8bitLt if kind == "8 bits" else Linear4bit}
    assert not any(isinstance(each, Conv1D) for each in model.modules())
    for name, layer in found.items():
        held, count = layer.weight.data, conv1d[name].weight.numel()
        assert held.dtype == (torch.int8 if kind == "8 bits" else torch.uint8)
        assert held.numel() == (count if kind == "8 bits" else count // 2)
        if kind != "8 bits":  # a scale for each 64 weights; nested in 8 bits, with one more for each 256 of those
            state, blocks = layer.weight.quant_state, count // 64
            assert state.absmax.numel() == blocks and state.nested == ("nested" in kind)
            assert state.absmax.dtype == (torch.uint8 if state.nested else torch.float32)
            assert not state.nested or state.state2.absmax.numel() == math.ceil(blocks / 256)
            assert state.quant_type == ("fp4" if kind == "fp4" else "nf4")


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_the_rounded_ones_and_logits_those_of_the_weights(kind: str, base: Path) -> None:
    model, whole = ours(base, kind), GPT2LMHeadModel.from_pretrained(base)
    weights = hand(model)
    for name, weight in weights.items():
        exact = whole.get_submodule(name).weight.T
        if kind == "8 bits":
            scale = exact.abs().amax(1, keepdim=True)
            assert ((weight - exact).abs() <= scale / 127 * 0.57).all()  # half a step; bitsandbytes reads float16
        else:
            widest = {"fp4": 1 / 6, "4 bits": 0.152, "4 bits, nested": 0.165}[kind]  # half the widest gap of the code
            scale = exact.reshape(-1, 64).abs().amax(1, keepdim=True)
            assert ((weight - exact).reshape(-1, 64).abs() <= scale * widest).all()
    assert computes_as_it_should(model)
    assert kind == "8 bits" or (logits(model) - truth(base, weights)).abs().max() < 1e-4
    assert (logits(model) - logits(whole)).abs().max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_a_quickened_model_in_bits_reads_the_same(kind: str, base: Path) -> None:
    model = ours(base, kind)
    before = logits(model)
    torch.testing.assert_close(logits(fuse_kernels_(model, torch.device("cpu"))), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [48, 80, 32, 96])
@pytest.mark.parametrize("kind", ["8 bits", "4 bits", "4 bits, nested"])
def test_odd_widths_load_answer_and_learn(
    kind: str, width: int, make_model: Make, tokenizer: Any, tmp_path: Path
) -> None:
    folder = left(tmp_path / "odd", make_model, tokenizer, n_embd=width)
    model = ours(folder, kind)
    assert len(generate(model, tokenizer, ["ab", "c"], max_new_tokens=3)) == 2
    assert computes_as_it_should(model)
    model = adapted(model)
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.05)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        gradients(model)
        optimizer.step()
        losses.append(model(IDS, labels=IDS).loss.item())
    assert losses[-1] < losses[0]


def test_what_is_said_of_every_product_in_8_bits_is_said_once(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = ours(base, "8 bits")
    workarounds._LOGGED_MESSAGES.clear()
    logits(model), logits(model)
    assert [record.getMessage() for record in caplog.records if "MatMul8bitLt" in record.getMessage()] == [
        "MatMul8bitLt: inputs will be cast from torch.float32 to float16 during quantization"
    ]


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_4_bits_are_asked_for_in_any_dtype(dtype: str, base: Path) -> None:
    model = load_causal_lm(str(base), ModelConfig(load_in_4bit=True, dtype=dtype))
    computed = {layer.compute_dtype for layer in quantized_layers(model).values()}
    assert computed == {torch.bfloat16 if dtype == "bfloat16" else torch.float32}


# The traps, in plain bitsandbytes.


@repacks
@pytest.mark.parametrize("kind", FOUR)
def test_trap_save_after_a_forward_pass(kind: str, base: Path, tmp_path: Path) -> None:
    model = plain(base, kind)
    before, expected = files(model, tmp_path / "before"), truth(base, hand(model))
    logits(model)
    assert packed(model) == 8
    assert files(model, tmp_path / "after") != before
    if "nested" not in kind:  # there only the scales drift
        wrong = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "after", device_map="cpu"))
        assert (wrong - expected).abs().max() > 0.05


@repacks
def test_trap_no_training_after_generation(base: Path) -> None:
    model = adapted(plain(base, "4 bits"))
    with torch.no_grad():
        model.generate(IDS, max_new_tokens=2, do_sample=False)
    with pytest.raises(RuntimeError, match="view of a leaf Variable that requires grad"):
        gradients(model)


@repacks
def test_trap_merged_wrong_after_a_forward_pass(base: Path) -> None:
    first, second = (adapted(plain(base, "4 bits")) for _ in range(2))
    logits(second)
    right, wrong = (logits(each.merge_and_unload()) for each in (first, second))
    assert (right - wrong).abs().max() > 0.2


@repacks
@pytest.mark.parametrize(
    ("width", "error"), [(48, AssertionError), (80, AssertionError), (32, RuntimeError), (96, RuntimeError)]
)
def test_trap_odd_widths(width: int, error: Any, make_model: Make, tokenizer: Any, tmp_path: Path) -> None:
    model = plain(left(tmp_path / "odd", make_model, tokenizer, n_embd=width), "4 bits")
    with pytest.raises(error):
        logits(model)


@avx512
def test_trap_odd_rows_are_decoded_with_the_scales_of_others() -> None:
    """In a process that has nothing of ours. The error is as large as the weights, and nothing is said of it."""
    program = (
        "import torch; from bitsandbytes.functional import dequantize_4bit, quantize_4bit; torch.manual_seed(0)\n"
        "for width in (48, 80, 32, 96, 64, 320):\n"
        "    weight = torch.randn(64, width)\n"
        "    again = dequantize_4bit(*quantize_4bit(weight, blocksize=64, quant_type='nf4'))\n"
        "    print((again - weight).abs().max().item())"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    errors = [float(line) for line in said.split()]
    assert all(error > 1.5 for error in errors[:4]) and all(error < 0.152 * 4.5 for error in errors[4:])


# The traps, at our doors: each is given a model that a user read without us, and asks it.


def trainer_of(
    folder: Path, model: Any, tokenizer: Any, reward: Any = None, unfrozen: int | None = None, **options: Any
) -> PPOTrainer:
    args = PPOConfig(
        output_dir=str(folder), per_device_train_batch_size=4, response_length=3, max_steps=4, report_to="none",
        disable_tqdm=True, save_strategy="no", hints=False, use_cpu=True, bf16=False, learning_rate=1e-3,
        log_completions=False, logging_steps=4, num_layers_unfrozen=unfrozen,
    )  # fmt: skip
    rows = [{"prompt": f"{row}?"} for row in range(4)]
    return PPOTrainer(model, reward or low_share, args, rows, processing_class=tokenizer, **options)


def low_share(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [sum(token < 128 for token in ids) / max(1, len(ids)) for ids in completion_ids]


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["c_attn", "c_proj"], **options)


def as_policy(model: Any, tokenizer: Any, folder: Path, base: Path) -> None:
    trainer_of(folder, model, tokenizer, peft_config=lora()).train()


def as_upper_policy(model: Any, tokenizer: Any, folder: Path, base: Path) -> None:
    trainer_of(folder, model, tokenizer, unfrozen=1, peft_config=lora()).train()


def as_reference(model: Any, tokenizer: Any, folder: Path, base: Path) -> None:
    trainer_of(folder, AutoModelForCausalLM.from_pretrained(base), tokenizer, ref_model=model).train()


def in_safe_trainer(model: Any, tokenizer: Any, folder: Path, base: Path) -> None:
    args = TrainingArguments(str(folder), use_cpu=True, report_to="none", max_steps=2, disable_tqdm=True)
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in IDS]
    trainer = SafeTrainer(adapted(model), args, train_dataset=rows, eval_dataset=rows)
    trainer.evaluate()
    trainer.train()


DOORS: dict[str, Callable[[Any, Any, Path, Path], Any]] = {
    "generate": lambda model, tokenizer, *_: generate(model, tokenizer, ["ab", "cde"], max_new_tokens=2),
    "perplexity": lambda model, tokenizer, *_: perplexity(model, tokenizer, ["a text"]),
    "completion_perplexity": lambda model, tokenizer, *_: completion_perplexity(model, tokenizer, [([1, 2], [3])]),
    "completion_log_probs": lambda model, *_: completion_log_probs(model, [[1, 2]], [[3, 4]]),
    "evaluate_model": lambda model, tokenizer, *_: evaluate_model(
        model, tokenizer, ["ab", "cde"], sampling=Sampling(2), reference=model, texts=["a text"]
    ),
    "policy": as_policy,
    "policy, upper layers": as_upper_policy,
    "reference": as_reference,
    "SafeTrainer": in_safe_trainer,
    "apply_bitsandbytes_workarounds_": lambda model, *_: logits(apply_bitsandbytes_workarounds_(model)),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", ["8 bits", "4 bits", "4 bits, nested"])
def test_a_model_that_was_asked_is_saved_as_before_and_is_what_it_was(
    kind: str, door: str, base: Path, tokenizer: Any, tmp_path: Path
) -> None:
    model = plain(base, kind)
    before, expected = files(model, tmp_path / "before"), {name: each.clone() for name, each in hand(model).items()}
    DOORS[door](model, tokenizer, tmp_path / "out", base)
    assert packed(model) == 0
    found = hand(model)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    if door in ("policy", "policy, upper layers", "SafeTrainer"):  # an adapter is on it, which alone would be saved
        return
    assert files(model, tmp_path / "after") == before
    again = apply_bitsandbytes_workarounds_(AutoModelForCausalLM.from_pretrained(tmp_path / "after", device_map="cpu"))
    close = {"rtol": 1e-4, "atol": 1e-4} if door == "reference" else {"rtol": 0, "atol": 0}  # which was quickened
    torch.testing.assert_close(logits(again), logits(model), **close)


@pytest.mark.parametrize("role", ["reward_model", "value"])
def test_a_reward_model_and_a_value_model_that_were_asked_are_what_they_were(
    role: str, base: Path, reward_model: Path, tokenizer: Any, tmp_path: Path
) -> None:
    model = plain(reward_model, "4 bits", AutoModelForSequenceClassification)
    expected = hand(model)
    if role == "reward_model":
        assert isinstance(model.score, torch.nn.Linear) and not quantized_layers(model.score)
        load_reward(model, tokenizer)(["a"], ["b"], prompt_ids=[[1]], completion_ids=[[2, 3]])
        policy: Any = AutoModelForCausalLM.from_pretrained(base)
        trainer_of(tmp_path, policy, tokenizer, model, reward_processing_classes=tokenizer).train()
    else:
        value = adapted(model, "SEQ_CLS")
        trainer_of(tmp_path, AutoModelForCausalLM.from_pretrained(base), tokenizer, value_model=value).train()
    assert packed(model) == 0
    assert all(torch.equal(each, expected[name]) for name, each in hand(model).items())


@pytest.mark.parametrize("kind", ["8 bits", *FOUR])
def test_training_after_generation_has_the_gradients_of_one_that_never_generated(
    kind: str, base: Path, tokenizer: Any
) -> None:
    asked, fresh = adapted(plain(base, kind)), adapted(ours(base, kind))
    generate(asked, tokenizer, ["ab", "cde"], max_new_tokens=4)
    found, expected = gradients(asked), gradients(fresh)
    assert found.keys() == expected.keys() and len(found) == 2 * 8
    assert all(torch.equal(found[name], expected[name]) and found[name].any() for name in found)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_after_generation_is_merging_before_it(kind: str, base: Path, tokenizer: Any) -> None:
    asked, fresh = adapted(plain(base, kind)), adapted(ours(base, kind))
    generate(asked, tokenizer, ["ab", "cde"], max_new_tokens=4)
    found, expected = (apply_bitsandbytes_workarounds_(each.merge_and_unload()) for each in (asked, fresh))
    assert torch.equal(logits(found), logits(expected))


@repacks
@pytest.mark.parametrize("kind", FOUR)
def test_what_was_packed_before_it_came_to_us_is_unpacked_and_said(
    kind: str, base: Path, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """But for the scales, which packing rounds to bfloat16: 8 bits of them are left, so 2^-8 of a weight."""
    model = plain(base, kind)
    exact = hand(model)
    logits(model)
    with caplog.at_level(logging.WARNING):
        generate(model, tokenizer, ["ab"], max_new_tokens=1)
    assert packed(model) == 0 and "had packed 8 4-bit layers" in caplog.text
    for name, weight in hand(model).items():
        assert ((weight - exact[name]).abs() <= exact[name].abs() * 2**-8 + 1e-9).all()
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(ours(tmp_path / "again", kind)), logits(model))
    assert len(gradients(adapted(model))) == 2 * 8


@repacks
@pytest.mark.parametrize("kind", ["4 bits", "fp4"])
def test_a_checkpoint_that_bitsandbytes_saved_wrong_is_read_right(kind: str, base: Path, tmp_path: Path) -> None:
    model = plain(base, kind)
    expected = truth(base, hand(model))
    logits(model)
    model.save_pretrained(tmp_path / "wrong")
    assert (logits(load_causal_lm(str(tmp_path / "wrong"))) - expected).abs().max() < 0.03


# Adapters on quantized bases.


@pytest.fixture
def saved(base: Path, tmp_path: Path) -> Callable[[str], tuple[Any, Path]]:
    """(kind) -> a model with an adapter, and the folder that it was saved to."""

    def save(kind: str) -> tuple[Any, Path]:
        model = adapted(ours(base, kind))
        model.save_pretrained(tmp_path / "adapter")
        return model, tmp_path / "adapter"

    return save


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_read_back_on_its_base_bit_for_bit(kind: str, saved: Any) -> None:
    model, folder = saved(kind)
    again = ours(folder, kind)
    assert isinstance(again, PeftModel) and len(quantized_layers(again)) == 8
    assert torch.equal(logits(again), logits(model))
    assert {name for name, each in again.named_parameters() if each.requires_grad} == {
        name for name, each in model.named_parameters() if each.requires_grad
    }


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_merged_into_the_base_in_full_precision(kind: str, saved: Any, base: Path) -> None:
    """Float64 says what both are: W + 2BA here, and with the rounded W there. So they differ by its rounding alone."""
    model, folder = saved(kind)
    adapter = load_file(folder / "adapter_model.safetensors")
    merged = load_causal_lm(str(folder)).eval()
    assert not quantized_layers(merged) and sum(isinstance(each, Conv1D) for each in merged.modules()) == 8
    assert (logits(merged) - truth(base, {}, adapter)).abs().max() < 1e-4
    rounded = truth(base, hand(model), adapter)
    assert (logits(model) - rounded).abs().max() < (0.2 if kind == "8 bits" else 1e-4)  # whose states are rounded too
    assert (logits(merged) - truth(base, {})).abs().max() > 0.5  # the adapter says something


def test_an_adapter_is_read_back_in_bfloat16_too(base: Path, tmp_path: Path) -> None:
    """Training brings what is not quantized to float32; reading does the same."""
    how: dict[str, Any] = {"dtype": torch.bfloat16} | quantization_kwargs(4)
    model = adapted(load_causal_lm(str(base), **how))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_causal_lm(str(tmp_path), **how).eval()), logits(model))


def test_an_adapter_in_bits_answers_and_is_measured_as_any_model(saved: Any, tokenizer: Any) -> None:
    model, folder = saved("4 bits, nested")
    again = ours(folder, "4 bits, nested")
    asked = {"sampling": Sampling(3), "reference": model, "texts": ["a text"]}
    found = evaluate_model(again, tokenizer, ["ab", "cde"], **asked)
    assert found.metrics["kl"] == 0.0 and math.isfinite(found.metrics["perplexity"])


def test_a_reward_models_adapter_is_read_back_on_its_base_with_its_head(
    base: Path, tokenizer: Any, tmp_path: Path, reward_model: Path
) -> None:
    options = quantization_kwargs(4, nested=True)
    model = load_reward_model(str(base), labels=1, **options)
    model.config.pad_token_id = tokenizer.pad_token_id
    model = adapted(model, "SEQ_CLS")
    model.save_pretrained(tmp_path)
    save_reward_model_config(model, tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rows = [[5, 6, 7, 8], [9, 10]]
    expected = load_reward(model, tokenizer).score_ids(rows)
    assert load_reward(str(tmp_path), tokenizer, **options).score_ids(rows) == expected
    policy: Any = AutoModelForCausalLM.from_pretrained(base)
    trainer = trainer_of(
        tmp_path / "out", policy, tokenizer, str(tmp_path), reward_quantization_config=options["quantization_config"]
    )
    trainer.train()
    assert trainer.rewards[0].score_ids(rows) == pytest.approx(expected, abs=1e-3)  # it was quickened
    in_full = load_reward(str(tmp_path), tokenizer)
    assert not quantized_layers(in_full.model)
    assert in_full.score_ids(rows) == pytest.approx(expected, abs=0.5) and in_full.score_ids(rows) != expected


def test_an_adapter_on_an_adapter_is_refused_in_bits(saved: Any, tmp_path: Path) -> None:
    _, folder = saved("4 bits")
    upper = get_peft_model(load_causal_lm(str(folder)), lora())
    upper.save_pretrained(tmp_path / "upper")
    assert load_causal_lm(str(tmp_path / "upper"))
    with pytest.raises(UserError, match=r"is an adapter on the adapter .* save it merged first"):
        load_causal_lm(str(tmp_path / "upper"), **quantization_kwargs(4))


# PPO in python.


@pytest.mark.parametrize("kind", ["8 bits", "4 bits, nested"])
def test_ppo_goes_on_with_an_adapter_on_a_quantized_base(
    kind: str, saved: Any, reward_model: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """The policy is the adapter of the folder, the reference that adapter as it came, the value one more."""
    model, folder = saved(kind)
    fuse_kernels_(model, torch.device("cpu"))  # as the policy will be
    (quantized,) = quantization_kwargs(**KINDS[kind]).values()
    bits = {"quantization_config": quantized, "reward_quantization_config": quantized}
    trainer = trainer_of(tmp_path / "out", str(folder), tokenizer, str(reward_model), **bits)
    assert set(trainer.model.policy.peft_config) == {"default", "ppo_value", "ppo_reference"}
    assert len(quantized_layers(trainer.rewards[0].model)) == 8
    assert torch.equal(logits(trainer.model.policy), logits(model))
    trainer.train()
    assert not torch.equal(logits(trainer.model.policy.eval()), logits(model))
    with trainer.collector.reference.active() as reference:
        assert torch.equal(logits(reference), logits(model))
    trainer.save_model()
    again = fuse_kernels_(ours(Path(str(trainer.args.output_dir)), kind), torch.device("cpu"))
    assert torch.equal(logits(again), logits(trainer.model.policy.eval()))


def test_a_value_model_in_bits_learns_by_its_adapter_or_is_refused(
    base: Path, reward_model: Path, tokenizer: Any, tmp_path: Path
) -> None:
    policy = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(UserError, match="a value model in 4 or 8 bits cannot be trained itself"):
        trainer_of(
            tmp_path, policy, tokenizer, value_model=load_reward_model(str(reward_model), **quantization_kwargs(4))
        )
    value = adapted(load_reward_model(str(reward_model), **quantization_kwargs(4)), "SEQ_CLS")
    before = {name: each.detach().clone() for name, each in value.named_parameters()}
    trainer = trainer_of(tmp_path, policy, tokenizer, value_model=value)
    trainer.train()
    moved = {name for name, each in value.named_parameters() if not torch.equal(each, before[name])}
    assert moved and all(".lora_" in name or "score.modules_to_save" in name for name in moved)
    assert any("score" in name for name in moved)
    trainer.save_model()
    kept = load_file(tmp_path / "value_model" / "adapter_model.safetensors")
    assert sum(".lora_" in name for name in kept) == 2 * 8 and any(name.endswith("score.weight") for name in kept)


def test_quantized_weights_are_never_trained_themselves(base: Path, tokenizer: Any, tmp_path: Path) -> None:
    (quantized,) = quantization_kwargs(4).values()
    with pytest.raises(UserError, match="pass peft_config to train an adapter on it"):
        trainer_of(tmp_path, str(base), tokenizer, quantization_config=quantized)
    with pytest.raises(UserError, match="load yours with it instead"):
        trainer_of(tmp_path, ours(base, "4 bits"), tokenizer, quantization_config=quantized)
    assert isinstance(quantized, BitsAndBytesConfig)


# Memory.


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left to themselves")
@pytest.mark.parametrize("kind", ["8 bits", "4 bits"])
def test_what_reading_took_is_given_back(kind: str, make_model: Make, tokenizer: Any, tmp_path: Path) -> None:
    """Of the resident set, that which is no file: it grows by about what is held, not by the weights as they were read."""
    folder = left(tmp_path / "wide", make_model, tokenizer, n_embd=512, n_layer=4)
    whole, before = 4 * 12 * 512**2 * 4, anonymous()
    model = ours(folder, kind)
    held = sum(layer.weight.numel() for layer in quantized_layers(model).values())
    assert held == whole // (4 if kind == "8 bits" else 8)
    assert anonymous() - before < held + whole / 4


@pytest.mark.parametrize("kind", ["8 bits", "4 bits", "4 bits, nested"])
def test_the_benchmark_counts_what_is_held_as_by_hand(kind: str, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    worker, model = __import__("quantization_worker"), ours(base, kind)
    logits(model)  # 8 bits keep their weights elsewhere from then on
    expected = 4 * (262 + 128) * 64 + 4 * 5 * 2 * 64  # embeddings, and five norms
    for layer in quantized_layers(model).values():
        count, blocks = layer.in_features * layer.out_features, layer.in_features * layer.out_features // 64
        scales = {"8 bits": 4 * layer.out_features, "4 bits": 4 * blocks}.get(
            kind, blocks + 4 * math.ceil(blocks / 256)
        )
        codes = {"8 bits": 0, "4 bits": 4 * 16}.get(kind, 4 * 16 + 4 * 256 + 4)
        expected += count // (1 if kind == "8 bits" else 2) + scales + codes + 4 * layer.out_features  # and the bias
    assert worker.bytes_in(worker.tensors_in(model)) == expected


def anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
