"""Every training stage on 1, 2 and 4 CPU processes, cut apart in every way, against one process: what ran, and how far off.

    python benchmarks/processes.py --output_dir runs/processes
    python benchmarks/processes.py --output_dir runs/processes --gpu

Runs of seconds, of a two-layer GPT-2; DeepSpeed where it is installed (the extra `deepspeed`). FSDP2 is Accelerate's, which it
has on GPUs alone, made to run on CPUs (`tests/programs/small_runs_fsdp.py`), and for PPO applied natively as well. A cell is the
largest difference of any weight to the run of one process by itself, or the line that refused it. With `--gpu`: on as many GPUs
as there are, under every configuration that is for them, to one process on the CPU; and each run once more, after an error in the
middle, by `--resume auto`.
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
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ROOT / "tests" / "programs"
PROGRAM, ACCELERATED, SHARDED = (
    PROGRAMS / f"{name}.py" for name in ("small_runs", "small_runs_fsdp", "train_ppo_fsdp")
)
sys.path += [str(ROOT / "src"), str(ROOT / "tests")]

from programs import small_runs, train_ppo_fsdp  # noqa: E402
from programs.small_runs import LORA, STAGES  # noqa: E402

KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "LoRA": LORA,
    "4-bit": LORA | {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
}
WAYS = {"DDP": "two_cpu_processes", "FSDP2": "fsdp2", "ZeRO-2": "deepspeed_zero2", "ZeRO-3": "deepspeed_zero3"}
LOW = {"bnb_4bit_quant_storage": "bfloat16", "dtype": "bfloat16", "bf16": True}
GPU_KINDS: dict[str, dict[str, Any]] = {
    **{kind: how | {"bf16": False} for kind, how in KINDS.items()},
    "8-bit": LORA | {"load_in_8bit": True, "bf16": False},
    "full, bf16": {"bf16": True},
    "4-bit, bf16": KINDS["4-bit"] | LOW,
}
GPU_WAYS = {
    "one GPU": "one_gpu", "DDP": "ddp", "FSDP2": "fsdp2", "FSDP2 for QLoRA": "fsdp2_qlora", "ZeRO-2": "deepspeed_zero2",
    "ZeRO-3": "deepspeed_zero3",
}  # fmt: skip
LEARNS_ALL = ("full", "full, bf16")
RESUMED = ("full", "LoRA", "4-bit")
AT_ONCE = 16  # launches on one GPU: they wait for Python and for imports, hardly for it
VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES")  # as it came: the runs that these are compared with see no GPU
Job = tuple[str, str]  # a stage, and what is trained


def prepare(folder: Path) -> None:
    """A small policy and reward model with random weights, and the rows that the small runs read."""
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
    model, reward_model = (
        GPT2LMHeadModel(GPT2Config(**shape)),
        GPT2ForSequenceClassification(GPT2Config(**shape, num_labels=1)),
    )
    small_runs.prepare(folder, model, reward_model, tokenizer)


def launched(folder: Path, way: str, processes: int, jobs: list[dict[str, Any]]) -> str:
    """Nothing, if the runs ended well; else the line that says why one did not."""
    told, log = folder / "job.json", folder / f"{jobs[0]['out']}.log"
    told.write_text(json.dumps(jobs))
    if way == "FSDP2":
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        return said_by([*launcher, str(ACCELERATED), str(folder), str(told)], log)
    asked = yaml.safe_load((ROOT / "accelerate_configs" / f"{WAYS[way]}.yaml").read_text())
    config = folder / "launch.yaml"
    kind = {} if processes > 1 or way != "DDP" else {"distributed_type": "NO"}
    config.write_text(yaml.safe_dump(asked | kind | {"use_cpu": True, "num_processes": processes}))
    command = ["accelerate.commands.launch", "--config_file", str(config), str(PROGRAM), str(folder), str(told)]
    return said_by(command, log)


def launched_on_gpus(folder: Path, way: str, processes: int, jobs: list[dict[str, Any]]) -> str:
    """The same on GPUs, under the configuration as it is shipped, but for the number of processes."""
    name = f"{jobs[0]['out']}{' again' if jobs[0].get('resume') else ''}"
    told = folder / f"{name}.json"
    told.write_text(json.dumps(jobs))
    if way == "DDP" and processes == 1:  # which `accelerate launch` refuses
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    else:
        config = ROOT / "accelerate_configs" / f"{GPU_WAYS[way]}.yaml"
        launcher = ["accelerate.commands.launch", "--config_file", str(config), "--num_processes", str(processes)]
    seen = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(processes))) if VISIBLE is None else VISIBLE}
    return said_by([*launcher, str(PROGRAM), str(folder), str(told)], folder / f"{name}.log", seen)


def said_by(command: list[str], log: Path, changes: dict[str, str] | None = None) -> str:
    """Of a module and its words, run: nothing, if it ended well; else the line that says why it did not."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"DS_ACCELERATOR": "cpu"} if changes is None else changes
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    try:
        done = subprocess.run(
            [sys.executable, "-m", *command], env=environment, capture_output=True, text=True, timeout=900, check=False
        )
    except subprocess.TimeoutExpired:
        return "did not end within fifteen minutes"
    log.write_text(done.stdout + done.stderr)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return "" if done.returncode == 0 else lines[0] if lines else f"failed, see {log.name}"


