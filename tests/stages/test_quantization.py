"""Each stage with weights quantized to 8 or 4 bits, and with 8-bit optimizers: what it trains and saves, and that it resumes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from programs import forks, small_runs
from safetensors.torch import load_file
from trl import ModelConfig

from rlhf_recipes import UserError, load_reward
from rlhf_recipes.evaluation.models import evaluate_model
from rlhf_recipes.folders.checkpoints import list_checkpoints
from rlhf_recipes.generation.sampling import Sampling, stop_ids
from rlhf_recipes.models.loading import load_causal_lm, load_config, load_reward_model, load_tokenizer
from rlhf_recipes.models.quantization import quantization_kwargs
from rlhf_recipes.stages.eval import EvalArguments, run_eval
from rlhf_recipes.stages.ppo import load_value_model

FOUR = {"load_in_4bit": True, "use_bnb_nested_quant": True, "use_peft": True, "lora_r": 4, "lora_dropout": 0.1}
EIGHT = {"load_in_8bit": True, "use_peft": True, "lora_r": 4}
SMALL_STATE = {"optim": "adamw_8bit"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sft, 4 bits": ("sft", FOUR),
    "sft, 8 bits": ("sft", EIGHT),
    "reward, 4 bits": ("reward", FOUR),
    "ppo, 4 bits": ("ppo", {**FOUR, "save_steps": 3, "frozen_bits": 4}),
    "ppo, 8 bits, value model": ("ppo", {**EIGHT, "save_steps": 3, "frozen_bits": 8, "value_model": "reward_model"}),
    "pretrain, 8-bit AdamW": ("pretrain", SMALL_STATE),
    "sft, 8-bit AdamW": ("sft", SMALL_STATE),
    "ppo, 8-bit AdamW": ("ppo", {**SMALL_STATE, "save_steps": 3, "value_learning_rate": 3e-3}),
}
LARGE = 4096  # elements; bitsandbytes keeps the moments of smaller tensors in 32 bits


@pytest.fixture(scope="module")
def bits_world(
    tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Any],
    make_reward_model: Callable[..., Any], tokenizer: Any,
) -> Path:  # fmt: skip
    model, reward_model = (
        make_model(0, initializer_range=0.1, n_embd=64),
        make_reward_model(3, initializer_range=0.2, n_embd=64),
    )
    return small_runs.prepare(tmp_path_factory.mktemp("bits"), model, reward_model, tokenizer)


@pytest.fixture(scope="module")
def uninterrupted(bits_world: Path) -> Callable[[str], Path]:
    """(case) -> the folder of the uninterrupted run."""

    def run(case: str) -> Path:
        stage, options = CASES[case]
        folder = bits_world / case
        if not folder.exists():
            given = options | ({"value_model": str(bits_world / "reward_model")} if "value_model" in options else {})
            assert not forks.was_killed(lambda: small_runs.run(stage, bits_world, case, **given))
        return folder

    return run


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_matches_the_uninterrupted_run(
    case: str, bits_world: Path, uninterrupted: Callable[[str], Path]
) -> None:
    stage, options = CASES[case]
    given = options | ({"value_model": str(bits_world / "reward_model")} if "value_model" in options else {})
    expected, out = small_runs.saved_state(uninterrupted(case)), f"{case}, resumed"
    shutil.copytree(uninterrupted(case), bits_world / out)
    last, before, *_ = list_checkpoints(bits_world / out)
    shutil.rmtree(last)
    for path in [bits_world / out / "recipe.yaml", *(bits_world / out).glob("*.safetensors")]:
        path.unlink()
    assert int(before.name.rpartition("-")[2]) < int(last.name.rpartition("-")[2])
    assert not forks.was_killed(lambda: small_runs.run(stage, bits_world, out, resume="auto", **given))
    end = small_runs.saved_state(bits_world / out)
    assert end["log"] == expected["log"] and small_runs.identical(end, expected)


@pytest.mark.parametrize("case", [case for case, (_, options) in CASES.items() if options.get("use_peft")])
def test_the_output_is_a_trained_adapter(case: str, uninterrupted: Callable[[str], Path]) -> None:
    folder = uninterrupted(case)
    weights = load_file(folder / "adapter_model.safetensors")
    up = [value for name, value in weights.items() if "lora_B" in name]
    assert len(up) == 8 and all(value.any() and value.dtype == torch.float32 for value in up)
    assert not (folder / "model.safetensors").exists()
    if "value model" in case:
        value = load_file(folder / "value_model" / "adapter_model.safetensors")
        assert any("lora_B" in name and each.any() for name, each in value.items())
        assert [name for name in value if "score" in name and ".lora_" not in name]
    elif case.startswith("ppo"):
        value = load_file(folder / "value_model" / "adapter_model.safetensors")
        assert sum("lora_B" in name for name in value) == 8


@pytest.mark.parametrize("case", [case for case in CASES if "AdamW" in case])
def test_moments_of_large_tensors_are_8_bit(case: str, bits_world: Path, uninterrupted: Callable[[str], Path]) -> None:
    saved = torch.load(list_checkpoints(uninterrupted(case))[0] / "optimizer.pt", weights_only=True)
    moments = [
        each.get("__bnb_optimizer_quant_state__", each)[name]
        for each in saved["state"].values()
        for name in ("state1", "state2")
    ]
    quantized = [each for each in moments if each.dtype == torch.uint8]
    assert len(quantized) == 2 * 8 and all(each.numel() >= LARGE and each.float().std() > 0 for each in quantized)
    # Trainer keeps 32 bits for embeddings: of words and of positions.
    others = [each for each in moments if each.dtype != torch.uint8]
    assert {each.dtype for each in others} == {torch.float32} and sum(
        each.numel() >= LARGE for each in others
    ) == 2 * 2


def test_8_bit_moments_train_like_32_bit_moments(bits_world: Path, uninterrupted: Callable[[str], Path]) -> None:
    def losses(folder: Path) -> list[float]:
        log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        return [entry["loss"] for entry in log if "loss" in entry]

    expected = losses(uninterrupted("pretrain, 8-bit AdamW"))
    assert not forks.was_killed(lambda: small_runs.run("pretrain", bits_world, "32-bit AdamW"))
    assert expected == pytest.approx(losses(bits_world / "32-bit AdamW"), rel=0.02)


# Eval.


@pytest.fixture
def ask(bits_world: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """(**arguments of EvalArguments) -> the metrics of the model."""

    def measure(**given: Any) -> dict[str, Any]:
        arguments = EvalArguments(
            models=[given.pop("model", str(bits_world / "model"))], dataset_name=str(bits_world / "prompts"),
            text_dataset_name=str(bits_world / "text"), reward_model=str(bits_world / "reward_model"), max_new_tokens=4,
            output_dir=str(tmp_path / f"eval{len(list(tmp_path.iterdir()))}"), use_cpu=True, **given,
        )  # fmt: skip
        return json.loads((run_eval(arguments) / "metrics.json").read_text())

    return measure


@pytest.mark.parametrize("bits", [8, 4])
def test_eval_quantizes_models_reference_and_reward_model_separately(
    bits: int, ask: Callable[..., dict[str, Any]], bits_world: Path
) -> None:
    """Compares with metrics of models that are loaded one by one."""
    name, reward_model = str(bits_world / "model"), str(bits_world / "reward_model")
    tokenizer = load_tokenizer(name)
    prompts, texts = (
        [json.loads(line)[column] for line in (bits_world / folder / "test.jsonl").read_text().splitlines()]
        for folder, column in (("prompts", "prompt"), ("text", "text"))
    )
    model, full_model = load_causal_lm(name, **quantization_kwargs(bits)), load_causal_lm(name)

    def expected_metrics(reference: Any, frozen: dict[str, Any]) -> dict[str, float]:
        return evaluate_model(
            model, tokenizer, prompts, sampling=Sampling(4, stop_ids=stop_ids(model, tokenizer)), texts=texts,
            reward_model=load_reward(reward_model, tokenizer, **frozen), reference=reference,
        ).metrics  # fmt: skip

    quantized = {f"load_in_{bits}bit": True}
    alone, against = ask(**quantized), ask(**quantized, reference=name)
    frozen = ask(**quantized, reference=name, frozen_bits=bits)
    for found, expected in (
        (alone, expected_metrics(model, {})),
        (against, expected_metrics(full_model, {})),
        (frozen, expected_metrics(model, quantization_kwargs(bits))),
    ):
        assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert alone["kl"] == 0.0 == frozen["kl"] and against["kl"] != 0.0
    assert alone["perplexity"] == against["perplexity"] != ask()["perplexity"]
    assert alone["reward_score"] == against["reward_score"] != frozen["reward_score"]


@pytest.mark.parametrize("case", ["sft, 4 bits", "ppo, 4 bits"])
def test_eval_loads_an_adapter_on_its_quantized_or_merged_base(
    case: str, ask: Callable[..., dict[str, Any]], uninterrupted: Callable[[str], Path]
) -> None:
    folder = str(uninterrupted(case))
    bits = {"load_in_4bit": True, "use_bnb_nested_quant": True}
    quantized, merged = ask(model=folder, **bits), ask(model=folder)
    assert quantized["perplexity"] == pytest.approx(merged["perplexity"], rel=0.2)
    assert quantized["perplexity"] != merged["perplexity"]


def test_the_perplexity_of_sft_is_that_of_the_adapter_on_its_quantized_base(
    uninterrupted: Callable[[str], Path], bits_world: Path
) -> None:
    from rlhf_recipes.evaluation.language_model import completion_perplexity

    folder = uninterrupted("sft, 4 bits")
    model, tokenizer = load_causal_lm(str(folder), **quantization_kwargs(4, nested=True)), load_tokenizer(str(folder))
    lines = (bits_world / "demonstrations" / "test.jsonl").read_text().splitlines()
    pairs = [
        (tokenizer(row["prompt"])["input_ids"], tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id])
        for row in map(json.loads, lines)
    ]
    perplexity = json.loads((folder / "metrics.json").read_text())["perplexity"]
    assert completion_perplexity(model, tokenizer, pairs)["perplexity"] == pytest.approx(perplexity, rel=1e-6)


# DPO and RLOO, PPO on what SFT saved, and what is refused.


@pytest.mark.parametrize("stage", ["dpo", "rloo"])
def test_dpo_and_rloo_train_an_adapter_on_quantized_weights(
    stage: str, bits_world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward_models: list[Any] = []
    monkeypatch.setattr(
        "rlhf_recipes.scoring.reward.load_reward_model",
        lambda *args, **kwargs: reward_models.append(load_reward_model(*args, **kwargs)) or reward_models[-1],
    )
    own = {"dataset_name": "preferences"} if stage == "dpo" else {"dataset_name": "prompts", "reward": "reward_model"}
    monkeypatch.setitem(small_runs.STAGE_FLAGS, stage, own)
    options = FOUR | {
        "max_steps": 2,
        "save_strategy": "no",
        "global_batch_size": None,
        "per_device_train_batch_size": 8,
    }
    options |= {"frozen_bits": 8} if stage == "rloo" else {}
    out = small_runs.run(stage, bits_world, f"{stage} quantized", **options)
    up = [value for name, value in load_file(out / "adapter_model.safetensors").items() if "lora_B" in name]
    assert len(up) == 8 and any(value.any() for value in up) and not (out / "model.safetensors").exists()
    counts = [sum(isinstance(each, Linear8bitLt) for each in reward_model.modules()) for reward_model in reward_models]
    assert counts == ([8] if stage == "rloo" else [])


def test_ppo_trains_on_the_quantized_output_of_sft(bits_world: Path, uninterrupted: Callable[[str], Path]) -> None:
    """All four models share one 4-bit base. The adapter of SFT is policy and reference; reward model and value have adapters."""
    start, reward_model = uninterrupted("sft, 4 bits"), uninterrupted("reward, 4 bits")
    options = {"load_in_4bit": True, "use_bnb_nested_quant": True, "max_steps": 4, "save_strategy": "no"}
    out = small_runs.run(
        "ppo", bits_world, "ppo after sft", model_name_or_path=start.name, reward=reward_model.name, **options
    )
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert next(entry for entry in log if "objective/kl" in entry)["objective/kl"] == pytest.approx(0.0, abs=1e-3)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(bits_world / "model")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (start, out))
    assert before.keys() == after.keys() and all(not torch.equal(before[name], after[name]) for name in before)


def test_a_value_model_starts_from_a_reward_model_or_its_adapter(
    uninterrupted: Callable[[str], Path], bits_world: Path
) -> None:
    """Quantized, its adapter and head are trained; in full precision, all weights are."""
    config = ModelConfig(load_in_4bit=True, use_bnb_nested_quant=True, use_peft=True, lora_r=4)
    for folder in (bits_world / "reward_model", uninterrupted("reward, 4 bits")):
        model = load_value_model(str(folder), config)
        trained = [name for name, each in model.named_parameters() if each.requires_grad]
        assert sum(".lora_" in name for name in trained) == 2 * 8 == len(trained) - 1
        assert "score.modules_to_save.default.weight" in trained[-1]
        assert sum(isinstance(each, Linear4bit) for each in model.modules()) == 8
        full_model = load_value_model(str(folder), ModelConfig())
        assert all(each.requires_grad for each in full_model.parameters())


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "ppo without LoRA": ("ppo", {"load_in_4bit": True}, "quantized weights cannot be trained; add --use_peft true"),
    "a new adapter on one": (
        "ppo", {"load_in_4bit": True, "use_peft": True, "model_name_or_path": "sft, 4 bits"}, "leave out --use_peft",
    ),
    "other bits": ("ppo", {"frozen_bits": 3}, "frozen_bits is 3; give 8 or 4"),
    "other bits in rloo": ("rloo", {"frozen_bits": 16}, "frozen_bits is 16; give 8 or 4"),
    "saved quantized, sft": ("sft", {"model_name_or_path": "quantized"}, "quantized weights cannot be trained"),
    "saved quantized, reward": ("reward", {"model_name_or_path": "quantized"}, "quantized weights cannot be trained"),
    "saved quantized, ppo": ("ppo", {"model_name_or_path": "quantized"}, "quantized weights cannot be trained"),
    "saved quantized, pretrain": (
        "pretrain", {"tokenizer_name": None, "model_name_or_path": "quantized"},
        "is quantized to 4 or 8 bits; pretrain trains all",
    ),
    "pretrain": ("pretrain", {"load_in_8bit": True}, "pretrain trains all weights; for LoRA and quantized models use"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_invalid_input_is_refused_before_weights_are_read(
    case: str, bits_world: Path, uninterrupted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    uninterrupted("sft, 4 bits")
    if not (bits_world / "quantized").exists():
        load_causal_lm(str(bits_world / "model"), **quantization_kwargs(4)).save_pretrained(bits_world / "quantized")
        load_tokenizer(str(bits_world / "model")).save_pretrained(bits_world / "quantized")
        assert load_config(str(bits_world / "quantized")).quantization_config
    stage, given, message = WRONG[case]
    monkeypatch.setitem(small_runs.STAGE_FLAGS, "rloo", {"dataset_name": "prompts", "reward": "reward_model"})
    monkeypatch.setattr(f"rlhf_recipes.stages.{stage}.load_causal_lm", None, raising=False)
    monkeypatch.setattr(f"rlhf_recipes.stages.{stage}.load_reward_model", None, raising=False)
    with pytest.raises(UserError, match=message):
        small_runs.run(stage, bits_world, f"wrong {case}", **given)
    assert not (bits_world / f"wrong {case}").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"load_in_8bit": True, "load_in_4bit": True}, "are both set; set one of them"),
        ({"bnb_4bit_quant_type": "nf3"}, "choose nf4 or fp4"),
        ({"frozen_bits": 2}, "give 8 or 4"),
    ],
)
def test_invalid_quantization_options_of_eval_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EvalArguments(**given)


def test_an_adapter_on_a_saved_quantized_model_is_trained(bits_world: Path) -> None:
    folder = bits_world / "saved quantized"
    load_causal_lm(str(bits_world / "model"), **quantization_kwargs(4)).save_pretrained(folder)
    load_tokenizer(str(bits_world / "model")).save_pretrained(folder)
    options = {"use_peft": True, "max_steps": 2, "save_strategy": "no", "eval_strategy": "no"}
    out = small_runs.run("sft", bits_world, "on saved quantized", model_name_or_path=folder.name, **options)
    assert (out / "adapter_model.safetensors").is_file() and not (out / "model.safetensors").exists()
    assert load_causal_lm(str(out))(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
