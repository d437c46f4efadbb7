"""Tests of DeepSpeed runs, with sharded weights, gradients and moments, against one process; and of refused launches.

The runs are slow tests: DeepSpeed compiles its communication at the first run.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from programs import train_ppo_deepspeed as program
from programs.small_runs import largest_difference
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_recipes.ppo.parallelism import check_parallelism
from rlhf_recipes.system import deepspeed as zero
from rlhf_recipes.system.launch import check_launch, require_saved_zero_weights

Make = Callable[..., Any]
PROGRAM = Path(str(program.__file__))
SOURCE = Path(__file__).resolve().parents[2] / "src"
# As a user may write it: sizes and batches are auto, weights of every size are sharded.
DEEPSPEED_CONFIG: dict[str, Any] = {
    "zero_optimization": {
        "stage3_param_persistence_threshold": 0,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "zero_allow_untested_optimizer": True,
    "bf16": {"enabled": "auto"},
    "gradient_clipping": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}
slow = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is an extra; not installed"),
]


def under_zero(cases: Iterable[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "stage,case", [pytest.param(stage, case, marks=slow) for stage in (2, 3) for case in cases]
    )


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, make_policy: Make, make_reward_model: Make, tokenizer: Any
) -> Path:
    """Return the folder with the runs of two processes under ZeRO-2 and ZeRO-3."""
    folder = tmp_path_factory.mktemp("zero")
    for name, module in (
        ("policy", make_policy(0, initializer_range=0.1)),
        ("rotary", rotary_model(len(tokenizer))),
        ("reward_model", make_reward_model(3, initializer_range=0.2)),
    ):
        module.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    environment = os.environ | {
        "PYTHONPATH": str(SOURCE),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),  # ninja
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    for stage in (2, 3):
        zero_config = {**DEEPSPEED_CONFIG["zero_optimization"], "stage": stage}
        (folder / "deepspeed.json").write_text(json.dumps(DEEPSPEED_CONFIG | {"zero_optimization": zero_config}))
        launch: dict[str, Any] = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "DEEPSPEED"}
        launch |= {"use_cpu": True, "num_machines": 1, "num_processes": 2, "main_process_port": 0}
        launch |= {"deepspeed_config": {"deepspeed_config_file": str(folder / "deepspeed.json")}}
        (folder / "launch.yaml").write_text(yaml.safe_dump(launch))
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "launch.yaml")]
        result = subprocess.run(
            [*command, str(PROGRAM), str(folder), str(stage)],
            env=environment, capture_output=True, text=True, timeout=900, check=False,
        )  # fmt: skip
        errors = result.stderr.partition("torch/distributed/elastic")[0]  # of the processes, without the launcher's
        assert result.returncode == 0, errors[-8000:]
    return folder


@pytest.fixture(scope="module")
def single_process_run(folder: Path) -> Callable[[str], Path]:
    """Return a function (case) that returns the folder of the same run in one process."""

    def made(case: str) -> Path:
        if not (folder / f"{case} single").exists():
            program.train_and_save(folder, f"{case} single", case)
        return folder / f"{case} single"

    return made


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    paths = [*folder.glob("*.safetensors"), *folder.glob("value_model/*.safetensors")]
    return {f"{path.relative_to(folder)}:{name}": tensor for path in paths for name, tensor in load_file(path).items()}


@under_zero(program.CASES)
def test_deepspeed_run_matches_one_process(
    folder: Path, single_process_run: Callable[[str], Path], stage: int, case: str
) -> None:
    """Equal weights of policy and value, evaluation before training, and log."""
    single, sharded = (
        json.loads((path / "log.json").read_text())
        for path in (single_process_run(case), folder / f"{case} zero {stage}")
    )
    assert largest_difference(weights_in(single_process_run(case)), weights_in(folder / f"{case} zero {stage}")) < 2e-5
    if case in ("non-finite", "above target_kl"):  # steps were skipped
        assert largest_difference(weights_in(single_process_run(case)), weights_in(single_process_run("full"))) > 1e-4
    rows = [(single["before"], sharded["before"])]
    rows += [
        *zip(single["log"], sharded["log"], strict=True),
        *zip(single["updates"], sharded["updates"], strict=True),
    ]
    for single_metrics, metrics in rows:
        # Trainer's mean loss leaves out non-finite losses.
        ignored = {"eps", "loss"} if case == "non-finite" else {"eps"}
        expected = {
            name: value
            for name, value in single_metrics.items()
            if not name.startswith(("time/", "train_")) and name not in ignored
        }
        assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=2e-3, abs=1e-4)


@under_zero(program.ALL)
def test_each_deepspeed_process_holds_its_shard_between_passes(folder: Path, stage: int, case: str) -> None:
    share = json.loads((folder / f"shares {stage}.json").read_text())[case]
    assert share == (1.0 if stage == 2 else pytest.approx(0.5, abs=0.02))


@under_zero(program.RESUMED)
def test_deepspeed_run_resumes_in_the_middle_of_an_update(folder: Path, stage: int, case: str) -> None:
    resumed = weights_in(folder / f"{case} zero {stage} resumed")
    assert largest_difference(weights_in(folder / f"{case} zero {stage}"), resumed) == 0


@under_zero(program.BF16)
def test_policy_and_reference_are_equal_before_the_first_deepspeed_step(folder: Path, stage: int, case: str) -> None:
    """In bfloat16, before the DeepSpeed engine exists and in the first rollout."""
    logs = json.loads((folder / f"{case} zero {stage}" / "log.json").read_text())
    rows = logs["updates"] or [row for row in logs["log"] if "objective/kl" in row]
    assert logs["before"]["eval_objective/kl"] == rows[0]["objective/kl"] == 0
    assert rows[-1]["objective/kl"] > 0.01


def rotary_model(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    return LlamaForCausalLM(LlamaConfig(**shape, vocab_size=vocabulary, initializer_range=0.3))


def launch_args(stage: int | None = None, config: dict[str, Any] | None = None, **changes: Any) -> Any:
    """Return the fields of a PPOConfig that describe its launch.

    config: more of DeepSpeed's configuration.
    """
    zero_config = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    deepspeed_config = {"zero_optimization": zero_config} | (config or {})
    plugin = None if stage is None else SimpleNamespace(deepspeed_config=deepspeed_config)
    args: dict[str, Any] = {"n_gpu": 0, "value_warmup_updates": 0, "value_learning_rate": None, "bf16": False}
    return SimpleNamespace(**args | changes, deepspeed_plugin=plugin)


def test_only_weights_that_deepspeed_casts_are_cast() -> None:
    """Rotary frequencies and the bytes of 4-bit weights are not cast."""
    model = rotary_model(64)
    quantized = model.model.layers[0].mlp.up_proj.weight
    quantized.quant_state = None  # the mark of bitsandbytes
    frequencies = model.model.rotary_emb.inv_freq.clone()
    zero.cast_like_engine_(model, launch_args(3))
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}, "a float32 run casts nothing"
    zero.cast_like_engine_(model, launch_args(bf16=True))
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}, "without DeepSpeed, autocast casts"
    zero.cast_like_engine_(model, launch_args(2, bf16=True))
    assert quantized.dtype == torch.float32 and model.lm_head.weight.dtype == torch.bfloat16
    assert {weight.dtype for weight in model.parameters() if weight is not quantized} == {torch.bfloat16}
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, frequencies, atol=0, rtol=0)
    zero.check_quantized_storage(model, launch_args(2))
    with pytest.raises(ValueError, match="set bnb_4bit_quant_storage to uint8 or bfloat16"):
        zero.check_quantized_storage(model, launch_args(2, bf16=True))


@pytest.mark.parametrize("stage", [0, 1])
def test_other_zero_stages_are_refused_with_the_fix(stage: int) -> None:
    with pytest.raises(
        ValueError, match=f"not run under ZeRO-{stage}; launch accelerate_configs/deepspeed_zero2.yaml"
    ):
        check_parallelism(launch_args(stage), "DistributedType.DEEPSPEED")


@pytest.mark.parametrize("stage", [2, 3])
def test_value_warmup_under_deepspeed_is_refused_with_the_fix(stage: int) -> None:
    args = launch_args(stage)
    check_parallelism(args, "DistributedType.DEEPSPEED")
    args.value_warmup_updates = 1
    with pytest.raises(ValueError, match=r"set value_warmup_updates to 0, or launch accelerate_configs/fsdp2\.yaml"):
        check_parallelism(args, "DistributedType.DEEPSPEED")


@pytest.mark.parametrize("saves", [None, False, "auto"])
def test_a_zero3_run_that_would_save_no_weights_is_refused(saves: Any) -> None:
    """For PPO and for the other stages; DeepSpeed replaces `auto` by false."""
    args = launch_args(3)
    args.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = saves
    for check in (lambda: check_parallelism(args, "DistributedType.DEEPSPEED"), lambda: check_launch(args)):
        with pytest.raises(ValueError, match="would save no weights; write `zero3_save_16bit_model: true`"):
            check()
    args.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage"] = 2
    require_saved_zero_weights(args)


def test_value_learning_rate_with_a_deepspeed_optimizer_is_refused() -> None:
    args = launch_args(2, {"optimizer": {"type": "AdamW"}})
    check_parallelism(args, "DistributedType.DEEPSPEED")
    args.value_learning_rate = 1e-4
    with pytest.raises(ValueError, match="one learning rate; remove it there, or leave value_learning_rate out"):
        check_parallelism(args, "DistributedType.DEEPSPEED")


def test_deepspeed_enabled_outside_ppo_config_is_refused() -> None:
    with pytest.raises(ValueError, match="DeepSpeed is on in an Accelerator that PPOConfig does not know"):
        check_parallelism(launch_args(), "DistributedType.DEEPSPEED")


@pytest.mark.parametrize("role", ["model", "reward_funcs", "ref_model", "value_model"])
def test_a_model_that_was_sharded_at_loading_is_refused(
    role: str, make_trainer: Make, make_policy: Make, make_reward_model: Make
) -> None:
    models: dict[str, Any] = {
        "model": make_policy(0),
        "reward_funcs": make_reward_model(1),
        "value_model": make_reward_model(2),
    }
    models["ref_model"] = make_policy(3)
    next(models[role].parameters()).ds_id = 0  # the mark of ZeRO-3
    named = {"model": "policy", "reward_funcs": "reward model"}.get(role, role)
    with pytest.raises(ValueError, match=f"the {named} was sharded as it was loaded under ZeRO-3.*pass its folder"):
        make_trainer(models.pop("model"), **models)