def identity(folder: Path, kinds: dict[str, dict[str, Any]]) -> dict[Job, str]:
    """Each run by this process by itself: the line that refused it, or nothing."""
    refused = {}
    for stage, kind in itertools.product(STAGES, kinds):
        try:
            small_runs.run(stage, folder, f"{stage} {kind} alone", **kinds[kind])
            refused[stage, kind] = ""
        except ValueError as error:
            refused[stage, kind] = str(error)
    return refused


def cells(folder: Path, way: str, processes: int, asked: Any) -> dict[Job, str]:
    """How far off each run ended, or what refused it: all in one launch, and one by one from the first that is refused."""
    out = {(stage, kind): f"{stage} {kind} {way} {processes}" for stage, kind in asked}
    jobs = {each: job_of(each, way, out[each], KINDS) for each in asked}
    launched(folder, way, processes, list(jobs.values()))
    found = {}
    for each in asked:
        fault = "" if finished(folder / out[each]) else launched(folder, way, processes, [jobs[each]])
        found[each] = told_of(folder, each, out[each], fault)
        print(f"{', '.join(each)}, {way}, {processes}: {found[each]}", flush=True)
    return found


def finished(run: Path) -> bool:
    """Whether a run came to its end; of one that did not, nothing is left to stand in the way of another try."""
    done = (run / "recipe.yaml").is_file()
    if not done:
        shutil.rmtree(run, ignore_errors=True)
    return done


def told_of(folder: Path, job: Job, out: str, fault: str) -> str:
    """A cell: what refused the run, or how far off it ended."""
    words = fault.removeprefix("error: ").replace(f"{folder}/", "")
    return f"refused: {words}" if fault else farthest(folder / f"{job[0]} {job[1]} alone", folder / out)


def job_of(job: Job, way: str, out: str, kinds: dict[str, dict[str, Any]], **more: Any) -> dict[str, Any]:
    stage, kind = job
    # Bytes cannot be cut apart by FSDP, floating-point numbers can.
    whole = {"bnb_4bit_quant_storage": "float32"} if kind == "4-bit" and way.startswith("FSDP") else {}
    return {"stage": stage, "out": out, **kinds[kind], **whole, **more}


