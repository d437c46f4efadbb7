"""Every training stage on 1, 2 and 4 CPU processes, cut apart in every way, against one process: what ran, and how far off.

    python benchmarks/processes.py --output_dir runs/processes

Runs of seconds, of a two-layer GPT-2; DeepSpeed where it is installed (the extra `deepspeed`). FSDP2 is applied natively to
PPO, since Accelerate does not reach it on a CPU. A cell is the largest difference of any weight to the run of one process by
itself, or the line that refused it.
"""

import argparse
import datetime
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "tests" / "stages" / "small_runs.py"
SHARDED = ROOT / "tests" / "ppo" / "sharded_processes.py"
sys.path += [str(ROOT / "src"), str(PROGRAM.parent), str(SHARDED.parent)]

import sharded_processes  # noqa: E402
import small_runs  # noqa: E402
from small_runs import LORA, STAGES  # noqa: E402

KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "LoRA": LORA,
    "4-bit": LORA | {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
}
WAYS = {"DDP": "two_cpu_processes", "ZeRO-2": "deepspeed_zero2", "ZeRO-3": "deepspeed_zero3"}


def prepare(folder: Path) -> None:
    """A small policy and judge with random weights, and the rows that the small runs read."""
    from transformers import AutoTokenizer, GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

    from rlhf_recipes.stages.tokenizer import TokenizerArguments, run_tokenizer

    text = folder / "words" / "train.jsonl"
    text.parent.mkdir(parents=True)
    text.write_text(
        "".join(json.dumps({"text": f"{' '.join(small_runs.WORDS)} {number}"}) + "\n" for number in range(200))
    )
    run_tokenizer(TokenizerArguments(dataset_name=str(text.parent), output_dir=str(folder / "tok"), vocab_size=384))
    tokenizer = AutoTokenizer.from_pretrained(folder / "tok")
    shape: dict[str, Any] = {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 128, "initializer_range": 0.1}
    shape |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "vocab_size": len(tokenizer)}
    shape |= {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    model, judge = (
        GPT2LMHeadModel(GPT2Config(**shape)),
        GPT2ForSequenceClassification(GPT2Config(**shape, num_labels=1)),
    )
    small_runs.prepare(folder, model, judge, tokenizer)


def launched(folder: Path, way: str, processes: int, jobs: list[dict[str, Any]]) -> str:
    """Nothing, if the runs ended well; else the line that says why one did not."""
    asked = yaml.safe_load((ROOT / "accelerate_configs" / f"{WAYS[way]}.yaml").read_text())
    told, config = folder / "job.json", folder / "launch.yaml"
    told.write_text(json.dumps(jobs))
    kind = {} if processes > 1 or way != "DDP" else {"distributed_type": "NO"}
    config.write_text(yaml.safe_dump(asked | kind | {"use_cpu": True, "num_processes": processes}))
    command = ["accelerate.commands.launch", "--config_file", str(config), str(PROGRAM), str(folder), str(told)]
    return said_by(command, folder / f"{jobs[0]['out']}.log")


def said_by(command: list[str], log: Path) -> str:
    """Of a module and its words, run: nothing, if it ended well; else the line that says why it did not."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [sys.executable, "-m", *command], env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    log.write_text(done.stdout + done.stderr)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return "" if done.returncode == 0 else lines[0] if lines else f"failed, see {log.name}"


def alone(folder: Path) -> dict[tuple[str, str], str]:
    """Each run by this process by itself: the line that refused it, or nothing."""
    refused = {}
    for stage, kind in itertools.product(STAGES, KINDS):
        try:
            small_runs.run(stage, folder, f"{stage} {kind} alone", **KINDS[kind])
            refused[stage, kind] = ""
        except ValueError as error:
            refused[stage, kind] = str(error)
    return refused


def cells(folder: Path, way: str, processes: int, asked: Any) -> dict[tuple[str, str], str]:
    """How far off each run ended, or what refused it: all in one launch, and one by one from the first that is refused."""
    out = {(stage, kind): f"{stage} {kind} {way} {processes}" for stage, kind in asked}
    jobs = {each: {"stage": each[0], "out": out[each], **KINDS[each[1]]} for each in asked}
    launched(folder, way, processes, list(jobs.values()))
    found = {}
    for each in asked:
        done = (folder / out[each] / "recipe.yaml").is_file()
        fault = "" if done else launched(folder, way, processes, [jobs[each]])
        one, many = (folder / place for place in (f"{each[0]} {each[1]} alone", out[each]))
        found[each] = (
            f"refused: {fault.removeprefix('error: ').replace(f'{folder}/', '')}" if fault else farthest(one, many)
        )
        print(f"{', '.join(each)}, {way}, {processes}: {found[each]}", flush=True)
    return found


def farthest(one: Path, other: Path) -> str:
    mine, theirs = small_runs.weights_in(one), small_runs.weights_in(other)
    return f"{max((mine[name].double() - theirs[name].double()).abs().max().item() for name in mine):.0e}"


def fsdp2(folder: Path, processes: int) -> list[str]:
    """PPO whose weights are cut apart among processes: what is trained, and how far off that ended."""
    place = folder / f"FSDP2 {processes}"
    shutil.copytree(folder / "model", place / "policy")
    shutil.copytree(folder / "judge", place / "judge")
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), str(SHARDED), str(place)]
    if fault := said_by(launch, place / "run.log"):
        return [f"- {processes} processes: {fault}"]
    lines = []
    for case in sharded_processes.CASES:
        trainer = sharded_processes.made(place, f"{case} alone", case)
        trainer.train()
        trainer.save_model()
        found = farthest(place / f"{case} alone", place / f"{case} sharded")
        again = farthest(place / f"{case} sharded", place / f"{case} resumed")
        lines.append(f"- {case}, {processes} processes: {found}; resumed in the middle of an update: {again}")
    return lines


def main() -> None:
    from rlhf_recipes.models import hardware

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    asked = parser.parse_args()
    folder = asked.output_dir.absolute()
    prepare(folder)
    ways = [way for way in asked.ways if way == "DDP" or importlib.util.find_spec("deepspeed") is not None]
    lines = [f"{datetime.date.today()}, {hardware()}; one thread a process.", ""]
    lines += [
        "| stage | trained | " + " | ".join(f"{way}, {count}" for way in ways for count in asked.processes) + " |"
    ]
    lines += ["|---" * (2 + len(ways) * len(asked.processes)) + "|"]
    found: dict[tuple[str, str], list[str]] = {
        each: [f"refused: {why}"] * len(ways) * len(asked.processes) if why else []
        for each, why in alone(folder).items()
    }
    fitting = [each for each, said in found.items() if not said]
    for way, count in itertools.product(ways, asked.processes):
        for each, said in cells(folder, way, count, fitting).items():
            found[each].append(said)
    refused = list(dict.fromkeys(said for row in found.values() for said in row if said.startswith("refused")))
    for (stage, kind), row in found.items():
        told = [f"refused ({refused.index(said) + 1})" if said in refused else said for said in row]
        lines.append(f"| {stage} | {kind} | " + " | ".join(told) + " |")
    lines += ["", *(f"{number}. {words.removeprefix('refused: ')}" for number, words in enumerate(refused, 1))]
    lines += ["", "PPO under native FSDP2:", ""]
    for count in asked.processes:
        lines += fsdp2(folder, count) if count > 1 else []
    (folder / "processes.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
