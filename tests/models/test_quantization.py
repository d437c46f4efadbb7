"""Quantized models: their weights, their logits, and the workarounds for bugs of bitsandbytes on the CPU.

One test shows each bug in plain bitsandbytes on a CPU that has it; others show that no function of this package runs into
it. The expected logits come from a GPT-2 in float64 with weights decoded by hand (Dettmers et al. 2023, "QLoRA", section 3
and appendix E).
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

MakeModel = Callable[..., Any]

QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8},
    "nf4": {"bits": 4},
    "nf4, nested": {"bits": 4, "nested": True},
    "fp4": {"bits": 4, "quant_type": "fp4"},
}
FOUR_BIT = [name for name, options in QUANTIZATIONS.items() if options["bits"] == 4]
IDS = torch.tensor([[5, 6, 7, 8, 9, 100, 250, 3], [1, 2, 3, 4, 11, 12, 13, 14]])
avx512 = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="only the AVX512 kernel counts blocks by rows"
)
packs_weights = pytest.mark.skipif(
    not has_avx512bf16(),
    reason="bitsandbytes packs 4-bit weights on processors with AVX512_BF16 only",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, make_model: MakeModel, tokenizer: Any) -> Path:
    """Return the folder of the language model that tests quantize."""
    return save_model(tmp_path_factory.mktemp("quantized") / "base", make_model, tokenizer)


def save_model(folder: Path, make_model: MakeModel, tokenizer: Any, **shape: Any) -> Path:
    make_model(0, **{"n_embd": 64, "initializer_range": 0.1} | shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reward_model(base: Path, make_reward_model: MakeModel, tokenizer: Any) -> Path:
    folder = base.parent / "reward_model"
    make_reward_model(3, n_embd=64, initializer_range=0.2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load_without_workarounds(folder: Path, quantization: str, auto: Any = AutoModelForCausalLM) -> Any:
    """Load as a user of transformers does, without the workarounds."""
    return auto.from_pretrained(
        folder, dtype=torch.float32, device_map="cpu", **quantization_kwargs(**QUANTIZATIONS[quantization])
    ).eval()


def load_model(folder: Path, quantization: str) -> Any:
    return load_causal_lm(str(folder), **quantization_kwargs(**QUANTIZATIONS[quantization])).eval()


def with_adapter(model: Any, task: str = "CAUSAL_LM") -> Any:
    """Add a LoRA adapter that changes the logits; every call adds the same one."""
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
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def quantized_layers(model: Any) -> dict[str, Any]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, (Linear4bit, Linear8bitLt))}


def count_packed_layers(model: Any) -> int:
    states = [layer.weight.quant_state for layer in model.modules() if isinstance(layer, Linear4bit)]
    return sum(getattr(state, "packing_format_for_cpu", False) for state in states)


def saved_weights(model: Any, folder: Path) -> bytes:
    model.save_pretrained(folder)
    return (folder / "model.safetensors").read_bytes()


# Expected logits: weights decoded by hand, computed in float64.

NF4 = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], dtype=torch.float64,
)  # fmt: skip
FP4 = torch.tensor([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0], dtype=torch.float64) / 12


def decode(layer: Any) -> torch.Tensor:
    """Decode a layer to (out, in) in float64: two 4-bit values a byte, the first in the upper half; one scale per 64."""
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


def float64_logits(
    folder: Path, layers: dict[str, torch.Tensor], adapter: dict[str, torch.Tensor] | None = None
) -> Any:
    """Return the logits of a float64 GPT-2 with these weights (out, in), plus 2 B x A if there is an adapter."""
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float64).eval()
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            weight = layers.get(name, module.weight.data.T)
            if adapter is not None:
                down, up = (adapter[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
                weight = weight + 2.0 * up @ down  # lora_alpha 8 over r 4
            module.weight.data = weight.T.contiguous()
    return logits(model)


def outputs_match_decoded_weights(model: Any) -> bool:
    """Tell whether each quantized layer's output follows from its input and decoded weights, in a forward pass of `IDS`.

    With int8 an activation halfway between two codes may be rounded either way; that changes an output by less than 0.02.
    """
    calls: list[tuple[Any, Any, Any]] = []
    layers = quantized_layers(model).values()
    hooks = [layer.register_forward_hook(lambda *call: calls.append(call)) for layer in layers]
    logits(model)
    for hook in hooks:
        hook.remove()
    assert len(calls) == len(hooks) > 0
    errors = [(output - expected_output(layer, states)).abs() for layer, (states,), output in calls]
    tolerance = 0.02 if isinstance(calls[0][0], Linear8bitLt) else 1e-4
    return all(error.median() < 1e-4 and error.max() < tolerance for error in errors)


def expected_output(layer: Any, states: torch.Tensor) -> torch.Tensor:
    """Compute a layer's output in float64; int8 also rounds the inputs row by row (Dettmers et al. 2022, "LLM.int8()")."""
    states = states.double()
    if isinstance(layer, Linear8bitLt):
        states = states.half().double()
        scale = states.abs().amax(-1, keepdim=True) / 127
        states = (states / scale).round() * scale
    return states @ decode(layer).T + layer.bias.detach().double()


