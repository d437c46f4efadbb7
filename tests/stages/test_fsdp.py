"""FSDP2 as Accelerate sets it up, on CPU processes (`small_runs_fsdp.py`), against one process."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import small_runs
from programs.small_runs import LORA, farthest
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from rlhf_recipes.system.sharding import reset_pending_forward_

PROGRAM = Path(str(small_runs.__file__)).with_name("small_runs_fsdp.py")
SOURCE = Path(__file__).resolve().parents[2] / "src"
FOUR: dict[str, Any] = LORA | {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
CUT = {"bnb_4bit_quant_storage": "float32"}  # where it runs, not what is learnt: bytes cannot be cut apart
KINDS: dict[str, dict[str, Any]] = {
    "pretrain": {}, "sft": {}, "reward": {}, "ppo": {}, "sft, LoRA": LORA, "sft, 4 bits": FOUR, "reward, 4 bits": FOUR,
    "ppo, 4 bits": FOUR,
}  # fmt: skip


def launched(world: Path, config: str, jobs: list[dict[str, Any]]) -> "subprocess.CompletedProcess[str]":
    told = world / f"{jobs[0]['out']}.json"
    told.write_text(json.dumps(jobs))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"
    }  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, str(PROGRAM), str(world), str(told), config],
        env=environment, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip


def job(kind: str, out: str, **more: Any) -> dict[str, Any]:
    cut = CUT if "4 bits" in kind else {}
    return {"stage": kind.partition(",")[0], "out": out, "save_total_limit": 9, **KINDS[kind], **cut, **more}


def test_every_kind_of_run_ends_as_one_process_does_and_goes_on(world: Path) -> None:
    """Weights, and what was measured of them; then from a checkpoint of its own."""
    done = launched(world, "fsdp2.yaml", [job(kind, f"{kind} cut") for kind in KINDS])
    assert done.returncode == 0, done.stderr[-3000:]
    for kind in KINDS:
        one = small_runs.run(kind.partition(",")[0], world, f"{kind} alone", **KINDS[kind])
        assert farthest(small_runs.weights_in(one), small_runs.weights_in(world / f"{kind} cut")) < 2e-5
        told = [json.loads((folder / "metrics.json").read_text()) for folder in (one, world / f"{kind} cut")]
        for key in {"perplexity", "reward_accuracy", "margin", "score"} & set(told[0]):
            assert told[1][key] == pytest.approx(told[0][key], rel=1e-4)
        shutil.copytree(world / f"{kind} cut" / "checkpoint-4", world / f"{kind} on" / "checkpoint-4")
    done = launched(world, "fsdp2.yaml", [job(kind, f"{kind} on", resume="auto") for kind in KINDS])
    assert done.returncode == 0, done.stderr[-3000:]
    for kind in KINDS:
        cut, on = (small_runs.weights_in(world / f"{kind} {what}") for what in ("cut", "on"))
        assert farthest(cut, on) < 2e-5


@pytest.mark.slow
def test_four_bits_in_bfloat16_under_their_own_configuration(world: Path) -> None:
    """As the configuration says it is launched; cut apart and whole differ by the rounding of bfloat16, which is a small part
    of what was learnt."""
    low = {"dtype": "bfloat16", "bf16": True, "bnb_4bit_quant_storage": "bfloat16", "learning_rate": 1e-2}
    jobs = [job(kind, f"{kind} low", **low) for kind in ("sft, 4 bits", "reward, 4 bits")]
    done = launched(world, "fsdp2_qlora.yaml", jobs)
    assert done.returncode == 0, done.stderr[-3000:]
    for each in jobs:
        one = small_runs.run(each["stage"], world, f"{each['out']} alone", **FOUR, **low)
        mine, theirs = small_runs.weights_in(one), small_runs.weights_in(world / each["out"])
        learnt = [name for name in mine if "lora_B" in name]  # from zero on
        moved = torch.cat([mine[name].double().flatten() for name in learnt])
        apart = moved - torch.cat([theirs[name].double().flatten() for name in learnt])
        assert moved.abs().mean() > 5e-3 and apart.norm() < 0.2 * moved.norm()


def test_a_pass_that_left_a_module_out_does_not_keep_the_next_one_from_gathering() -> None:
    """What torch before 2.13 is left with by a loss that reads a tied head without calling it."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = torch.nn.Sequential(torch.nn.Embedding(4, 2), torch.nn.Linear(2, 4))
        fully_shard([model[0], model[1]])
        fully_shard(model)
        ids = torch.tensor([1])
        whole = model(ids)
        model[0].unshard()
        waiting = model[0]._get_fsdp_state()._modules_to_run_forward
        waiting.add(model[1])
        assert not isinstance(model[0].weight, DTensor)
        reset_pending_forward_(model)
        assert not waiting and isinstance(model[0].weight, DTensor)
        assert torch.equal(model(ids), whole)
    finally:
        torch.distributed.destroy_process_group()


def test_eight_bits_are_refused_with_the_way_out(world: Path) -> None:
    done = launched(world, "fsdp2.yaml", [{"stage": "sft", "out": "eight", **LORA, "load_in_8bit": True}])
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(lines) == 1
    assert "FSDP cannot shard 8-bit weights" in lines[0] and "load_in_4bit" in lines[0]
    assert not (world / "eight").exists()