def on_gpus(
    folder: Path, way: str, processes: int, stage: str, kinds: Sequence[str], resumed: Sequence[str]
) -> dict[Job, tuple[str, str]]:
    """Of each run on GPUs: what refused it, and what refused it when it went on after an error in its middle."""
    names = {(stage, kind): f"{stage} {kind} {way} {processes}" for kind in kinds}
    jobs = {each: job_of(each, way, out, GPU_KINDS) for each, out in names.items()}
    launched_on_gpus(folder, way, processes, list(jobs.values()))
    faults = {}
    for each, out in names.items():
        faults[each] = "" if finished(folder / out) else launched_on_gpus(folder, way, processes, [jobs[each]])
    cut = {each: f"{names[each]} resumed" for each in names if not faults[each] and each[1] in resumed}
    for each, out in cut.items():
        launched_on_gpus(folder, way, processes, [job_of(each, way, out, GPU_KINDS, dies=[4, "error"])])
    begun = {each: out for each, out in cut.items() if (folder / out / "checkpoint-4").is_dir()}
    jobs = {each: job_of(each, way, out, GPU_KINDS, resume="auto") for each, out in begun.items()}
    fault = launched_on_gpus(folder, way, processes, list(jobs.values())) if jobs else ""
    broken = {each: "" if finished(folder / out) else fault for each, out in begun.items()}
    return {each: (faults[each], broken.get(each, "no checkpoint was left" if each in cut else "")) for each in names}


def gpu_tables(
    folder: Path, places: list[tuple[str, int]], resumed: Sequence[str], keep: Callable[..., None]
) -> list[str]:
    """Every stage and kind at every place (a configuration and so many processes), many launches at a time; what there is
    is kept whenever one has ended."""
    said: dict[tuple[str, int, Job], tuple[str, str]] = {}
    lines: list[str] = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        running = {
            pool.submit(on_gpus, folder, *place, stage, kinds, resumed): place
            for place, stage in itertools.product(places, STAGES)
            for kinds in [LEARNS_ALL if stage == "pretrain" else list(GPU_KINDS)]
        }
        by_itself = identity(folder, GPU_KINDS)
        for done in as_completed(running):
            said |= {(*running[done], job): faults for job, faults in done.result().items()}
            lines = gpu_lines(folder, places, by_itself, said, resumed)
            keep(lines)
    return lines


def gpu_lines(
    folder: Path,
    places: list[tuple[str, int]],
    by_itself: dict[Job, str],
    said: dict[Any, tuple[str, str]],
    resumed: Any,
) -> list[str]:
    first: dict[Job, list[str]] = {job: [] for job in by_itself}
    again: dict[Job, list[str]] = {job: [] for job in by_itself if job[1] in resumed}
    for job, (way, count) in itertools.product(by_itself, places):
        out, refused = f"{job[0]} {job[1]} {way} {count}", by_itself[job]
        if refused or (way, count, job) not in said:
            cell = near = f"refused: {refused}" if refused else "not reached"
        else:
            fault, broken = said[way, count, job]
            broken = fault or broken
            cell, near = told_of(folder, job, out, fault), f"refused: {broken}"
            if job in again and not broken:
                near = farthest(folder / out, folder / f"{out} resumed")
        first[job].append(cell)
        if job in again:
            again[job].append(near)
    columns = [f"{way}, {count}" for way, count in places]
    head = "Broken off by an error after four steps, and gone on with by --resume auto: how far off the run that went through"
    return [*table(columns, first), *(["", f"{head}:", "", *table(columns, again)] if again else [])]


def table(columns: Iterable[str], found: dict[Job, list[str]]) -> list[str]:
    """Rows of cells; what refused a run stands below, once."""
    columns = list(columns)
    lines = ["| stage | trained | " + " | ".join(columns) + " |", "|---" * (2 + len(columns)) + "|"]
    refused = list(dict.fromkeys(said for row in found.values() for said in row if said.startswith("refused")))
    for (stage, kind), row in found.items():
        told = [f"refused ({refused.index(said) + 1})" if said in refused else said for said in row]
        lines.append(f"| {stage} | {kind} | " + " | ".join(told) + " |")
    return [*lines, "", *(f"{number}. {words.removeprefix('refused: ')}" for number, words in enumerate(refused, 1))]