def decoded_layers(model: Any) -> dict[str, torch.Tensor]:
    """Return each quantized layer, decoded, under its name in the float model."""
    names = {name.removeprefix("base_model.model.").removesuffix(".base_layer") for name in quantized_layers(model)}
    assert len(names) == len(quantized_layers(model)) > 0
    return {
        name.removeprefix("base_model.model.").removesuffix(".base_layer"): decode(layer)
        for name, layer in quantized_layers(model).items()
    }


# Quantized weights and their logits.


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_every_conv1d_is_quantized(quantization: str, base: Path) -> None:
    model, float_model = load_model(base, quantization), GPT2LMHeadModel.from_pretrained(base)
    conv1d = {name: layer for name, layer in float_model.named_modules() if isinstance(layer, Conv1D)}
    layers = quantized_layers(model)
    assert set(layers) == set(conv1d) and len(layers) == 8
    assert {type(layer) for layer in layers.values()} == {Linear8bitLt if quantization == "int8" else Linear4bit}
    assert not any(isinstance(layer, Conv1D) for layer in model.modules())
    for name, layer in layers.items():
        data, count = layer.weight.data, conv1d[name].weight.numel()
        assert data.dtype == (torch.int8 if quantization == "int8" else torch.uint8)
        assert data.numel() == (count if quantization == "int8" else count // 2)
        if quantization != "int8":
            # One scale per 64 weights; if nested, 8-bit scales and one more scale per 256 of them.
            state, blocks = layer.weight.quant_state, count // 64
            assert state.absmax.numel() == blocks and state.nested == ("nested" in quantization)
            assert state.absmax.dtype == (torch.uint8 if state.nested else torch.float32)
            assert not state.nested or state.state2.absmax.numel() == math.ceil(blocks / 256)
            assert state.quant_type == ("fp4" if quantization == "fp4" else "nf4")


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_quantized_weights_are_rounded_and_logits_follow_them(quantization: str, base: Path) -> None:
    model, float_model = load_model(base, quantization), GPT2LMHeadModel.from_pretrained(base)
    weights = decoded_layers(model)
    for name, weight in weights.items():
        exact = float_model.get_submodule(name).weight.T
        if quantization == "int8":
            scale = exact.abs().amax(1, keepdim=True)
            # Half a step, and the rounding of bitsandbytes to float16.
            assert ((weight - exact).abs() <= scale / 127 * 0.57).all()
        else:
            # Half the widest gap between two codes.
            half_gap = {"fp4": 1 / 6, "nf4": 0.152, "nf4, nested": 0.165}[quantization]
            scale = exact.reshape(-1, 64).abs().amax(1, keepdim=True)
            assert ((weight - exact).reshape(-1, 64).abs() <= scale * half_gap).all()
    assert outputs_match_decoded_weights(model)
    assert quantization == "int8" or (logits(model) - float64_logits(base, weights)).abs().max() < 1e-4
    assert (logits(model) - logits(float_model)).abs().max() > 0.01


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_fused_kernels_do_not_change_logits_of_quantized_models(quantization: str, base: Path) -> None:
    model = load_model(base, quantization)
    before = logits(model)
    torch.testing.assert_close(logits(fuse_kernels_(model, torch.device("cpu"))), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [48, 80, 32, 96])
@pytest.mark.parametrize("quantization", ["int8", "nf4", "nf4, nested"])
def test_odd_widths_load_generate_and_train(
    quantization: str, width: int, make_model: MakeModel, tokenizer: Any, tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "odd", make_model, tokenizer, n_embd=width)
    model = load_model(folder, quantization)
    assert len(generate(model, tokenizer, ["ab", "c"], max_new_tokens=3)) == 2
    assert outputs_match_decoded_weights(model)
    model = with_adapter(model)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.05)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        gradients(model)
        optimizer.step()
        losses.append(model(IDS, labels=IDS).loss.item())
    assert losses[-1] < losses[0]


