"""What 8 and 4 bits save and cost, stage by stage, and the four traps of bitsandbytes on a CPU, closed.

    python benchmarks/quantization.py [runs/quickstart]
    python benchmarks/quantization.py [runs/quickstart] --at_once 8

Each row is a process of its own, one thread, on what `make quickstart` left; under twelve minutes. It prints the tables and
leaves them in benchmarks/results/quantization.md, and all that it measured in quantization.json beside it. Where there is a GPU
the rows run on it (quantization_gpu.md); with several rows at once their times would say nothing, and are not told.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rlhf_recipes.system import describe_hardware

RESULTS = Path(__file__).parent / "results"
PRECISIONS = ("full", "8-bit", "4-bit", "4-bit double")
ROWS = {"optimizer": ("adamw_torch_fused", "adamw_8bit"), "traps": ("-",)}
Row = dict[str, Any]


def work(stage: str, precision: str, run: Path) -> Row:
    """One row, in a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name("quantization_worker.py")), stage, precision, str(run)]
    alone = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    said = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | alone)
    if said.returncode:
        raise SystemExit(f"{stage}, {precision}: {said.stderr[-3000:]}")
    found: Row = json.loads(said.stdout.strip().splitlines()[-1])
    return found


def size(count: float) -> str:
    return f"{count / 1e6:.1f}" if count >= 1e7 else f"{count / 1e6:.2f}"


def memory(row: Row, full: Row) -> list[str]:
    """MB held of each role, as a share of full precision, the peak of the process, and how long it took."""
    cells = [f"{size(held)} ({held / full['roles'][role]:.0%})" for role, held in row["roles"].items()]
    times = [f"{row['seconds'] / full['seconds']:.2f}x"] if "seconds" in row else []
    return [*cells, f"{row['peak'] / 2**20:.0f}", *times]


def memory_columns(row: Row) -> list[str]:
    return ["peak, MiB", *(["time"] if "seconds" in row else [])]


def pair(found: dict[str, float]) -> str:
    return f"{found['gold']:.3f} / {found['reward_model']:.2f}"


def plain(digits: int) -> Callable[[Any], str]:
    return lambda found: f"{found:.{digits}f}"


BEFORE_AND_AFTER: list[tuple[str, str, Callable[[Any], str]]] = [
    ("before", "before", plain(3)),
    ("after", "after", plain(3)),
    ("again", "read again", plain(3)),
    ("merged", "merged", plain(3)),
]
# Of each stage: its heading, what is measured (key, heading, how it is told), and the roles that are held.
TABLES: dict[str, tuple[str, list[tuple[str, str, Callable[[Any], str]]], list[str]]] = {
    "eval": (
        "Eval: the pretrained and the fine-tuned model, read in these bits",
        [
            ("perplexity", "perplexity of the pretrained", plain(3)),
            ("gold", "gold of the fine-tuned", plain(3)),
            ("kl", "its KL to itself in full, nats an answer", plain(4)),
        ],
        ["weights, MB"],
    ),
    "sft": (
        "SFT by LoRA, from the pretrained model: perplexity of held-out answers",
        BEFORE_AND_AFTER,
        ["base, MB", "adapter, MB"],
    ),
    "reward": (
        "Reward by LoRA, going on from the reward model: held-out pairs in the right order",
        BEFORE_AND_AFTER,
        ["base, MB", "adapter and head, MB"],
    ),
    "ppo": (
        "PPO by LoRA, from the fine-tuned model: gold / the reward model's score of held-out answers",
        [(key, name, pair) for key, name, _ in BEFORE_AND_AFTER],
        ["base: policy, value, reference, MB", "adapters and value head, MB", "reward model, MB"],
    ),
    "gpt2": (
        "PPO on GPT-2's own shape (124M, random weights), one update: what is held",
        [],
        ["base: policy, value, reference, MB", "adapters and value head, MB", "reward model, MB"],
    ),
}


def table(heading: str, columns: list[str], rows: list[list[str]]) -> list[str]:
    line = [f"| {' | '.join(['', *columns])} |", f"|{'---|' * (len(columns) + 1)}"]
    return [f"## {heading}", "", *line, *(f"| {' | '.join(row)} |" for row in rows), ""]


