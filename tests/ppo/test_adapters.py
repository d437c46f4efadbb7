"""Tests of adapters: one base for all models, saving and loading, and bases quantized to 4 and 8 bits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.tensors import identity
from rlhf_recipes.generation.sampling import Completions
from rlhf_recipes.models.loading import load_reward_model
from rlhf_recipes.ppo.roles.shared_base import SharedBaseRewardModel
from rlhf_recipes.ppo.trainer import PPOTrainer
from rlhf_recipes.scoring.reward import load_reward

Make = Callable[..., Any]
TARGETS = ["c_attn", "c_proj"]


def lora(task: str = "CAUSAL_LM", **options: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(task_type=task, r=4, target_modules=TARGETS, fan_in_fan_out=True, **options)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, make_policy: Make, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("roles") / "base"
    make_policy(0, initializer_range=0.1, n_embd=64, n_head=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def policy(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base)


def with_sft_adapter(policy: Any) -> Any:
    """Return the policy with an adapter that changes its outputs."""
    from peft import get_peft_model

    torch.manual_seed(3)
    return get_peft_model(policy, lora(init_lora_weights=False), adapter_name="sft")


@pytest.fixture(scope="module")
def reward_model_on_base(base: Path, tokenizer: Any) -> Path:
    """Return a reward model's folder, an adapter and a head on the policy's base, as the reward stage writes it."""
    from peft import get_peft_model

    from rlhf_recipes.models.loading import save_reward_model_config

    torch.manual_seed(7)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.config.pad_token_id = tokenizer.pad_token_id
    reward_model = get_peft_model(model, lora("SEQ_CLS", init_lora_weights=False, modules_to_save=["score"]))
    folder = base.parent / "reward_model"
    reward_model.save_pretrained(folder)
    save_reward_model_config(reward_model, folder)
    tokenizer.save_pretrained(folder)
    return folder


def rollout_of(trainer: PPOTrainer) -> Any:
    """Return a rollout of the current policy with fixed answers to four prompts."""
    prompts = trainer.prompts.rows(range(4))
    answers = Completions([[5, 6, 7], [8, 9], [10], [11, 12, 200]], [False, False, False, True])
    return trainer.collector.build_rollout(prompts["prompt_ids"], answers, {"none": [0.0] * 4}, None, identity)


def base_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of the weights that belong to no adapter."""
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if "lora_" not in name}


def test_one_copy_of_the_base_serves_all_four_models(
    policy: Any, reward_model_on_base: Path, make_trainer: Make, weights_of: Make
) -> None:
    size = sum(weight.numel() for weight in policy.parameters())
    trainer = make_trainer(policy, [str(reward_model_on_base)], peft_config=lora())
    (reward,) = trainer.rewards
    modules = [trainer.model, trainer.collector.reference.module, reward.model]
    storages = {weight.data_ptr(): weight for module in modules for weight in module.parameters()}
    adapters = sum(weight.numel() for name, weight in trainer.model.named_parameters() if "lora_" in name)
    heads = sum(
        weight.numel() for module in (trainer.model.value_model, reward.model) for weight in module.parameters()
    )
    assert sum(weight.numel() for weight in storages.values()) == size + adapters + heads
    assert adapters < 3 * 0.2 * size  # policy, value and reward model
    before, frozen = weights_of(trainer.model), base_weights(trainer.model.policy)
    trainer.train()
    after = weights_of(trainer.model)
    trained = {name for name in after if not torch.equal(before[name], after[name])}
    assert {name.split(".")[-2] for name in trained if "lora_" in name} == {"default", "ppo_value"}
    assert all(torch.equal(weight, frozen[name]) for name, weight in base_weights(trainer.model.policy).items())
    assert {name for name in trained if "lora_" not in name} == {
        "value_model.score.weight", "value_model.score.bias"
    }  # fmt: skip