def test_int8_warning_is_logged_once(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load_model(base, "int8")
    workarounds._LOGGED_MESSAGES.clear()
    logits(model), logits(model)
    assert [record.getMessage() for record in caplog.records if "MatMul8bitLt" in record.getMessage()] == [
        "MatMul8bitLt: inputs will be cast from torch.float32 to float16 during quantization"
    ]


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_load_in_4bit_works_with_every_dtype(dtype: str, base: Path) -> None:
    model = load_causal_lm(str(base), ModelConfig(load_in_4bit=True, dtype=dtype))
    compute_dtypes = {layer.compute_dtype for layer in quantized_layers(model).values()}
    assert compute_dtypes == {torch.bfloat16 if dtype == "bfloat16" else torch.float32}


# The bugs, in plain bitsandbytes.


@packs_weights
@pytest.mark.parametrize("quantization", FOUR_BIT)
def test_bitsandbytes_bug_wrong_save_after_a_forward_pass(quantization: str, base: Path, tmp_path: Path) -> None:
    model = load_without_workarounds(base, quantization)
    before, expected = saved_weights(model, tmp_path / "before"), float64_logits(base, decoded_layers(model))
    logits(model)
    assert count_packed_layers(model) == 8
    assert saved_weights(model, tmp_path / "after") != before
    if "nested" not in quantization:  # with nested scales, only the scales differ
        wrong = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "after", device_map="cpu"))
        assert (wrong - expected).abs().max() > 0.05


@packs_weights
def test_bitsandbytes_bug_no_training_after_generation(base: Path) -> None:
    model = with_adapter(load_without_workarounds(base, "nf4"))
    with torch.no_grad():
        model.generate(IDS, max_new_tokens=2, do_sample=False)
    with pytest.raises(RuntimeError, match="view of a leaf Variable that requires grad"):
        gradients(model)


@packs_weights
def test_bitsandbytes_bug_wrong_merge_after_a_forward_pass(base: Path) -> None:
    first, second = (with_adapter(load_without_workarounds(base, "nf4")) for _ in range(2))
    logits(second)
    right, wrong = (logits(model.merge_and_unload()) for model in (first, second))
    assert (right - wrong).abs().max() > 0.2


@packs_weights
@pytest.mark.parametrize(
    ("width", "error"), [(48, AssertionError), (80, AssertionError), (32, RuntimeError), (96, RuntimeError)]
)
def test_bitsandbytes_bug_errors_at_odd_widths(
    width: int, error: Any, make_model: MakeModel, tokenizer: Any, tmp_path: Path
) -> None:
    model = load_without_workarounds(save_model(tmp_path / "odd", make_model, tokenizer, n_embd=width), "nf4")
    with pytest.raises(error):
        logits(model)


