"""Memory, quality and time of each stage, 8-bit and 4-bit, and the bugs of bitsandbytes with and without our
workarounds.

    python benchmarks/quantization.py [runs/quickstart]
    python benchmarks/quantization.py [runs/quickstart] --at_once 8

Each row of a table is a separate process with one thread, on the models that `make quickstart` left. It takes less
than twelve minutes. The tables are printed and written to benchmarks/results/quantization.md, all measurements to
quantization.json. If there is a GPU, the rows run on it (quantization_gpu.md). With several rows at once, times are
left out."""

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
ROWS = {"optimizer": ("adamw_torch_fused", "adamw_8bit"), "bugs": ("-",)}  # rows of the tables without precisions
Row = dict[str, Any]


def measured_row(table_name: str, precision: str, run: Path) -> Row:
    """Measure one row in a separate process."""
    command = [
        sys.executable,
        str(Path(__file__).with_name("quantization_worker.py")),
        table_name,
        precision,
        str(run),
    ]
    settings = {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | settings)
    if process.returncode:
        raise SystemExit(f"{table_name}, {precision}: {process.stderr[-3000:]}")
    row: Row = json.loads(process.stdout.strip().splitlines()[-1])
    return row


def megabytes(count: float) -> str:
    """Format bytes as MB."""
    return f"{count / 1e6:.1f}" if count >= 1e7 else f"{count / 1e6:.2f}"


def memory_cells(row: Row, full: Row) -> list[str]:
    """Return the MB of each role (and its share of full precision), the peak of the process, and the relative time."""
    cells = [f"{megabytes(size)} ({size / full['roles'][role]:.0%})" for role, size in row["roles"].items()]
    times = [f"{row['seconds'] / full['seconds']:.2f}x"] if "seconds" in row else []
    return [*cells, f"{row['peak'] / 2**20:.0f}", *times]


def memory_columns(row: Row) -> list[str]:
    """Return the headings of the last cells of `memory_cells`."""
    return ["peak, MiB", *(["time, full = 1"] if "seconds" in row else [])]


def scores(value: dict[str, float]) -> str:
    """Format a gold score and a reward model's score."""
    return f"{value['gold']:.3f} / {value['reward_model']:.2f}"


def number(digits: int) -> Callable[[Any], str]:
    """Return a function that formats a number with so many digits."""
    return lambda value: f"{value:.{digits}f}"


BEFORE_AND_AFTER: list[tuple[str, str, Callable[[Any], str]]] = [
    ("before", "before", number(3)),
    ("after", "after", number(3)),
    ("again", "loaded again", number(3)),
    ("merged", "merged", number(3)),
]
# Each table: its title, its measurements (key, heading, format), and the headings of the roles.
TABLES: dict[str, tuple[str, list[tuple[str, str, Callable[[Any], str]]], list[str]]] = {
    "eval": (
        "Eval: the pretrained and the fine-tuned model, quantized as they are loaded",
        [
            ("perplexity", "perplexity of the pretrained model", number(3)),
            ("gold", "gold score of the fine-tuned model", number(3)),
            ("kl", "its KL to itself in full precision, nats per answer", number(4)),
        ],
        ["weights, MB"],
    ),
    "sft": (
        "SFT with LoRA, from the pretrained model: perplexity of held-out answers",
        BEFORE_AND_AFTER,
        ["base, MB", "adapter, MB"],
    ),
    "reward": (
        "Reward with LoRA, from the reward model: held-out pairs in the right order",
        BEFORE_AND_AFTER,
        ["base, MB", "adapter and head, MB"],
    ),
    "ppo": (
        "PPO with LoRA, from the fine-tuned model: gold / reward model's score of held-out answers",
        [(key, name, scores) for key, name, _ in BEFORE_AND_AFTER],
        ["base: policy, value, reference, MB", "adapters and value head, MB", "reward model, MB"],
    ),
    "gpt2": (
        "PPO on GPT-2's shape (124M, random weights), one update: memory",
        [],
        ["base: policy, value, reference, MB", "adapters and value head, MB", "reward model, MB"],
    ),
}


