"""Options that a machine, a model or an installation cannot honour are refused in one line before weights are read."""

import dataclasses
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import pytest
import torch
from programs import small_runs
from programs.small_runs import STAGES

from rlhf_recipes.core.arguments import parse_arguments
from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.unsupported import unsupported_options
from rlhf_recipes.training.options import check_options, library_errors_as_user_errors

ALL_STAGES = (*STAGES, "dpo", "rloo")


def types_of(stage: str) -> list[type]:
    run = getattr(import_module(f"rlhf_recipes.stages.{stage}"), f"run_{stage}")
    return [hint for name, hint in get_type_hints(run).items() if name != "return"]


@pytest.fixture
def weightless(runs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small runs' folder; reading weights fails the test."""
    from transformers import PreTrainedModel

    def read(*arguments: Any, **named: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", read)
    return runs


BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
PLATEAU = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 2}
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("sft", {"report_to": "wandb"}, "report_to wandb cannot be used"),
    ("pretrain", {"report_to": "nonsense"}, "report_to nonsense cannot be used: nonsense is not supported"),
    ("sft", {"use_liger_kernel": True}, "needs the package liger_kernel, which is not installed"),
    ("reward", {"optim": "galore_adamw"}, "optim galore_adamw cannot be used"),
    ("ppo", {"optim_args": "nonsense=1"}, "optim_args nonsense=1 has no effect with optim adamw_torch"),
    ("ppo", {"lr_scheduler_type": "cosine_with_min_lr"}, "cosine_with_min_lr cannot be used"),
    ("pretrain", {"lr_scheduler_kwargs": '{"nonsense": 1}'}, "got an unexpected keyword argument 'nonsense'"),
    ("sft", {"attn_implementation": "flash_attention_2"}, "attn_implementation flash_attention_2 needs a GPU"),
    ("reward", {"attn_implementation": "nonsense"}, "attn_implementation nonsense cannot be used"),
    ("ppo", {"attn_implementation": "flex_attention"}, "does not support an attention implementation"),
    ("sft", {"activation_offloading": True}, "leave it out on a CPU"),
    ("sft", {"padding_free": True}, "padding_free does not cut rows to max_length without packing"),
    ("sft", {"loss_type": "nonsense"}, "choose from 'nll', 'dft'"),
    ("sft", {"packing_strategy": "nonsense"}, "invalid choice: 'nonsense'"),
    ("sft", {"truncation_mode": "nonsense"}, "choose from 'keep_end', 'keep_start'"),
    ("sft", {"loss_type": "dft", "label_smoothing_factor": 0.1}, "has no effect with loss_type dft"),
    ("sft", {"dataset_kwargs": '{"skip_prepare_dataset": true}'}, "dataset_kwargs has no effect"),
    ("sft", {"chat_template_path": "nowhere.jinja"}, "chat_template_path would change the tokenizer"),
    ("sft", {"router_aux_loss_coef": 0.1}, "a gpt2 model has no router"),
    ("sft", {"model_init_kwargs": '{"dtype": "bfloat16"}'}, "model_init_kwargs has no effect: use --dtype"),
    ("sft", {"auto_find_batch_size": True}, "auto_find_batch_size would change the run"),
    ("pretrain", {"do_train": True}, "do_train has no effect: a stage trains"),
    ("reward", {"label_smoothing_factor": 0.1}, "label_smoothing_factor has no effect"),
    ("reward", {"train_sampling_strategy": "group_by_length"}, "does not fit pairs; choose random or sequential"),
    ("ppo", {"neftune_noise_alpha": 5}, "neftune_noise_alpha does not fit PPO"),
    ("ppo", {"dataloader_num_workers": 2}, "rollouts are made in the training process"),
    ("ppo", {"reward_model_path": "x"}, "reward_model_path is for scripts that load the model themselves"),
    ("sft", {"lora_r": 4}, "lora_r has no effect without an adapter"),
    ("sft", BEST | {"metric_for_best_model": "accuracy"}, "accuracy, which no evaluation of this stage logs; choose one of"),
    ("reward", PLATEAU | {"metric_for_best_model": "eval_f1"}, "choose one of eval_accuracy, eval_loss, eval_margin"),
    ("ppo", BEST | {"metric_for_best_model": "loss"}, "choose one of eval_objective/scores"),
    ("pretrain", {"save_strategy": "best", "metric_for_best_model": "loss"}, "pass --eval_strategy steps"),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "changes", "words"), BAD, ids=[f"{bad[0]}-{bad[2]}" for bad in BAD])
def test_an_option_that_cannot_be_honoured_is_refused(
    stage: str, changes: dict[str, Any], words: str, weightless: Path
) -> None:
    with pytest.raises(UserError) as caught:
        small_runs.run(stage, weightless, "refused", **changes)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (weightless / "refused").exists()


