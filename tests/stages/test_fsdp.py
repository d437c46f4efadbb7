"""FSDP2 as Accelerate sets it up, on CPU processes (`small_runs_fsdp.py`), against one process."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import forks, small_runs, small_runs_fsdp
from programs.small_runs import LORA, largest_difference
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from rlhf_recipes.system.sharding import reset_pending_forward_

FOUR: dict[str, Any] = LORA | {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
SHARDABLE = {"bnb_4bit_quant_storage": "float32"}  # changes no number: FSDP cannot shard bytes
KINDS: dict[str, dict[str, Any]] = {
    "pretrain": {}, "sft": {}, "reward": {}, "ppo": {}, "sft, LoRA": LORA, "sft, 4 bits": FOUR, "reward, 4 bits": FOUR,
    "ppo, 4 bits": FOUR,
}  # fmt: skip


def launch(runs: Path, config: str, jobs: list[dict[str, Any]]) -> forks.Result:
    """Run the jobs on two processes, sharded as that file of accelerate_configs/ says."""
    return forks.launch(2, lambda: small_runs_fsdp.run_jobs(runs, jobs, config))


def job(kind: str, out: str, **more: Any) -> dict[str, Any]:
    storage = SHARDABLE if "4 bits" in kind else {}
    return {
        "stage": kind.partition(",")[0],
        "out": out,
        "save_steps": 4,
        "save_total_limit": 9,
        **KINDS[kind],
        **storage,
        **more,
    }


@pytest.mark.parametrize("kinds", [
    ["pretrain", "sft", "reward", "ppo", "sft, LoRA", "sft, 4 bits"],
    pytest.param(["reward, 4 bits", "ppo, 4 bits"], marks=pytest.mark.slow),
], ids=["all stages", "4 bits"])  # fmt: skip
def test_sharded_runs_train_like_one_process_and_resume(kinds: list[str], runs: Path) -> None:
    """Compares weights and metrics, then the weights of a run that is resumed from a sharded run's checkpoint."""
    result = launch(runs, "fsdp2.yaml", [job(kind, f"{kind} sharded") for kind in kinds])
    assert result.returncode == 0, result.stderr[-3000:]
    for kind in kinds:
        one = small_runs.run(kind.partition(",")[0], runs, f"{kind} alone", **KINDS[kind])
        assert largest_difference(small_runs.weights_in(one), small_runs.weights_in(runs / f"{kind} sharded")) < 2e-5
        expected, found = (
            json.loads((folder / "metrics.json").read_text()) for folder in (one, runs / f"{kind} sharded")
        )
        for key in {"perplexity", "reward_accuracy", "margin", "score"} & set(expected):
            assert found[key] == pytest.approx(expected[key], rel=1e-4)
        shutil.copytree(runs / f"{kind} sharded" / "checkpoint-4", runs / f"{kind} resumed" / "checkpoint-4")
    result = launch(runs, "fsdp2.yaml", [job(kind, f"{kind} resumed", resume="auto") for kind in kinds])
    assert result.returncode == 0, result.stderr[-3000:]
    for kind in kinds:
        sharded, resumed = (small_runs.weights_in(runs / f"{kind} {name}") for name in ("sharded", "resumed"))
        assert largest_difference(sharded, resumed) < 2e-5


@pytest.mark.slow
def test_qlora_in_bfloat16_trains_like_one_process(runs: Path) -> None:
    """Launched as its configuration says. The weights differ by the rounding of bfloat16, a small part of how far they moved."""
    low = {"dtype": "bfloat16", "bf16": True, "bnb_4bit_quant_storage": "bfloat16", "learning_rate": 1e-2}
    jobs = [job(kind, f"{kind} low", **low) for kind in ("sft, 4 bits", "reward, 4 bits")]
    result = launch(runs, "fsdp2_qlora.yaml", jobs)
    assert result.returncode == 0, result.stderr[-3000:]
    for each in jobs:
        one = small_runs.run(each["stage"], runs, f"{each['out']} alone", **FOUR, **low)
        expected, found = small_runs.weights_in(one), small_runs.weights_in(runs / each["out"])
        names = [name for name in expected if "lora_B" in name]  # they start at zero
        moved = torch.cat([expected[name].double().flatten() for name in names])
        difference = moved - torch.cat([found[name].double().flatten() for name in names])
        assert moved.abs().mean() > 5e-3 and difference.norm() < 0.2 * moved.norm()


def test_a_forward_that_skipped_a_module_does_not_keep_the_next_from_gathering() -> None:
    """A loss that reads a tied head without calling it leaves torch before 2.13 in this state."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = torch.nn.Sequential(torch.nn.Embedding(4, 2), torch.nn.Linear(2, 4))
        fully_shard([model[0], model[1]])
        fully_shard(model)
        ids = torch.tensor([1])
        expected = model(ids)
        model[0].unshard()
        pending = model[0]._get_fsdp_state()._modules_to_run_forward
        pending.add(model[1])
        assert not isinstance(model[0].weight, DTensor)
        reset_pending_forward_(model)
        assert not pending and isinstance(model[0].weight, DTensor)
        assert torch.equal(model(ids), expected)
    finally:
        torch.distributed.destroy_process_group()


def test_8_bit_weights_are_refused_with_a_fix(runs: Path) -> None:
    result = launch(runs, "fsdp2.yaml", [{"stage": "sft", "out": "eight", **LORA, "load_in_8bit": True}])
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode != 0 and len(lines) == 1
    assert "FSDP cannot shard 8-bit weights" in lines[0] and "load_in_4bit" in lines[0]
    assert not (runs / "eight").exists()