def farthest(one: Path, other: Path) -> str:
    return f"{small_runs.farthest(small_runs.weights_in(one), small_runs.weights_in(other)):.0e}"


def fsdp2(folder: Path, processes: int) -> list[str]:
    """PPO whose weights are cut apart among processes: what is trained, and how far off that ended."""
    place = folder / f"FSDP2 {processes}"
    shutil.copytree(folder / "model", place / "policy")
    shutil.copytree(folder / "reward_model", place / "reward_model")
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), str(SHARDED), str(place)]
    if fault := said_by(launch, place / "run.log"):
        return [f"- {processes} processes: {fault}"]
    lines = []
    for case in train_ppo_fsdp.CASES:
        trainer = train_ppo_fsdp.made(place, f"{case} alone", case)
        trainer.train()
        trainer.save_model()
        found = farthest(place / f"{case} alone", place / f"{case} sharded")
        again = farthest(place / f"{case} sharded", place / f"{case} resumed")
        lines.append(f"- {case}, {processes} processes: {found}; resumed in the middle of an update: {again}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--ways", nargs="+", choices=sorted({*WAYS, *GPU_WAYS}))
    parser.add_argument("--once", action="store_true", help="with --gpu: nothing is broken off and resumed")
    parser.add_argument(
        "--gpu", action="store_true", help="on GPUs: one process, and one for each of them; --processes is for CPUs"
    )
    asked = parser.parse_args()
    if wrong := {*(asked.ways or ())} - {*(GPU_WAYS if asked.gpu else WAYS)}:
        parser.error(f"{', '.join(sorted(wrong))}: for runs {'without' if asked.gpu else 'with'} --gpu")
    folder, seen = asked.output_dir.absolute(), hardware_seen()
    able = importlib.util.find_spec("deepspeed") is not None
    ways = [way for way in asked.ways or (GPU_WAYS if asked.gpu else WAYS) if able or not way.startswith("ZeRO")]
    head = f"{datetime.date.today()}, {seen}, torch {torch.__version__}"
    head += "." if asked.gpu else "; one thread a process."

    def keep(lines: list[str]) -> None:
        (folder / "processes.md").write_text("\n".join([head, "", *lines, ""]), encoding="utf-8")

    if asked.gpu:
        if " x " not in seen:
            parser.error("there is no GPU here; leave --gpu out")
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # so that what this process runs itself runs on the CPU
        counts = sorted({1, int(seen.split(" x ")[0])})
        prepare(folder)
        places = [(way, count) for way in ways for count in counts if count == 1 or way != "one GPU"]
        lines = gpu_tables(folder, places, () if asked.once else RESUMED, keep)
    else:
        prepare(folder)
        lines = cpu_tables(folder, ways, asked.processes)
    keep(lines)
    print("\n".join([head, "", *lines]))


def hardware_seen() -> str:
    """What a process would run on; asked of one of its own, since a process that has looked at a GPU keeps seeing it."""
    asked = (
        "import torch; torch.set_num_threads(1); from rlhf_recipes.system import hardware; print(describe_hardware())"
    )
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", asked],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": path},
    ).stdout.strip()


def cpu_tables(folder: Path, ways: list[str], counts: list[int]) -> list[str]:
    """Every stage, kind and way, one after the other; PPO under native FSDP2."""
    found: dict[Job, list[str]] = {
        each: [f"refused: {why}"] * len(ways) * len(counts) if why else []
        for each, why in identity(folder, KINDS).items()
    }
    fitting = [each for each, said in found.items() if not said]
    for way, count in itertools.product(ways, counts):
        for each, said in cells(folder, way, count, fitting).items():
            found[each].append(said)
    lines = [
        *table([f"{way}, {count}" for way in ways for count in counts], found),
        "",
        "PPO under FSDP2 applied natively:",
        "",
    ]
    for count in counts:
        lines += fsdp2(folder, count) if count > 1 else []
    return lines


if __name__ == "__main__":
    main()
