"""Tests of two processes (gloo) against one process with twice the batch."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import DistributedType
from programs import forks
from programs import train_ppo_ddp as program
from safetensors.torch import load_file

from rlhf_recipes.ppo.parallelism import check_parallelism

Make = Callable[..., Any]
STOP_IDS = list(range(200, 256))


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, make_model: Make, make_reward_model: Make, tokenizer: Any
) -> Path:
    """Return the folder with the runs of two processes."""
    folder = tmp_path_factory.mktemp("processes")
    model = make_model(0, initializer_range=0.1)
    model.generation_config.eos_token_id = STOP_IDS
    for name, module in (("policy", model), ("reward_model", make_reward_model(3, initializer_range=0.2))):
        module.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    result = forks.launch(2, lambda: program.main(folder, 4))
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of policy and value in a folder; the value may be in its own folder."""
    return {
        f"{path.parent.name == 'value_model'}:{name}": tensor
        for path in sorted(folder.glob("*.safetensors")) + sorted(folder.glob("value_model/*.safetensors"))
        for name, tensor in load_file(path).items()
    }


@pytest.mark.parametrize("case", ["plain", "value-model", "lora"])
def test_two_processes_train_like_one_of_twice_the_batch(folder: Path, case: str) -> None:
    """Equal weights and metrics. Answers differ in length; the last update is filled with the first prompts."""
    single = program.train(folder, case, 8, **program.CASES[case])
    one, two = (weights_in(folder / f"{case}-by-{processes}") for processes in (1, 2))
    untrained = weights_in(folder / "policy")
    # The second factor of a new adapter is zero; the first is random.
    start = {name: untrained.get(name, torch.zeros_like(one[name])) for name in one if "lora_A" not in name}
    assert one.keys() == two.keys() and (case == "lora" or len(one) > len(untrained))
    assert max((one[name] - start[name]).abs().max().item() for name in start) > 1e-3
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-5
    log = json.loads((folder / f"{case}-by-2" / "log.json").read_text())
    assert [entry["step"] for entry in log] == [entry["step"] for entry in single.state.log_history]
    for single_metrics, metrics in zip(single.state.log_history, log, strict=True):
        expected = {
            name: value
            for name, value in single_metrics.items()
            if not name.startswith(("time/", "train_")) and name != "eps"
        }
        assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_all_processes_hold_the_same_weights(folder: Path) -> None:
    """Also with minibatches, empty micro-batches, and a step that was skipped because of one process."""
    assert json.loads((folder / "equal.json").read_text()) == dict.fromkeys(program.CASES, True)


def test_two_processes_save_each_checkpoint_once(folder: Path) -> None:
    for case in program.CASES:
        saved = sorted(path.name for path in (folder / f"{case}-by-2").glob("checkpoint-*"))
        steps = 3 * 2 * program.CASES[case].get("num_mini_batches", 1)
        assert saved == sorted({f"checkpoint-{step}" for step in [*range(4, steps + 1, 4), steps]})
        final = weights_in(folder / f"{case}-by-2")
        last = weights_in(folder / f"{case}-by-2" / f"checkpoint-{steps}")
        assert final.keys() == last.keys() and all(torch.equal(final[name], last[name]) for name in final)


def test_a_non_finite_loss_of_one_process_skips_the_step_on_all(folder: Path) -> None:
    log = json.loads((folder / "non-finite-by-2" / "log.json").read_text())
    assert [entry["val/skipped_steps"] for entry in log if "val/skipped_steps" in entry] == [1.0, 1.0, 1.0]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights_in(folder / "non-finite-by-2").values())


def test_unsupported_parallelism_is_refused_with_the_fix() -> None:
    args = SimpleNamespace(n_gpu=1, deepspeed_plugin=None)
    with pytest.raises(ValueError, match=r"does not run under Megatron.*accelerate_configs/fsdp2\.yaml"):
        check_parallelism(args, DistributedType.MEGATRON_LM)
    with pytest.raises(ValueError, match="one process sees 2 GPUs"):
        check_parallelism(SimpleNamespace(n_gpu=2), DistributedType.NO)
    for allowed in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP):
        check_parallelism(args, allowed)
