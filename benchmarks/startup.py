"""How long until something happens: imports, --help, and from launch to the first rollout; in turns with TRL.

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
COMMANDS = {  # what, theirs (today's TRL, in this environment), ours
    "import": (["-c", "import trl"], ["-c", "import rlhf_recipes"]),
    "import of the trainer": (["-c", "from trl import RLOOTrainer"], ["-c", "from rlhf_recipes import PPOTrainer"]),
    "--help": (["-c", HELP], ["recipes/ppo.py", "--help"]),
}


def seconds(words: list[str]) -> float:
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=os.environ | OFFLINE, capture_output=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed: {done.stderr.decode()[-500:]}")
    return time.perf_counter() - started


def until_ready(side: str, requirement: str | None) -> float:
    """From launch to the beginning of training; models are random, so nothing is read from a disk."""
    started = time.perf_counter()
    worker = Worker(f"start of {side}", "ppo_worker.py", [side], requirement)
    worker.wait()
    found = time.perf_counter() - started
    worker.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    import torch

    from rlhf_recipes.system import describe_hardware

    torch.set_num_threads(1)

    python_with(TRL)
    rows: dict[str, list[tuple[float, float]]] = {}
    for turn in range(asked.rounds + 1):  # the first warms the disk
        found = {what: (seconds(theirs), seconds(ours)) for what, (theirs, ours) in COMMANDS.items()}
        found["launch to the first rollout (TRL 1.12)"] = (until_ready("theirs", TRL), until_ready("ours", None))
        for what, pair in found.items() if turn else ():
            rows.setdefault(what, []).append(pair)
    lines = ["| | TRL's time over ours | seconds, TRL | seconds, ours |", "|---|---|---|---|"]
    for what, pairs in rows.items():
        theirs, ours = (sorted(each)[len(pairs) // 2] for each in zip(*pairs, strict=True))
        lines.append(f"| {what} | {as_ratio([one / two for one, two in pairs])} | {theirs:.2f} | {ours:.2f} |")
    head = f"{datetime.date.today()}, {describe_hardware()}; {asked.rounds} rounds in turns, disk warm."
    name = Path(HERE) / "results" / "startup"
    name.with_suffix(".md").write_text("\n".join([head, "", *lines, ""]), encoding="utf-8")
    name.with_suffix(".json").write_text(json.dumps({"head": head, "rows": rows}, indent=1), encoding="utf-8")
    print("\n".join([head, "", *lines]))


if __name__ == "__main__":
    main()