@avx512
def test_bitsandbytes_bug_wrong_scales_in_odd_rows() -> None:
    """In a process without this package. The error is as large as the weights, and there is no message."""
    program = (
        "import torch; from bitsandbytes.functional import dequantize_4bit, quantize_4bit; torch.manual_seed(0)\n"
        "for width in (48, 80, 32, 96, 64, 320):\n"
        "    weight = torch.randn(64, width)\n"
        "    decoded = dequantize_4bit(*quantize_4bit(weight, blocksize=64, quant_type='nf4'))\n"
        "    print((decoded - weight).abs().max().item())"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    errors = [float(line) for line in output.split()]
    assert all(error > 1.5 for error in errors[:4]) and all(error < 0.152 * 4.5 for error in errors[4:])


# The same bugs, through this package: each entry point runs a model that was loaded without the workarounds.


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


def train_policy(model: Any, tokenizer: Any, folder: Path, base: Path) -> None:
    trainer_of(folder, model, tokenizer, peft_config=lora()).train()


def train_upper_layers(model: Any, tokenizer: Any, folder: Path, base: Path) -> None:
    trainer_of(folder, model, tokenizer, unfrozen=1, peft_config=lora()).train()


def train_with_reference(model: Any, tokenizer: Any, folder: Path, base: Path) -> None:
    trainer_of(folder, AutoModelForCausalLM.from_pretrained(base), tokenizer, ref_model=model).train()


def train_with_safe_trainer(model: Any, tokenizer: Any, folder: Path, base: Path) -> None:
    args = TrainingArguments(str(folder), use_cpu=True, report_to="none", max_steps=2, disable_tqdm=True)
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in IDS]
    trainer = SafeTrainer(with_adapter(model), args, train_dataset=rows, eval_dataset=rows)
    trainer.evaluate()
    trainer.train()


ENTRY_POINTS: dict[str, Callable[[Any, Any, Path, Path], Any]] = {
    "generate": lambda model, tokenizer, *_: generate(model, tokenizer, ["ab", "cde"], max_new_tokens=2),
    "perplexity": lambda model, tokenizer, *_: perplexity(model, tokenizer, ["a text"]),
    "completion_perplexity": lambda model, tokenizer, *_: completion_perplexity(model, tokenizer, [([1, 2], [3])]),
    "completion_log_probs": lambda model, *_: completion_log_probs(model, [[1, 2]], [[3, 4]]),
    "evaluate_model": lambda model, tokenizer, *_: evaluate_model(
        model, tokenizer, ["ab", "cde"], sampling=Sampling(2), reference=model, texts=["a text"]
    ),
    "policy": train_policy,
    "policy, upper layers": train_upper_layers,
    "reference": train_with_reference,
    "SafeTrainer": train_with_safe_trainer,
    "apply_bitsandbytes_workarounds_": lambda model, *_: logits(apply_bitsandbytes_workarounds_(model)),
}


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
@pytest.mark.parametrize("quantization", ["int8", "nf4", "nf4, nested"])
def test_entry_points_change_neither_weights_nor_saved_files(
    quantization: str, entry_point: str, base: Path, tokenizer: Any, tmp_path: Path
) -> None:
    model = load_without_workarounds(base, quantization)
    before, expected = (
        saved_weights(model, tmp_path / "before"),
        {name: weight.clone() for name, weight in decoded_layers(model).items()},
    )
    ENTRY_POINTS[entry_point](model, tokenizer, tmp_path / "out", base)
    assert count_packed_layers(model) == 0
    actual = decoded_layers(model)
    assert actual.keys() == expected.keys() and all(torch.equal(actual[name], expected[name]) for name in actual)
    if entry_point in ("policy", "policy, upper layers", "SafeTrainer"):  # only the adapter would be saved
        return
    assert saved_weights(model, tmp_path / "after") == before
    reloaded = apply_bitsandbytes_workarounds_(
        AutoModelForCausalLM.from_pretrained(tmp_path / "after", device_map="cpu")
    )
    # The kernels of a reference are fused.
    tolerances = {"rtol": 1e-4, "atol": 1e-4} if entry_point == "reference" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(logits(reloaded), logits(model), **tolerances)


