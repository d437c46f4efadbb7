"""Faults during a push to the Hub, and their outcomes.

python tests/programs/hub_faults.py       inject each fault, push twice, and print the table of docs/hub.md
"""

import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from programs.hub_client import Client, ProcessResult  # noqa: E402
from programs.hub_server import SIGNATURE, Fault, Hub  # noqa: E402

__all__ = ["SIGNATURE", "Client", "Fault", "Hub"]
WRITE_TOKEN, READ_TOKEN, UNKNOWN_TOKEN = (f"hf_{word}{'0123456789abcdef' * 2}" for word in ("Good", "Read", "Wrong"))
OWNER = "me"


@dataclass
class Case:
    """A first push with faults. pushed: it succeeds. message: part of its error message, if it fails."""

    name: str
    faults: list[Fault] = field(default_factory=list)
    pushed: bool = False
    message: str = ""
    token: str | None = WRITE_TOKEN
    waits: list[float] = field(default_factory=list)  # waits in seconds that occur, among others
    new_repo: bool = False  # the repo does not exist before the push
    killed: bool = False
    read_timeout: float = 300.0  # seconds
    corrupts: bool = False  # the repo stores other bytes than were sent


BUSY = "Cannot create repo: another conflicting operation is in progress"
STEPS = ("info", "create", "preupload", "tree", "validate", "batch", "put", "verify", "commit")
CASES = [
    Case("no token", token=None, message="no token for the Hub; log in with `hf auth login`"),
    Case("unknown token (401)", token=UNKNOWN_TOKEN, message="rejects the token; log in again"),
    Case("read-only token (403)", token=READ_TOKEN, message="the token has no write access there"),
    Case(
        "read-only token, repository missing (403)",
        token=READ_TOKEN, new_repo=True, message="the token has no write access there",
    ),
    Case(
        "409 twice while the repository is created",
        [Fault("create", status=409, times=2, text=BUSY)], pushed=True, new_repo=True,
    ),
    Case(
        "409 at every commit",
        [Fault("commit", status=409)], message="another process changes the repo at the same time",
    ),
    Case(
        "429 with Retry-After: 7, twice", [Fault("commit", status=429, headers={"Retry-After": "7"}, times=2)],
        pushed=True, waits=[7.0, 7.0],
    ),
    Case(
        "429 with Retry-After: 7 while the repository is created",
        [Fault("create", status=429, headers={"Retry-After": "7"}, times=1)], pushed=True, waits=[7.0], new_repo=True,
    ),
    Case("429 at every request", [Fault("commit", status=429)], message="too many requests; wait and try again"),
    Case(
        "500 twice at each step",
        [Fault(step, times=2) for step in STEPS], pushed=True, new_repo=True, waits=[1.0, 2.0],
    ),
    Case(
        "500 at every request, before anything is sent",
        [Fault("preupload", status=503)], message="the Hub answers 503",
    ),
    Case(
        "500 at every request while the weights are sent",
        [Fault("put")], message="the Hub answers 500; wait and try again",
    ),
    Case("500 at every commit", [Fault("commit", status=502)], message="the Hub answers 502"),
    Case(
        "the connection breaks once while the weights are sent",
        [Fault("put", "disconnect", amount=50_000, times=1)], pushed=True,
    ),
    Case(
        "the connection always breaks while the weights are sent",
        [Fault("put", "disconnect", amount=50_000)], message="the connection failed",
    ),
    Case(
        "the connection breaks during the commit",
        [Fault("commit", "disconnect", amount=200)], message="the connection failed",
    ),
    Case("the commit succeeds, its response is lost", [Fault("commit", "lose_response", times=1)], pushed=True),
    Case("the Hub refuses the card (400)", [Fault("validate", status=400)], message="Invalid metadata in README.md"),
    Case("a slow link", [Fault("put", "slow", amount=1_000_000)], pushed=True),
    Case("the connection stalls once", [Fault("put", "hang", times=1)], pushed=True, waits=[1.0], read_timeout=0.4),
    Case("killed while the weights are sent", [Fault("put", "hang", amount=50_000)], killed=True),
    Case("killed during the commit", [Fault("commit", "hang")], killed=True),
    Case(
        "the Hub stores different bytes than it received",
        [Fault("commit", "corrupt")], message="differs from the file", corrupts=True,
    ),
]  # fmt: skip