def stage_table(stage: str, found: dict[str, Row]) -> list[str]:
    heading, measured, roles = TABLES[stage]
    columns = [*(name for _, name, _ in measured), *roles, *memory_columns(found["full"])]
    rows = [
        [precision, *(tell(row[key]) for key, _, tell in measured), *memory(row, found["full"])]
        for precision, row in found.items()
    ]
    return table(heading, columns, rows)


def optimizer_table(found: dict[str, Row]) -> list[str]:
    first = found["adamw_torch_fused"]
    rows = [[name, f"{row['after']:.3f}", *memory(row, first)] for name, row in found.items()]
    columns = ["perplexity of held-out answers", "weights, MB", "state of AdamW, MB", *memory_columns(first)]
    return table("SFT of all weights: an optimizer in 8 bits", columns, rows)


def traps_table(rows_found: dict[str, Row]) -> list[str]:
    found = rows_found["-"]
    there = " on this CPU" + ("" if found["packs"] else " (no AVX512_BF16 in it, so bitsandbytes does not pack here)")
    there = " on this GPU" if found["gpu"] else there
    rows = [[name, told["plain"], told["ours"]] for name, told in found["rows"].items()]
    return table(f"The traps, in 4 bits{there}", ["plain bitsandbytes", "here"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, default=Path("runs/quickstart"), help="what make quickstart left")
    parser.add_argument("--at_once", type=int, default=1, help="rows that run side by side")
    parser.add_argument("--only", nargs="+", help="these tables alone; nothing is written")
    asked = parser.parse_args()
    if not (asked.run / "reward" / "model.safetensors").is_file():
        raise SystemExit(f"{asked.run} is no finished quickstart; make one: make quickstart")
    chosen = asked.only or [*TABLES, "optimizer", "traps"]
    run = asked.run.resolve()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(asked.at_once) as pool:
        if "gpt2" in chosen:
            work("gpt2", "none yet", Path(name))
        asking = {
            (stage, row): pool.submit(work, stage, row, Path(name) if stage == "gpt2" else run)
            for stage in chosen
            for row in ROWS.get(stage, PRECISIONS)
        }
        found: dict[str, Any] = {}
        lines: list[str] = []
        for stage in chosen:
            try:
                rows = {row: asking[stage, row].result() for row in ROWS.get(stage, PRECISIONS)}
            except SystemExit:  # which row failed, and how
                pool.shutdown(cancel_futures=True)
                raise
            if asked.at_once > 1:  # how long a row took beside others says nothing
                rows = {
                    row: {key: value for key, value in told.items() if key != "seconds"} for row, told in rows.items()
                }
            found[stage] = rows
            told_otherwise = {"traps": traps_table, "optimizer": optimizer_table}
            new = told_otherwise[stage](rows) if stage in told_otherwise else stage_table(stage, rows)
            lines += new
            print("\n".join(new), flush=True)
    if asked.only:
        return
    told = {"hardware": describe_hardware(), "date": str(datetime.date.today()), "seed": 42, "threads": 1}
    gpu = found["traps"]["-"]["gpu"]
    peak = (
        "allocated on the GPU"
        if gpu
        else "of the resident set above what the imports take, mapped checkpoint files included"
    )
    clock = "" if asked.at_once > 1 else f" Time: seconds{'' if gpu else ' of the processor'}, to full precision."
    many = f" --at_once {asked.at_once}" if asked.at_once > 1 else ""
    head = (
        f"Measured {told['date']} on {told['hardware']}, by `python benchmarks/quantization.py{many}`, seed {told['seed']}, each "
        f"row once. Peak: {peak}.{clock}\n\n"
    )
    RESULTS.mkdir(exist_ok=True)
    kept = RESULTS / f"quantization{'_gpu' if gpu else ''}"
    kept.with_suffix(".md").write_text(head + "\n".join(lines), encoding="utf-8")
    kept.with_suffix(".json").write_text(json.dumps(told | found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