@pytest.mark.parametrize("stage", ALL_STAGES)
def test_unsupported_options_exist_and_are_not_in_the_help(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = types_of(stage)[-1]
    names = {item.name for item in dataclasses.fields(config)}
    hidden = set(unsupported_options(config))
    assert (
        hidden
        and {name for name in hidden - names if name not in ("parallelism_config", "enable_jit_checkpoint")} == set()
    )
    with pytest.raises(SystemExit):
        parse_arguments(*types_of(stage), argv=["--help"])
    shown = {word.strip(",").removeprefix("--") for word in capsys.readouterr().out.split() if word.startswith("--")}
    assert hidden & shown == set() and names - hidden <= shown | {"_n_gpu"}


def test_choices_of_python_callers_are_checked_too(runs: Path) -> None:
    """Flags are checked as they are parsed; a dataclass takes any value."""
    from rlhf_recipes.stages import dpo, sft

    with pytest.raises(UserError, match="loss_type is 'nonsense'; choose one of nll, dft"):
        sft.check_loss_options(sft.SFTConfig("out", report_to="none", loss_type="nonsense"), ["text"])
    with pytest.raises(UserError, match="completion_only_loss needs the columns prompt and completion"):
        sft.check_loss_options(sft.SFTConfig("out", report_to="none", completion_only_loss=True), ["text"])
    for changes, words in {
        ("loss_type", "nonsense"): "loss_type is 'nonsense'",
        ("f_divergence_type", "nonsense"): "f_divergence_type is 'nonsense'",
        ("ld_alpha", 2.0): "ld_alpha is 2.0",
        ("loss_type", "exo_pair"): "exo_pair needs label_smoothing above 0",
    }.items():
        with pytest.raises(UserError, match=words):
            dpo.check_loss_options(dpo.DPOConfig("out", report_to="none", **dict([changes])))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("stage", ALL_STAGES)
def test_every_switch_is_accepted_or_refused_in_one_line(stage: str) -> None:
    """Each true or false of the configuration, turned over, passes the checks or raises a `UserError`."""
    refused = set()
    for item in dataclasses.fields(types_of(stage)[-1]):
        if item.default not in (True, False) or item.name == "push_to_hub":
            continue
        words = [
            "--output_dir",
            "out",
            "--report_to",
            "none",
            "--use_cpu",
            "true",
            f"--{item.name}",
            str(not item.default),
        ]
        try:
            *_, training = parse_arguments(*types_of(stage), argv=words)
            check_options(training)
        except UserError as error:
            refused.add(item.name)
            assert "\n" not in str(error) or "Config: " in str(error)
    assert {"do_train", "auto_find_batch_size", "eval_use_gather_object"} <= refused


def test_an_adapter_learns_ten_times_as_fast_by_default(runs: Path) -> None:
    from rlhf_recipes.training.run import prepare_process_

    for stage, usual in {"sft": 2e-5, "dpo": 1e-6, "reward": 1e-4, "rloo": 1e-6, "ppo": 3e-6}.items():
        config = types_of(stage)[-1]
        plain, chosen = (config(output_dir="out", report_to="none", **each) for each in ({}, {"learning_rate": usual}))
        assert plain.learning_rate == usual
        assert prepare_process_(plain, 32, adapter=True).learning_rate == pytest.approx(10 * usual)
        assert prepare_process_(plain, 32).learning_rate == usual
        assert prepare_process_(chosen, 32, adapter=True).learning_rate == usual, "what is set is kept"


@pytest.mark.parametrize(
    ("stage", "metric", "mode"),
    [("ppo", "eval_objective/scores", "max"), ("rloo", "eval_reward", "max"), ("sft", "eval_loss", None)],
)
def test_a_plateau_is_looked_for_in_a_metric_of_the_stage(stage: str, metric: str, mode: str | None) -> None:
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1}
    training = types_of(stage)[-1](output_dir="out", report_to="none", **plateau)
    assert training.metric_for_best_model == metric
    assert (training.lr_scheduler_kwargs or {}).get("mode") == mode


def test_less_kl_is_better_unless_the_caller_says_otherwise() -> None:
    config = types_of("ppo")[-1]
    shared = {"output_dir": "out", "report_to": "none", "metric_for_best_model": "eval_objective/kl"}
    assert config(**shared).greater_is_better is False
    assert config(**shared, greater_is_better=True).greater_is_better is True


def test_only_what_a_library_refuses_becomes_one_line() -> None:
    def by_library() -> None:
        from peft import LoraConfig, get_peft_model

        get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), LoraConfig(target_modules=["nowhere"]))  # type: ignore[arg-type]

    def by_us() -> None:
        raise ValueError("a fault of ours")

    def by_a_crash() -> None:
        torch.zeros(2).view(3)

    errors: list[tuple[Callable[[], None], type[Exception], str]] = [
        (by_library, UserError, "^peft refuses these options: .*nowhere"),
        (by_us, ValueError, "^a fault of ours"),
        (by_a_crash, RuntimeError, "shape"),
    ]
    for function, kind, words in errors:
        with pytest.raises(kind, match=words) as caught, library_errors_as_user_errors():
            function()
        assert type(caught.value) is kind


def test_the_optimizer_is_tried_on_a_separate_weight() -> None:
    from rlhf_recipes.training.options import _check_optimizer

    training = types_of("sft")[-1](output_dir="out", report_to="none", optim="adamw_torch")
    state = torch.get_rng_state()
    _check_optimizer(training)
    assert torch.equal(torch.get_rng_state(), state)
    _check_optimizer(SimpleNamespace(optim="anything", deepspeed_plugin=object()))
