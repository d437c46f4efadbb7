"""Run every training stage on 1, 2 and 4 CPU processes under each strategy, and compare the weights with one process.

    python benchmarks/processes.py --output_dir runs/processes
    python benchmarks/processes.py --output_dir runs/processes --gpu

The runs take seconds, on a two-layer GPT-2. DeepSpeed is included if it is installed (the extra `deepspeed`).
Accelerate has FSDP2 on GPUs only, so tests/programs/small_runs_fsdp.py enables it on CPUs; PPO also runs under FSDP2
applied directly. A cell of the table is the largest difference of any weight to a run of one process, or the message
that refused the run.

With `--gpu` the stages run on one GPU and on all GPUs, under every configuration for GPUs, and are compared with one
process on the CPU. Some runs are also interrupted by an error and resumed with `--resume auto`."""

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

TRAINED: dict[str, dict[str, Any]] = {  # which weights are trained -> flags
    "full": {},
    "LoRA": LORA,
    "4-bit": LORA | {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
}
# Strategy -> file in accelerate_configs/.
STRATEGIES = {
    "DDP": "two_cpu_processes", "FSDP2": "fsdp2", "ZeRO-2": "deepspeed_zero2", "ZeRO-3": "deepspeed_zero3",
}  # fmt: skip
BFLOAT16 = {"bnb_4bit_quant_storage": "bfloat16", "dtype": "bfloat16", "bf16": True}
GPU_TRAINED: dict[str, dict[str, Any]] = {
    **{trained: flags | {"bf16": False} for trained, flags in TRAINED.items()},
    "8-bit": LORA | {"load_in_8bit": True, "bf16": False},
    "full, bf16": {"bf16": True},
    "4-bit, bf16": TRAINED["4-bit"] | BFLOAT16,
}
GPU_STRATEGIES = {
    "one GPU": "one_gpu", "DDP": "ddp", "FSDP2": "fsdp2", "FSDP2 for QLoRA": "fsdp2_qlora", "ZeRO-2": "deepspeed_zero2",
    "ZeRO-3": "deepspeed_zero3",
}  # fmt: skip
ALL_WEIGHTS = ("full", "full, bf16")
RESUMED = ("full", "LoRA", "4-bit")
LAUNCHES_AT_ONCE = 16  # on one GPU: they mostly wait for Python and for imports
VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES")  # the reference runs in this process hide the GPUs
Job = tuple[str, str]  # stage, which weights are trained


def prepare(folder: Path) -> None:
    """Save a small policy and reward model with random weights, and the rows that the runs read."""
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


def launched(folder: Path, strategy: str, processes: int, jobs: list[dict[str, Any]]) -> str:
    """Launch runs on CPU processes, one after the other. Returns the error message, or "" if all succeeded."""
    job_file, log = folder / "job.json", folder / f"{jobs[0]['out']}.log"
    job_file.write_text(json.dumps(jobs))
    if strategy == "FSDP2":
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        return error_of([*launcher, str(ACCELERATED), str(folder), str(job_file)], log)
    config = yaml.safe_load((ROOT / "accelerate_configs" / f"{STRATEGIES[strategy]}.yaml").read_text())
    config |= {} if processes > 1 or strategy != "DDP" else {"distributed_type": "NO"}
    config_file = folder / "launch.yaml"
    config_file.write_text(yaml.safe_dump(config | {"use_cpu": True, "num_processes": processes}))
    command = [
        "accelerate.commands.launch",
        "--config_file",
        str(config_file),
        str(PROGRAM),
        str(folder),
        str(job_file),
    ]
    return error_of(command, log)


def launched_on_gpus(folder: Path, strategy: str, processes: int, jobs: list[dict[str, Any]]) -> str:
    """Launch runs on GPUs, with the shipped configuration and this number of processes; returns as `launched`."""
    name = f"{jobs[0]['out']}{' again' if jobs[0].get('resume') else ''}"
    job_file = folder / f"{name}.json"
    job_file.write_text(json.dumps(jobs))
    if strategy == "DDP" and processes == 1:  # `accelerate launch` refuses it
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    else:
        config_file = ROOT / "accelerate_configs" / f"{GPU_STRATEGIES[strategy]}.yaml"
        launcher = ["accelerate.commands.launch", "--config_file", str(config_file), "--num_processes", str(processes)]
    gpus = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(processes))) if VISIBLE is None else VISIBLE}
    return error_of([*launcher, str(PROGRAM), str(folder), str(job_file)], folder / f"{name}.log", gpus)