def test_reference_of_a_new_adapter_is_the_base(policy: Any, base: Path, make_trainer: Make) -> None:
    plain = make_trainer(AutoModelForCausalLM.from_pretrained(base))
    trainer = make_trainer(policy, peft_config=lora())
    trainer.train()
    rollout, expected = rollout_of(trainer), rollout_of(plain)
    torch.testing.assert_close(rollout.reference_log_probs, expected.log_probs)
    assert (rollout.log_probs - expected.log_probs).abs().max() > 1e-3


def test_reference_of_an_existing_adapter_is_its_initial_state(policy: Any, make_trainer: Make) -> None:
    trainer = make_trainer(with_sft_adapter(policy))
    before = rollout_of(trainer)
    torch.testing.assert_close(before.reference_log_probs, before.log_probs)
    with trainer.model.policy.disable_adapter(), torch.no_grad():
        plain = trainer.model.policy(torch.tensor([[1, 2, 3]])).logits
    assert (plain - trainer.model.policy(torch.tensor([[1, 2, 3]])).logits).abs().max() > 0.01
    trainer.train()
    after = rollout_of(trainer)
    torch.testing.assert_close(after.reference_log_probs, before.log_probs)
    assert (after.log_probs - before.log_probs).abs().max() > 1e-3


def test_named_adapters_are_used_as_policy_and_reference(policy: Any, make_trainer: Make) -> None:
    model = with_sft_adapter(policy)
    torch.manual_seed(4)
    model.add_adapter("start", lora(init_lora_weights=False))
    trainer = make_trainer(model, model_adapter_name="sft", ref_adapter_name="start")
    rollout = rollout_of(trainer)
    assert (rollout.log_probs - rollout.reference_log_probs).abs().max() > 1e-3
    initial = {name: w.detach().clone() for name, w in model.named_parameters() if ".start." in name}
    trainer.train()
    assert all(torch.equal(w, initial[name]) for name, w in model.named_parameters() if ".start." in name)
    with pytest.raises(ValueError, match="no adapter other; it has sft, start"):
        make_trainer(model, model_adapter_name="other")


def test_an_adapter_loaded_without_is_trainable_is_refused(policy: Any, make_trainer: Make) -> None:
    """PeftModel.from_pretrained loads a frozen adapter by default."""
    model = with_sft_adapter(policy).requires_grad_(False)
    with pytest.raises(ValueError, match="is_trainable=True"):
        make_trainer(model)


@pytest.mark.parametrize("frozen", ["policy", "value"])
def test_policy_and_value_train_separate_adapters(
    frozen: str, policy: Any, make_trainer: Make, weights_of: Make
) -> None:
    """The policy loss alone trains the policy's adapter only, the value loss alone the value's."""
    options = {"vf_coef": 0.0} if frozen == "value" else {"value_warmup_updates": 100}
    trainer = make_trainer(policy, peft_config=lora(), **options)
    before = weights_of(trainer.model)
    trainer.train()
    trained = {
        name.split(".")[-2]
        for name, weight in weights_of(trainer.model).items()
        if "lora_" in name and not torch.equal(weight, before[name])
    }
    assert trained == {"default" if frozen == "value" else "ppo_value"}


def test_shared_base_reward_model_scores_like_a_separate_one(
    policy: Any, reward_model_on_base: Path, make_trainer: Make, tokenizer: Any
) -> None:
    trainer = make_trainer(policy, [str(reward_model_on_base)], peft_config=lora())
    (shared,) = trainer.rewards
    assert isinstance(shared.model, SharedBaseRewardModel)
    separate = load_reward(load_reward_model(str(reward_model_on_base)), tokenizer)
    rows = [[5, 6, 7, 8], [9], [10, 11, 12], [13] * 20]
    expected = separate.score_ids(rows)
    assert shared.score_ids(rows) == pytest.approx(expected, abs=1e-5)
    trainer.train()
    assert shared.score_ids(rows) == pytest.approx(expected, abs=1e-5)


