"""Time to start, in turns with TRL: imports, --help, and from launch to the first rollout.

python benchmarks/startup.py [--rounds 5]
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from peers import HERE, OFFLINE, Worker, as_ratio, python_with

TRL = "trl==1.12.0"
ROOT = HERE.parent
HELP = "import sys; from trl.cli import main; sys.argv = ['trl', 'rloo', '--help']; main()"
COMMANDS = {  # name: (command of the TRL in this environment, our command)
    "import": (["-c", "import trl"], ["-c", "import rlhf_recipes"]),
    "import of the trainer": (["-c", "from trl import RLOOTrainer"], ["-c", "from rlhf_recipes import PPOTrainer"]),
    "--help": (["-c", HELP], ["recipes/ppo.py", "--help"]),
}


def seconds(words: list[str]) -> float:
    """Return the seconds that a Python command takes."""
    started = time.perf_counter()
    process = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=os.environ | OFFLINE, capture_output=True, check=False
    )
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} failed: {process.stderr.decode()[-500:]}")
    return time.perf_counter() - started


def until_ready(side: str, requirement: str | None) -> float:
    """Return the seconds from launch to the beginning of training; models are random, so no weights are read."""
    started = time.perf_counter()
    worker = Worker(f"start of {side}", "ppo_worker.py", [side], requirement)
    worker.wait()
    elapsed = time.perf_counter() - started
    worker.close()
    return elapsed


def main() -> None:
    """Measure, print the table, and write it with all measurements to results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    import torch

    from rlhf_recipes.system import describe_hardware

    torch.set_num_threads(1)

    python_with(TRL)
    rows: dict[str, list[tuple[float, float]]] = {}
    for turn in range(options.rounds + 1):  # the first round only fills the disk cache
        times = {name: (seconds(theirs), seconds(ours)) for name, (theirs, ours) in COMMANDS.items()}
        times["launch to the first rollout (TRL 1.12)"] = (until_ready("theirs", TRL), until_ready("ours", None))
        for name, pair in times.items() if turn else ():
            rows.setdefault(name, []).append(pair)
    lines = ["| | TRL's time, ours = 1 | TRL, s | ours, s |", "|---|---|---|---|"]
    for name, pairs in rows.items():
        theirs, ours = (sorted(side)[len(pairs) // 2] for side in zip(*pairs, strict=True))
        lines.append(f"| {name} | {as_ratio([one / two for one, two in pairs])} | {theirs:.2f} | {ours:.2f} |")
    head = f"{datetime.date.today()}, {describe_hardware()}; {options.rounds} rounds in turns, disk cache warm."
    path = Path(HERE) / "results" / "startup"
    path.with_suffix(".md").write_text("\n".join([head, "", *lines, ""]), encoding="utf-8")
    path.with_suffix(".json").write_text(json.dumps({"head": head, "rows": rows}, indent=1), encoding="utf-8")
    print("\n".join([head, "", *lines]))


if __name__ == "__main__":
    main()