def table(title: str, columns: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a section with one table."""
    header = [f"| {' | '.join(['', *columns])} |", f"|{'---|' * (len(columns) + 1)}"]
    return [f"## {title}", "", *header, *(f"| {' | '.join(row)} |" for row in rows), ""]


def stage_table(name: str, rows: dict[str, Row]) -> list[str]:
    """Return the section of a stage."""
    title, measurements, roles = TABLES[name]
    columns = [*(heading for _, heading, _ in measurements), *roles, *memory_columns(rows["full"])]
    cells = [
        [precision, *(formatted(row[key]) for key, _, formatted in measurements), *memory_cells(row, rows["full"])]
        for precision, row in rows.items()
    ]
    return table(title, columns, cells)


def optimizer_table(rows: dict[str, Row]) -> list[str]:
    """Return the section of the optimizers."""
    first = rows["adamw_torch_fused"]
    cells = [[name, f"{row['after']:.3f}", *memory_cells(row, first)] for name, row in rows.items()]
    columns = ["perplexity of held-out answers", "weights, MB", "state of AdamW, MB", *memory_columns(first)]
    return table("SFT of all weights: an 8-bit optimizer", columns, cells)


def bugs_table(rows: dict[str, Row]) -> list[str]:
    """Return the section of the bugs of bitsandbytes."""
    result = rows["-"]
    place = " on this CPU" + ("" if result["packs"] else " (without AVX512_BF16, so bitsandbytes does not pack)")
    place = " on this GPU" if result["gpu"] else place
    cells = [[name, outcome["plain"], outcome["ours"]] for name, outcome in result["rows"].items()]
    return table(f"Bugs of bitsandbytes, 4-bit{place}", ["plain bitsandbytes", "with the workarounds"], cells)


def main() -> None:
    """Measure every table, print it, and write all of them to results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "run", nargs="?", type=Path, default=Path("runs/quickstart"), help="folder of a finished quickstart"
    )
    parser.add_argument("--at_once", type=int, default=1, help="rows that run at the same time")
    parser.add_argument("--only", nargs="+", help="measure these tables only, and write nothing")
    options = parser.parse_args()
    if not (options.run / "reward" / "model.safetensors").is_file():
        raise SystemExit(f"{options.run} is not the folder of a finished quickstart; make one: make quickstart")
    names = options.only or [*TABLES, "optimizer", "bugs"]
    run = options.run.resolve()
    with tempfile.TemporaryDirectory() as models, ThreadPoolExecutor(options.at_once) as pool:
        if "gpt2" in names:
            measured_row("gpt2", "models only", Path(models))
        futures = {
            (name, row): pool.submit(measured_row, name, row, Path(models) if name == "gpt2" else run)
            for name in names
            for row in ROWS.get(name, PRECISIONS)
        }
        results: dict[str, Any] = {}
        lines: list[str] = []
        for name in names:
            try:
                rows = {row: futures[name, row].result() for row in ROWS.get(name, PRECISIONS)}
            except SystemExit:  # it names the row and the error
                pool.shutdown(cancel_futures=True)
                raise
            if options.at_once > 1:  # times of rows that run together mean nothing
                rows = {
                    row: {key: value for key, value in measurements.items() if key != "seconds"}
                    for row, measurements in rows.items()
                }
            results[name] = rows
            own_tables = {"bugs": bugs_table, "optimizer": optimizer_table}
            section = own_tables[name](rows) if name in own_tables else stage_table(name, rows)
            lines += section
            print("\n".join(section), flush=True)
    if options.only:
        return
    facts = {"hardware": describe_hardware(), "date": str(datetime.date.today()), "seed": 42, "threads": 1}
    gpu = results["bugs"]["-"]["gpu"]
    peak = (
        "allocated on the GPU"
        if gpu
        else "of the resident set above that of the imports, with mapped checkpoint files"
    )
    clock = "" if options.at_once > 1 else f" Time: {'seconds' if gpu else 'CPU seconds'}, relative to full precision."
    flag = f" --at_once {options.at_once}" if options.at_once > 1 else ""
    command = f"`python benchmarks/quantization.py{flag}`, seed {facts['seed']}, each row once"
    head = f"Measured {facts['date']} on {facts['hardware']}, by {command}. Peak: {peak}.{clock}\n\n"
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"quantization{'_gpu' if gpu else ''}"
    path.with_suffix(".md").write_text(head + "\n".join(lines), encoding="utf-8")
    path.with_suffix(".json").write_text(json.dumps(facts | results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