@pytest.mark.parametrize("role", ["reward_model", "value"])
def test_reward_and_value_models_keep_their_quantized_weights(
    role: str, base: Path, reward_model: Path, tokenizer: Any, tmp_path: Path
) -> None:
    model = load_without_workarounds(reward_model, "nf4", AutoModelForSequenceClassification)
    expected = decoded_layers(model)
    if role == "reward_model":
        assert isinstance(model.score, torch.nn.Linear) and not quantized_layers(model.score)
        load_reward(model, tokenizer)(["a"], ["b"], prompt_ids=[[1]], completion_ids=[[2, 3]])
        policy: Any = AutoModelForCausalLM.from_pretrained(base)
        trainer_of(tmp_path, policy, tokenizer, model, reward_processing_classes=tokenizer).train()
    else:
        value = with_adapter(model, "SEQ_CLS")
        trainer_of(tmp_path, AutoModelForCausalLM.from_pretrained(base), tokenizer, value_model=value).train()
    assert count_packed_layers(model) == 0
    assert all(torch.equal(weight, expected[name]) for name, weight in decoded_layers(model).items())


@pytest.mark.parametrize("quantization", ["int8", *FOUR_BIT])
def test_generation_does_not_change_later_gradients(quantization: str, base: Path, tokenizer: Any) -> None:
    generated, fresh = (
        with_adapter(load_without_workarounds(base, quantization)),
        with_adapter(load_model(base, quantization)),
    )
    generate(generated, tokenizer, ["ab", "cde"], max_new_tokens=4)
    actual, expected = gradients(generated), gradients(fresh)
    assert actual.keys() == expected.keys() and len(actual) == 2 * 8
    assert all(torch.equal(actual[name], expected[name]) and actual[name].any() for name in actual)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_generation_does_not_change_a_later_merge(quantization: str, base: Path, tokenizer: Any) -> None:
    generated, fresh = (
        with_adapter(load_without_workarounds(base, quantization)),
        with_adapter(load_model(base, quantization)),
    )
    generate(generated, tokenizer, ["ab", "cde"], max_new_tokens=4)
    actual, expected = (apply_bitsandbytes_workarounds_(model.merge_and_unload()) for model in (generated, fresh))
    assert torch.equal(logits(actual), logits(expected))


