"""What a push can meet on its way, and what becomes of it.

hub_faults.py       lay each fault once, push twice, and print the table of docs/hub.md
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

from programs.hub_client import Client, Said  # noqa: E402
from programs.hub_server import SIGNATURE, Fault, Hub  # noqa: E402

__all__ = ["SIGNATURE", "Client", "Fault", "Hub"]
GOOD, READ, WRONG = (f"hf_{word}{'0123456789abcdef' * 2}" for word in ("Good", "Read", "Wrong"))
OWNER = "me"


@dataclass
class Case:
    """faults: what the first try meets. pushed: whether it comes through. says: what its one line holds, if not."""

    name: str
    faults: list[Fault] = field(default_factory=list)
    pushed: bool = False
    says: str = ""
    token: str | None = GOOD
    waits: list[float] = field(default_factory=list)  # seconds among those that it waits
    new: bool = False  # the repo does not exist before
    killed: bool = False
    stalled: float = 300.0
    spoils: bool = False  # the repo holds something else than it was given


BUSY = "Cannot create repo: another conflicting operation is in progress"
STEPS = ("info", "create", "preupload", "tree", "validate", "batch", "put", "verify", "commit")
CASES = [
    Case("no token", token=None, says="no token for the Hub; log in with `hf auth login`"),
    Case("a token that the Hub does not know (401)", token=WRONG, says="rejects the token; log in again"),
    Case("a token that may only read (403)", token=READ, says="the token has no write access there"),
    Case("a token that may only read, and no repo yet (403)", token=READ, new=True, says="the token has no write access there"),
    Case("409 twice while the repo is made", [Fault("create", status=409, times=2, text=BUSY)], pushed=True, new=True),
    Case("409 at every commit", [Fault("commit", status=409)], says="another process changes the repo at the same time"),
    Case(
        "429 with Retry-After: 7, twice", [Fault("commit", status=429, headers={"Retry-After": "7"}, times=2)],
        pushed=True, waits=[7.0, 7.0],
    ),
    Case(
        "429 with Retry-After: 7 as the repo is made",
        [Fault("create", status=429, headers={"Retry-After": "7"}, times=1)], pushed=True, waits=[7.0], new=True,
    ),
    Case("429 without end", [Fault("commit", status=429)], says="too many requests; wait and try again"),
    Case("500 twice at each step", [Fault(step, times=2) for step in STEPS], pushed=True, new=True, waits=[1.0, 2.0]),
    Case("500 without end, before anything is sent", [Fault("preupload", status=503)], says="the Hub answers 503"),
    Case("500 without end, as the weights are sent", [Fault("put")], says="the Hub answers 500; wait and try again"),
    Case("500 without end, at the commit", [Fault("commit", status=502)], says="the Hub answers 502"),
    Case("the connection is cut within the weights, once", [Fault("put", "cut", amount=50_000, times=1)], pushed=True),
    Case("the connection is cut within the weights, always", [Fault("put", "cut", amount=50_000)], says="the connection failed"),
    Case("the connection is cut within the commit", [Fault("commit", "cut", amount=200)], says="the connection failed"),
    Case("the commit is made, its answer is lost", [Fault("commit", "lose", times=1)], pushed=True),
    Case("a card that the Hub does not take (400)", [Fault("validate", status=400)], says="Invalid metadata in README.md"),
    Case("a slow link", [Fault("put", "slow", amount=1_000_000)], pushed=True),
    Case("a link that goes dead, once", [Fault("put", "hang", times=1)], pushed=True, waits=[1.0], stalled=0.4),
    Case("killed while the weights are sent", [Fault("put", "hang", amount=50_000)], killed=True),
    Case("killed while the commit is made", [Fault("commit", "hang")], killed=True),
    Case("the Hub keeps something else than it was given", [Fault("commit", "spoil")], says="differs from the file", spoils=True),
]  # fmt: skip


def make_folder(folder: Path, seed: int) -> Path:
    """What a stage could have left: large and small files, a value model, and what is not pushed."""
    draw = __import__("random").Random(seed)
    contents = {
        "model.safetensors": draw.randbytes(300_000), "value_model/model.safetensors": draw.randbytes(70_000),
        "config.json": b'{"model_type": "gpt2", "seed": %d}' % seed, "value_model/config.json": b"{}", "empty.txt": b"",
        "README.md": b"---\ntags: [rlhf-recipes]\n---\n# Run %d\n" % seed, "recipe.yaml": b"seed: %d\n" % seed,
        "checkpoint-3/model.safetensors": b"x", "checkpoint-3/optimizer.pt": b"x", ".saving/model.safetensors": b"x",
        "optimizer.pt": b"x", "rng_state.pth": b"x", "progress_0.json": b"{}", "SHA256SUMS": b"0  x\n",
    }  # fmt: skip
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


PUSHED = ("README.md", "config.json", "empty.txt", "model.safetensors", "recipe.yaml")
PUSHED += ("value_model/config.json", "value_model/model.safetensors")


def pushed_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in PUSHED}


def words(folder: Path, repo: str, *more: str) -> list[str]:
    return ["push", "--folder", str(folder), "--hub_model_id", repo, *more]


def first_try(client: Client, hub: Hub, case: Case, folder: Path, repo: str) -> Said:
    with hub.failing(*case.faults):
        job = {"words": words(folder, repo), "token": case.token, "stalled": case.stalled}
        process = client.start(job)
        if case.killed:
            assert hub.waiting.wait(30), "it never came to where it was to be killed"
            os.kill(process, signal.SIGKILL)
        return client.finish()


def print_pushed(case: Case, said: Said, before: dict[str, bytes], hub: Hub, repo: str, folder: Path) -> str:
    """What the first try came to, for the table."""
    held = hub.files(repo)
    state = (
        "the whole new commit" if held == pushed_of(folder) else "as before" if held == before else "one wrong file"
    )
    state = "not there" if ("models", repo) not in hub.repos else state
    outcome = "killed" if case.killed else "pushed" if said.code == 0 else "not pushed, exit code 2, one line"
    return f"{outcome} | {state}"


def provenance() -> str:
    from huggingface_hub import __version__

    from rlhf_recipes.system.hardware import describe_hardware

    when = f"{time.strftime('%Y-%m-%d')} on {describe_hardware()}"
    return f"Measured {when}, with huggingface_hub {__version__}, by `python tests/programs/hub_faults.py`.\n"


def main() -> None:
    with tempfile.TemporaryDirectory() as place, Hub() as hub:
        hub.tokens = {GOOD: (OWNER, True), READ: (OWNER, False)}
        client = Client(hub.address, Path(place) / "home")
        print(provenance())
        print("| what goes wrong | first try | the repo after it | second try |\n|---|---|---|---|")
        for number, case in enumerate(CASES):
            old, folder = (make_folder(Path(place) / f"run-{seed}", seed) for seed in (2 * number, 2 * number + 1))
            repo = f"{OWNER}/case-{number}"
            if not case.new:
                assert client.stage(*words(old, repo), token=GOOD).code == 0
            before = hub.files(repo)
            said = first_try(client, hub, case, folder, repo)
            first = print_pushed(case, said, before, hub, repo, folder)
            sent = hub.count("put")
            again = client.stage(*words(folder, repo), token=GOOD)
            whole = again.code == 0 and hub.files(repo) == pushed_of(folder)
            second = f"{'whole' if whole else 'NOT WHOLE'}, {hub.count('put') - sent} of 2 large files sent"
            print(f"| {case.name} | {first} | {second} |", flush=True)
        client.close()


if __name__ == "__main__":
    main()