def test_a_reward_model_on_another_base_is_not_shared(
    policy: Any, reward_model_on_base: Path, base: Path, make_trainer: Make
) -> None:
    """A policy with a merged adapter is another base; a policy without an adapter trains its base."""
    from peft import get_peft_model

    with pytest.raises(ValueError, match="has an adapter already; leave peft_config out"):
        make_trainer(with_sft_adapter(AutoModelForCausalLM.from_pretrained(base)), peft_config=lora())
    merged = with_sft_adapter(policy).merge_and_unload()
    for model, options in ((merged, {"peft_config": lora()}), (AutoModelForCausalLM.from_pretrained(base), {})):
        (reward,) = make_trainer(model, [str(reward_model_on_base)], **options).rewards
        assert not isinstance(reward.model, SharedBaseRewardModel)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora())
    assert isinstance(make_trainer(model, [str(reward_model_on_base)]).rewards[0].model, SharedBaseRewardModel)


def test_gradient_checkpointing_with_a_value_adapter_is_refused(policy: Any, make_trainer: Make) -> None:
    with pytest.raises(ValueError, match="set value_adapter to false"):
        make_trainer(policy, peft_config=lora(), gradient_checkpointing=True)
    make_trainer(policy, peft_config=lora(), gradient_checkpointing=True, value_adapter=False).train()


def test_reference_of_a_second_trainer_is_the_trained_policy(
    policy: Any, reward_model_on_base: Path, make_trainer: Make
) -> None:
    model = with_sft_adapter(policy)
    first = make_trainer(model, [str(reward_model_on_base)])
    first.train()
    trained = rollout_of(first).log_probs
    second = make_trainer(model, [str(reward_model_on_base)])
    torch.testing.assert_close(rollout_of(second).reference_log_probs, trained)


def test_model_card_names_base_model_and_dataset(make_trainer: Make, make_policy: Make) -> None:
    """push_to_hub(dataset_name=...) writes this card unless the stage has written one."""
    policy = make_policy()
    policy.name_or_path = "someone/base"
    trainer = make_trainer(policy)
    trainer.create_model_card(model_name="mine", dataset_name="someone/prompts")
    card = ModelCard.load(Path(trainer.args.output_dir) / "README.md")
    assert card.data.base_model == "someone/base" and card.data.datasets == ["someone/prompts"]
    (Path(trainer.args.output_dir) / "README.md").write_text("mine")
    trainer.create_model_card()
    assert (Path(trainer.args.output_dir) / "README.md").read_text() == "mine"


@pytest.mark.parametrize("case", ["plain", "adapter", "reward_model"])
def test_saved_policy_and_value_load_again(
    case: str, policy: Any, base: Path, make_reward_model: Make, make_trainer: Make, tmp_path: Path
) -> None:
    """Load the policy with AutoModelForCausalLM and the value in a new trainer."""
    options: dict[str, Any] = {"peft_config": lora()} if case == "adapter" else {}
    if case == "reward_model":
        options = {"value_model": make_reward_model(5)}
    trainer = make_trainer(policy, **options)
    trainer.train()
    trainer.save_model()
    expected, folder = rollout_of(trainer), Path(trainer.args.output_dir)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, trainer.model.policy.eval()(ids).logits)
    assert loaded.generation_config.eos_token_id == policy.generation_config.eos_token_id
    if case == "reward_model":
        value = AutoModelForSequenceClassification.from_pretrained(folder / "value_model", num_labels=1)
        assert torch.equal(value.score.weight, trainer.model.value_model.score.weight)
        options = {"value_model": make_reward_model(6)}
    loading = make_trainer(AutoModelForCausalLM.from_pretrained(base), **options)
    assert (rollout_of(loading).values - expected.values).abs().max() > 1e-4
    loading.model.load_pretrained(folder)
    rollout = rollout_of(loading)
    torch.testing.assert_close(rollout.values, expected.values)
    torch.testing.assert_close(rollout.log_probs, expected.log_probs)