@packs_weights
@pytest.mark.parametrize("quantization", FOUR_BIT)
def test_packed_layers_are_unpacked_with_a_warning(
    quantization: str, base: Path, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Packing rounds the scales to bfloat16, which keeps 8 bits: weights differ by at most 2^-8 of their size."""
    model = load_without_workarounds(base, quantization)
    exact = decoded_layers(model)
    logits(model)
    with caplog.at_level(logging.WARNING):
        generate(model, tokenizer, ["ab"], max_new_tokens=1)
    assert count_packed_layers(model) == 0 and "had packed 8 4-bit layers" in caplog.text
    for name, weight in decoded_layers(model).items():
        assert ((weight - exact[name]).abs() <= exact[name].abs() * 2**-8 + 1e-9).all()
    model.save_pretrained(tmp_path / "reloaded")
    assert torch.equal(logits(load_model(tmp_path / "reloaded", quantization)), logits(model))
    assert len(gradients(with_adapter(model))) == 2 * 8


@packs_weights
@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_a_checkpoint_saved_with_packed_layers_loads_correctly(quantization: str, base: Path, tmp_path: Path) -> None:
    model = load_without_workarounds(base, quantization)
    expected = float64_logits(base, decoded_layers(model))
    logits(model)
    model.save_pretrained(tmp_path / "wrong")
    assert (logits(load_causal_lm(str(tmp_path / "wrong"))) - expected).abs().max() < 0.03


# Adapters on quantized bases.


@pytest.fixture
def save_adapter(base: Path, tmp_path: Path) -> Callable[[str], tuple[Any, Path]]:
    """Return a function (quantization) that returns a model with an adapter, and the folder where it is saved."""

    def save(quantization: str) -> tuple[Any, Path]:
        model = with_adapter(load_model(base, quantization))
        model.save_pretrained(tmp_path / "adapter")
        return model, tmp_path / "adapter"

    return save


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_an_adapter_on_a_quantized_base_reloads_bit_for_bit(quantization: str, save_adapter: Any) -> None:
    model, folder = save_adapter(quantization)
    reloaded = load_model(folder, quantization)
    assert isinstance(reloaded, PeftModel) and len(quantized_layers(reloaded)) == 8
    assert torch.equal(logits(reloaded), logits(model))
    assert {name for name, parameter in reloaded.named_parameters() if parameter.requires_grad} == {
        name for name, parameter in model.named_parameters() if parameter.requires_grad
    }


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_an_adapter_is_merged_into_the_full_precision_base(quantization: str, save_adapter: Any, base: Path) -> None:
    """Compare both with float64: W + 2BA for the merged model, and the rounded W + 2BA for the quantized one."""
    model, folder = save_adapter(quantization)
    adapter = load_file(folder / "adapter_model.safetensors")
    merged = load_causal_lm(str(folder)).eval()
    assert not quantized_layers(merged) and sum(isinstance(layer, Conv1D) for layer in merged.modules()) == 8
    assert (logits(merged) - float64_logits(base, {}, adapter)).abs().max() < 1e-4
    rounded = float64_logits(base, decoded_layers(model), adapter)
    tolerance = 0.2 if quantization == "int8" else 1e-4  # int8 rounds activations, too
    assert (logits(model) - rounded).abs().max() < tolerance
    assert (logits(merged) - float64_logits(base, {})).abs().max() > 0.5  # the adapter changes the logits


def test_an_adapter_on_a_quantized_base_reloads_in_bfloat16(base: Path, tmp_path: Path) -> None:
    """Training converts weights that are not quantized to float32; loading does the same."""
    options: dict[str, Any] = {"dtype": torch.bfloat16} | quantization_kwargs(4)
    model = with_adapter(load_causal_lm(str(base), **options))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_causal_lm(str(tmp_path), **options).eval()), logits(model))


def test_an_adapter_on_a_quantized_base_can_be_evaluated(save_adapter: Any, tokenizer: Any) -> None:
    model, folder = save_adapter("nf4, nested")
    reloaded = load_model(folder, "nf4, nested")
    options = {"sampling": Sampling(3), "reference": model, "texts": ["a text"]}
    evaluation = evaluate_model(reloaded, tokenizer, ["ab", "cde"], **options)
    assert evaluation.metrics["kl"] == 0.0 and math.isfinite(evaluation.metrics["perplexity"])


def test_a_reward_model_adapter_reloads_with_its_head(
    base: Path, tokenizer: Any, tmp_path: Path, reward_model: Path
) -> None:
    options = quantization_kwargs(4, nested=True)
    model = load_reward_model(str(base), labels=1, **options)
    model.config.pad_token_id = tokenizer.pad_token_id
    model = with_adapter(model, "SEQ_CLS")
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
    assert trainer.rewards[0].score_ids(rows) == pytest.approx(expected, abs=1e-3)  # its kernels are fused
    full_precision = load_reward(str(tmp_path), tokenizer)
    assert not quantized_layers(full_precision.model)
    assert (
        full_precision.score_ids(rows) == pytest.approx(expected, abs=0.5)
        and full_precision.score_ids(rows) != expected
    )


def test_an_adapter_on_an_adapter_cannot_be_quantized(save_adapter: Any, tmp_path: Path) -> None:
    _, folder = save_adapter("nf4")
    upper = get_peft_model(load_causal_lm(str(folder)), lora())
    upper.save_pretrained(tmp_path / "upper")
    assert load_causal_lm(str(tmp_path / "upper"))
    with pytest.raises(UserError, match=r"is an adapter on the adapter .* save it merged first"):
        load_causal_lm(str(tmp_path / "upper"), **quantization_kwargs(4))


# PPO from Python.


@pytest.mark.parametrize("quantization", ["int8", "nf4, nested"])
def test_ppo_continues_an_adapter_on_a_quantized_base(
    quantization: str, save_adapter: Any, reward_model: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """The policy is the folder's adapter, the reference a frozen copy of it, and the value another adapter."""
    model, folder = save_adapter(quantization)
    fuse_kernels_(model, torch.device("cpu"))  # as the trainer does for the policy
    (quantized,) = quantization_kwargs(**QUANTIZATIONS[quantization]).values()
    configs = {"quantization_config": quantized, "reward_quantization_config": quantized}
    trainer = trainer_of(tmp_path / "out", str(folder), tokenizer, str(reward_model), **configs)
    assert set(trainer.model.policy.peft_config) == {"default", "ppo_value", "ppo_reference"}
    assert len(quantized_layers(trainer.rewards[0].model)) == 8
    assert torch.equal(logits(trainer.model.policy), logits(model))
    trainer.train()
    assert not torch.equal(logits(trainer.model.policy.eval()), logits(model))
    with trainer.collector.reference.active() as reference:
        assert torch.equal(logits(reference), logits(model))
    trainer.save_model()
    reloaded = fuse_kernels_(load_model(Path(str(trainer.args.output_dir)), quantization), torch.device("cpu"))
    assert torch.equal(logits(reloaded), logits(trainer.model.policy.eval()))


def test_a_quantized_value_model_needs_an_adapter(
    base: Path, reward_model: Path, tokenizer: Any, tmp_path: Path
) -> None:
    policy = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(UserError, match="a value model quantized to 4 or 8 bits cannot be trained itself"):
        trainer_of(
            tmp_path, policy, tokenizer, value_model=load_reward_model(str(reward_model), **quantization_kwargs(4))
        )
    value = with_adapter(load_reward_model(str(reward_model), **quantization_kwargs(4)), "SEQ_CLS")
    before = {name: parameter.detach().clone() for name, parameter in value.named_parameters()}
    trainer = trainer_of(tmp_path, policy, tokenizer, value_model=value)
    trainer.train()
    changed = {name for name, parameter in value.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed and all(".lora_" in name or "score.modules_to_save" in name for name in changed)
    assert any("score" in name for name in changed)
    trainer.save_model()
    saved = load_file(tmp_path / "value_model" / "adapter_model.safetensors")
    assert sum(".lora_" in name for name in saved) == 2 * 8 and any(name.endswith("score.weight") for name in saved)


def test_quantized_weights_without_an_adapter_are_refused(base: Path, tokenizer: Any, tmp_path: Path) -> None:
    (quantized,) = quantization_kwargs(4).values()
    with pytest.raises(UserError, match="pass peft_config to train an adapter on it"):
        trainer_of(tmp_path, str(base), tokenizer, quantization_config=quantized)
    with pytest.raises(UserError, match="load yours with it instead"):
        trainer_of(tmp_path, load_model(base, "nf4"), tokenizer, quantization_config=quantized)
    assert isinstance(quantized, BitsAndBytesConfig)


# Memory.


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="memory is returned with glibc only")
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_memory_of_loading_is_released(
    quantization: str, make_model: MakeModel, tokenizer: Any, tmp_path: Path
) -> None:
    """The process's anonymous memory grows by about the quantized weights, not by the weights in full precision."""
    folder = save_model(tmp_path / "large", make_model, tokenizer, n_embd=512, n_layer=4)
    full_bytes, before = 4 * 12 * 512**2 * 4, anonymous_memory()
    model = load_model(folder, quantization)
    quantized_bytes = sum(layer.weight.numel() for layer in quantized_layers(model).values())
    assert quantized_bytes == full_bytes // (4 if quantization == "int8" else 8)
    assert anonymous_memory() - before < quantized_bytes + full_bytes / 4


@pytest.mark.parametrize("quantization", ["int8", "nf4", "nf4, nested"])
def test_benchmark_counts_the_bytes_of_quantized_models(
    quantization: str, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    worker, model = __import__("quantization_worker"), load_model(base, quantization)
    logits(model)  # from the first forward pass on, int8 layers store their weights elsewhere
    expected = 4 * (262 + 128) * 64 + 4 * 5 * 2 * 64  # embeddings and five norms
    for layer in quantized_layers(model).values():
        count, blocks = layer.in_features * layer.out_features, layer.in_features * layer.out_features // 64
        scales = {"int8": 4 * layer.out_features, "nf4": 4 * blocks}.get(
            quantization, blocks + 4 * math.ceil(blocks / 256)
        )
        codes = {"int8": 0, "nf4": 4 * 16}.get(quantization, 4 * 16 + 4 * 256 + 4)
        bias = 4 * layer.out_features
        expected += count // (1 if quantization == "int8" else 2) + scales + codes + bias
    assert worker.bytes_in(worker.tensors_in(model)) == expected


def anonymous_memory() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