def make_folder(folder: Path, seed: int) -> Path:
    """Write a model folder as a stage leaves it: large and small files, a value model, and files that are not pushed."""
    rng = __import__("random").Random(seed)
    contents = {
        "model.safetensors": rng.randbytes(300_000), "value_model/model.safetensors": rng.randbytes(70_000),
        "config.json": b'{"model_type": "gpt2", "seed": %d}' % seed, "value_model/config.json": b"{}", "empty.txt": b"",
        "README.md": b"---\ntags: [rlhf-recipes]\n---\n# Run %d\n" % seed, "recipe.yaml": b"seed: %d\n" % seed,
        "checkpoint-3/model.safetensors": b"x", "checkpoint-3/optimizer.pt": b"x", ".saving/model.safetensors": b"x",
        "optimizer.pt": b"x", "rng_state.pth": b"x", "progress_0.json": b"{}", "SHA256SUMS": b"0  x\n",
        "optimizer_by_name.pt": b"x", "rollout_0.safetensors": b"x", "latest": b"x", "zero_to_fp32.py": b"x",
        "global_step3/mp_rank_00_model_states.pt": b"x", "global_step3/zero_pp_rank_0_mp_rank_00_optim_states.pt": b"x",
    }  # fmt: skip
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


PUSHED = ("README.md", "config.json", "empty.txt", "model.safetensors", "recipe.yaml")
PUSHED += ("value_model/config.json", "value_model/model.safetensors")


def files_to_push(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in PUSHED}


def push_arguments(folder: Path, repo: str, *flags: str) -> list[str]:
    return ["push", "--folder", str(folder), "--hub_model_id", repo, *flags]


def push_with_faults(client: Client, hub: Hub, case: Case, folder: Path, repo: str) -> ProcessResult:
    with hub.failing(*case.faults):
        job = {"arguments": push_arguments(folder, repo), "token": case.token, "read_timeout": case.read_timeout}
        process = client.start(job)
        if case.killed:
            assert hub.waiting.wait(30), "the push did not reach the hanging request"
            os.kill(process, signal.SIGKILL)
        return client.finish()


def describe_outcome(
    case: Case, result: ProcessResult, before: dict[str, bytes], hub: Hub, repo: str, folder: Path
) -> str:
    """Return the table's cells of the first push: its outcome, and the repo after it."""
    files = hub.files(repo)
    if ("models", repo) not in hub.repos:
        state = "missing"
    elif files == files_to_push(folder):
        state = "complete new commit"
    else:
        state = "unchanged" if files == before else "one wrong file"
    outcome = "killed" if case.killed else "pushed" if result.code == 0 else "fails: exit code 2, one line"
    return f"{outcome} | {state}"


def main() -> None:
    from huggingface_hub import __version__

    from rlhf_recipes.system.hardware import describe_hardware

    provenance = f"{describe_hardware()} | {time.strftime('%Y-%m-%d')}"
    print(f"huggingface_hub {__version__}, by `python tests/programs/hub_faults.py`.\n")
    with tempfile.TemporaryDirectory() as folder_name, Hub() as hub:
        root = Path(folder_name)
        hub.tokens = {WRITE_TOKEN: (OWNER, True), READ_TOKEN: (OWNER, False)}
        client = Client(hub.address, root / "home")
        print(
            "| fault | first push | repository after it | second push | large files that the second push sent "
            "| hardware | date |"
        )
        print("|---|---|---|---|---|---|---|")
        for number, case in enumerate(CASES):
            old, folder = (make_folder(root / f"run-{seed}", seed) for seed in (2 * number, 2 * number + 1))
            repo = f"{OWNER}/case-{number}"
            if not case.new_repo:
                assert client.stage(*push_arguments(old, repo), token=WRITE_TOKEN).code == 0
            before = hub.files(repo)
            result = push_with_faults(client, hub, case, folder, repo)
            first = describe_outcome(case, result, before, hub, repo, folder)
            uploads = hub.count("put")
            second = client.stage(*push_arguments(folder, repo), token=WRITE_TOKEN)
            complete = second.code == 0 and hub.files(repo) == files_to_push(folder)
            completeness = f"{'complete' if complete else 'INCOMPLETE'} | {hub.count('put') - uploads} of 2"
            print(f"| {case.name} | {first} | {completeness} | {provenance} |", flush=True)
        client.close()


if __name__ == "__main__":
    main()