def test_save_value_model_false_does_not_apply_to_checkpoints(policy: Any, make_trainer: Make) -> None:
    trainer = make_trainer(policy, save_value_model=False, save_strategy="steps", save_steps=4)
    trainer.train()
    trainer.save_model()
    folder = Path(trainer.args.output_dir)
    assert not (folder / "value_model").exists()
    assert load_file(folder / "checkpoint-4" / "value_model" / "value_head.safetensors")["score.weight"].any()


@pytest.mark.parametrize("bits", [4, 8])
def test_policy_and_value_adapters_train_on_a_quantized_base(
    bits: int, base: Path, make_trainer: Make, weights_of: Make
) -> None:
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32} if bits == 4 else {}
    quantized = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, **options)
    trainer = make_trainer(str(base), peft_config=lora(), quantization_config=quantized, response_length=4)
    layers = {type(module).__name__ for module in trainer.model.policy.modules()}
    assert layers & {"Linear4bit", "Linear8bitLt"}
    before = weights_of(trainer.model)
    first = rollout_of(trainer)
    trainer.train()
    after = weights_of(trainer.model)
    trained = {name.split(".")[-2] for name in after if "lora_" in name and not torch.equal(before[name], after[name])}
    assert trained == {"default", "ppo_value"}
    trainer.save_model()
    loading = make_trainer(str(base), peft_config=lora(), quantization_config=quantized, response_length=4)
    loading.model.load_pretrained(trainer.args.output_dir)
    last = rollout_of(loading)
    torch.testing.assert_close(last.log_probs, rollout_of(trainer).log_probs)
    torch.testing.assert_close(last.values, rollout_of(trainer).values)
    assert (last.log_probs - first.log_probs).abs().max() > 1e-3


@pytest.mark.parametrize("initialization", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_whose_initialization_changes_the_base_is_refused(
    initialization: str, policy: Any, make_trainer: Make
) -> None:
    """The reference and the value's adapter use the base, too."""
    before = base_weights(policy)
    with pytest.raises(UserError, match="changes the base"):
        make_trainer(policy, peft_config=lora(init_lora_weights=initialization))
    assert all(torch.equal(weight, before[name]) for name, weight in base_weights(policy).items())


def test_copying_a_pissa_adapter_does_not_change_the_base_again(policy: Any, make_trainer: Make) -> None:
    from peft import get_peft_model

    model = get_peft_model(policy, lora(init_lora_weights="pissa"))
    ids, before = torch.arange(5, 15)[None], base_weights(model)
    expected = model(ids).logits
    trainer = make_trainer(model)
    assert {"default", "ppo_value", "ppo_reference"} == set(trainer.model.policy.peft_config)
    after = {name: weight for name, weight in base_weights(trainer.model.policy).items() if name in before}
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    torch.testing.assert_close(trainer.model.policy(ids).logits, expected)
    rollout = rollout_of(trainer)
    torch.testing.assert_close(rollout.reference_log_probs, rollout.log_probs)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("existing", [False, True])
def test_an_adapter_that_trains_biases_of_the_base_is_refused(
    bias: str, existing: bool, policy: Any, make_trainer: Make
) -> None:
    """Trained biases stay changed when the adapter is disabled, so the reference would change."""
    from peft import get_peft_model

    options = {} if existing else {"peft_config": lora(bias=bias)}
    model = get_peft_model(policy, lora(bias=bias)) if existing else policy
    with pytest.raises(UserError, match="trains biases of the base"):
        make_trainer(model, value_adapter=False, **options)


def test_the_trained_adapter_is_refused_as_reference(policy: Any, make_trainer: Make) -> None:
    with pytest.raises(UserError, match="ref_adapter_name is sft, the adapter that is trained"):
        make_trainer(with_sft_adapter(policy), ref_adapter_name="sft")