def error_of(command: list[str], log: Path, changes: dict[str, str] | None = None) -> str:
    """Run a Python module with arguments. Returns its error message, or "" if it succeeded.

    changes: environment variables; None: those that keep DeepSpeed on the CPU.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"DS_ACCELERATOR": "cpu"} if changes is None else changes
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    try:
        process = subprocess.run(
            [sys.executable, "-m", *command], env=environment, capture_output=True, text=True, timeout=900, check=False
        )
    except subprocess.TimeoutExpired:
        return "did not end within fifteen minutes"
    log.write_text(process.stdout + process.stderr)
    lines = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    return "" if process.returncode == 0 else lines[0] if lines else f"failed, see {log.name}"


def reference_runs(folder: Path, trained: dict[str, dict[str, Any]]) -> dict[Job, str]:
    """Do each run in this process alone. Returns the message that refused it, or ""."""
    refused = {}
    for stage, name in itertools.product(STAGES, trained):
        try:
            small_runs.run(stage, folder, f"{stage} {name} alone", **trained[name])
            refused[stage, name] = ""
        except ValueError as error:
            refused[stage, name] = str(error)
    return refused


def cells(folder: Path, strategy: str, processes: int, jobs: Sequence[Job]) -> dict[Job, str]:
    """Return the table cell of each job.

    All jobs share one launch; from the first refused one on, each has a separate launch.
    """
    out = {(stage, trained): f"{stage} {trained} {strategy} {processes}" for stage, trained in jobs}
    specs = {job: job_spec(job, strategy, out[job], TRAINED) for job in jobs}
    launched(folder, strategy, processes, list(specs.values()))
    found = {}
    for job in jobs:
        error = ""
        if not is_finished(folder / out[job]):
            shutil.rmtree(folder / out[job], ignore_errors=True)
            error = launched(folder, strategy, processes, [specs[job]])
        found[job] = cell_of(folder, job, out[job], error)
        print(f"{', '.join(job)}, {strategy}, {processes}: {found[job]}", flush=True)
    return found


def is_finished(run: Path) -> bool:
    """Whether the folder holds a finished run."""
    return (run / "recipe.yaml").is_file()


def cell_of(folder: Path, job: Job, out: str, error: str) -> str:
    """Return a table cell: the message that refused the run, or its largest difference to the reference run."""
    message = error.removeprefix("error: ").replace(f"{folder}/", "")
    return f"refused: {message}" if error else largest_difference(folder / f"{job[0]} {job[1]} alone", folder / out)


def job_spec(job: Job, strategy: str, out: str, flags: dict[str, dict[str, Any]], **more: Any) -> dict[str, Any]:
    """Return the run that small_runs.py does for a job: its stage, output folder and flags."""
    stage, trained = job
    # FSDP shards floating-point storage, not bytes.
    storage = {"bnb_4bit_quant_storage": "float32"} if trained == "4-bit" and strategy.startswith("FSDP") else {}
    return {"stage": stage, "out": out, **flags[trained], **storage, **more}


def on_gpus(
    folder: Path, strategy: str, processes: int, stage: str, trained: Sequence[str], resumed: Sequence[str]
) -> dict[Job, tuple[str, str]]:
    """Run a stage on GPUs. Returns two messages for each job: why the run failed, and why the resumed run failed.

    resumed: the kinds of trained weights whose runs are also interrupted by an error and resumed.
    """
    names = {(stage, name): f"{stage} {name} {strategy} {processes}" for name in trained}
    specs = {job: job_spec(job, strategy, out, GPU_TRAINED) for job, out in names.items()}
    launched_on_gpus(folder, strategy, processes, list(specs.values()))
    errors = dict.fromkeys(names, "")
    for job, out in names.items():
        if not is_finished(folder / out):
            shutil.rmtree(folder / out, ignore_errors=True)
            errors[job] = launched_on_gpus(folder, strategy, processes, [specs[job]])
    interrupted = {job: f"{names[job]} resumed" for job in names if not errors[job] and job[1] in resumed}
    for job, out in interrupted.items():
        spec = job_spec(job, strategy, out, GPU_TRAINED, dies=[4, "error"])
        launched_on_gpus(folder, strategy, processes, [spec])
    saved = {job: out for job, out in interrupted.items() if (folder / out / "checkpoint-4").is_dir()}
    specs = {job: job_spec(job, strategy, out, GPU_TRAINED, resume="auto") for job, out in saved.items()}
    error = launched_on_gpus(folder, strategy, processes, list(specs.values())) if specs else ""
    resume_errors = {job: "" if is_finished(folder / out) else error for job, out in saved.items()}
    missing = {job: "no checkpoint was left" if job in interrupted else "" for job in names}
    return {job: (errors[job], resume_errors.get(job, missing[job])) for job in names}


def gpu_tables(
    folder: Path, places: list[tuple[str, int]], resumed: Sequence[str], save: Callable[..., None]
) -> list[str]:
    """Run every job at every place (strategy, number of processes), many launches at a time.

    `save` gets the lines of the tables whenever a launch has ended.
    """
    results: dict[tuple[str, int, Job], tuple[str, str]] = {}
    lines: list[str] = []
    with ThreadPoolExecutor(LAUNCHES_AT_ONCE) as pool:
        running = {
            pool.submit(on_gpus, folder, *place, stage, trained, resumed): place
            for place, stage in itertools.product(places, STAGES)
            for trained in [ALL_WEIGHTS if stage == "pretrain" else list(GPU_TRAINED)]
        }
        references = reference_runs(folder, GPU_TRAINED)
        for future in as_completed(running):
            results |= {(*running[future], job): errors for job, errors in future.result().items()}
            lines = gpu_lines(folder, places, references, results, resumed)
            save(lines)
    return lines


def gpu_lines(
    folder: Path,
    places: list[tuple[str, int]],
    references: dict[Job, str],
    results: dict[Any, tuple[str, str]],
    resumed: Sequence[str],
) -> list[str]:
    """Return the lines of the two tables: whole runs, and resumed runs."""
    whole: dict[Job, list[str]] = {job: [] for job in references}
    again: dict[Job, list[str]] = {job: [] for job in references if job[1] in resumed}
    for job, (strategy, count) in itertools.product(references, places):
        out, refused = f"{job[0]} {job[1]} {strategy} {count}", references[job]
        if refused or (strategy, count, job) not in results:
            cell = resumed_cell = f"refused: {refused}" if refused else "not reached"
        else:
            error, resume_error = results[strategy, count, job]
            resume_error = error or resume_error
            cell, resumed_cell = cell_of(folder, job, out, error), f"refused: {resume_error}"
            if job in again and not resume_error:
                resumed_cell = largest_difference(folder / out, folder / f"{out} resumed")
        whole[job].append(cell)
        if job in again:
            again[job].append(resumed_cell)
    columns = [f"{strategy}, {count}" for strategy, count in places]
    head = "Interrupted by an error after four steps and resumed with --resume auto, compared with the whole run"
    return [*table(columns, whole), *(["", f"{head}:", "", *table(columns, again)] if again else [])]


def table(columns: Iterable[str], found: dict[Job, list[str]]) -> list[str]:
    """Return the lines of a table; messages that refused a run are numbered below it."""
    columns = list(columns)
    lines = ["| stage | trained | " + " | ".join(columns) + " |", "|---" * (2 + len(columns)) + "|"]
    messages = list(dict.fromkeys(cell for row in found.values() for cell in row if cell.startswith("refused")))
    for (stage, trained), row in found.items():
        numbered = [f"refused ({messages.index(cell) + 1})" if cell in messages else cell for cell in row]
        lines.append(f"| {stage} | {trained} | " + " | ".join(numbered) + " |")
    notes = [f"{number}. {message.removeprefix('refused: ')}" for number, message in enumerate(messages, 1)]
    return [*lines, "", *notes]


def largest_difference(one: Path, other: Path) -> str:
    """Return the largest difference of any weight between two runs."""
    return f"{small_runs.largest_difference(small_runs.weights_in(one), small_runs.weights_in(other)):.0e}"


def fsdp2(folder: Path, processes: int) -> list[str]:
    """Run PPO under FSDP2 applied directly. Returns a line for each case."""
    place = folder / f"FSDP2 {processes}"
    shutil.copytree(folder / "model", place / "policy")
    shutil.copytree(folder / "reward_model", place / "reward_model")
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), str(SHARDED), str(place)]
    if error := error_of(launch, place / "run.log"):
        return [f"- {processes} processes: {error}"]
    lines = []
    for case in train_ppo_fsdp.CASES:
        trainer = train_ppo_fsdp.make_trainer(place, f"{case} alone", case)
        trainer.train()
        trainer.save_model()
        whole = largest_difference(place / f"{case} alone", place / f"{case} sharded")
        again = largest_difference(place / f"{case} sharded", place / f"{case} resumed")
        lines.append(f"- {case}, {processes} processes: {whole}; resumed in the middle of an update: {again}")
    return lines


def main() -> None:
    """Run everything, print the tables, and write them to processes.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="numbers of CPU processes")
    parser.add_argument("--strategies", nargs="+", choices=sorted({*STRATEGIES, *GPU_STRATEGIES}))
    parser.add_argument("--once", action="store_true", help="with --gpu: interrupt and resume no run")
    parser.add_argument(
        "--gpu", action="store_true", help="on GPUs: one process, and one per GPU; --processes is for CPUs"
    )
    options = parser.parse_args()
    allowed = GPU_STRATEGIES if options.gpu else STRATEGIES
    if wrong := {*(options.strategies or ())} - {*allowed}:
        parser.error(f"{', '.join(sorted(wrong))}: not {'with' if options.gpu else 'without'} --gpu")
    folder, hardware = options.output_dir.absolute(), hardware_seen()
    has_deepspeed = importlib.util.find_spec("deepspeed") is not None
    strategies = [name for name in options.strategies or allowed if has_deepspeed or not name.startswith("ZeRO")]
    head = f"{datetime.date.today()}, {hardware}, torch {torch.__version__}"
    head += "." if options.gpu else "; one thread per process."

    def save(lines: list[str]) -> None:
        (folder / "processes.md").write_text("\n".join([head, "", *lines, ""]), encoding="utf-8")

    if options.gpu:
        if " x " not in hardware:
            parser.error("no GPU found; leave --gpu out")
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the reference runs of this process are on the CPU
        counts = sorted({1, int(hardware.split(" x ")[0])})
        prepare(folder)
        places = [(name, count) for name in strategies for count in counts if count == 1 or name != "one GPU"]
        lines = gpu_tables(folder, places, () if options.once else RESUMED, save)
    else:
        prepare(folder)
        lines = cpu_tables(folder, strategies, options.processes)
    save(lines)
    print("\n".join([head, "", *lines]))


def hardware_seen() -> str:
    """Describe the hardware, in a separate process: a process that has used a GPU cannot hide it later."""
    lines = ("import torch", "from rlhf_recipes.system import describe_hardware")
    program = "\n".join([*lines, "torch.set_num_threads(1)", "print(describe_hardware())"])
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": path},
    ).stdout.strip()


def cpu_tables(folder: Path, strategies: list[str], counts: list[int]) -> list[str]:
    """Run every job under every strategy with each number of processes, and PPO under FSDP2 applied directly."""
    rows: dict[Job, list[str]] = {
        job: [f"refused: {message}"] * len(strategies) * len(counts) if message else []
        for job, message in reference_runs(folder, TRAINED).items()
    }
    possible = [job for job, row in rows.items() if not row]
    for strategy, count in itertools.product(strategies, counts):
        for job, cell in cells(folder, strategy, count, possible).items():
            rows[job].append(cell)
    columns = [f"{strategy}, {count}" for strategy in strategies for count in counts]
    lines = [*table(columns, rows), "", "PPO under FSDP2 applied directly:", ""]
    for count in counts:
        lines += fsdp2(folder, count) if count > 1 else []
    return lines


if __name__ == "__main__":
    main()
