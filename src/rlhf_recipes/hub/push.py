"""A folder as one commit of a repo, compared with what the repo then holds."""

import hashlib
import json
import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.folders import CHECKSUMS_FILE, HUB_ID
from rlhf_recipes.hub.repos import Repo, ensure_repo, open_repo
from rlhf_recipes.hub.requests import ContentMismatch, api, one_line_hub_errors, with_retries

Content = Path | bytes
ADAPTER_CONFIG = "adapter_config.json"

# What a run needs to go on, and nobody to use what it made.
RUN_STATE_PATTERNS = (
    *(CHECKSUMS_FILE, "training_args.bin", "optimizer.*", "scheduler.*", "scaler.*"),
    *("rng_state*", "progress_*.json", "rollout_*.safetensors"),
)
# A repo keeps none of these that the folder lacks: left by an earlier push, it would be loaded with the rest or instead.
WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", ADAPTER_CONFIG)
ROW_PATTERNS = ("*.jsonl", "*.jsonl.gz", "*.csv", "*.csv.gz", "*.tsv", "*.parquet")

logger = logging.getLogger(__name__)


def open_requested_repo(arguments: Any) -> None:
    """`open_repo`, if a push is asked for."""
    if arguments.push_to_hub:
        open_repo(Repo.asked(arguments))


def push_if_requested(folder: Path, arguments: Any) -> None:
    """Push the folder that a stage left and say where it is, if that is asked for."""
    if arguments.push_to_hub:
        print_pushed(folder, push_folder(folder, Repo.asked(arguments)))


def push_checkpoint(place: Path, step: int, arguments: Any) -> None:
    """What `hub_strategy` asks for at a checkpoint. That it fails is logged, and the training goes on."""
    if arguments.hub_strategy == "end":
        return
    repo, message = Repo.asked(arguments), f"Training in progress, step {step}"
    card = f"---\nlibrary_name: transformers\n---\n{message}. The card with the numbers comes at the end.\n".encode()
    beside = {"checkpoint": "last-checkpoint", "all_checkpoints": place.name}.get(arguments.hub_strategy)
    try:
        push_folder(place, repo, message, instead={"README.md": card})
        if beside is not None:
            push_folder(place, repo, f"{message}, checkpoint", into=beside, whole=True)
    except UserError as error:
        logger.warning("%s. The training goes on", error)


def push_folder(
    folder: str | Path,
    repo: Repo,
    message: str = "Left by rlhf-recipes",
    *,
    into: str = "",
    whole: bool = False,
    instead: Mapping[str, Content] | None = None,
    flags: Sequence[str] = (),
) -> str:
    """Push a folder as one commit and read that back; returns its address.

    Args:
        into: folder of the repo; by default its root.
        whole: also what only a run needs that goes on (of a checkpoint).
        instead: contents that the repo gets rather than, or beside, those of the folder, by their path in it.
        flags: what the command to try again says besides.

    Raises:
        UserError: it was not pushed; says why, and how to try again.
    """
    folder = Path(folder)
    end = f"; nothing of it is lost, push it with: {retry_command(folder, repo, flags)}"
    with one_line_hub_errors(f"{folder} was not pushed to {repo.name}", end, repo.token):
        ensure_repo(repo)
        contents = dict(files_to_push(folder, whole)) | dict(instead or {})
        files = {_join(into, name): content for name, content in contents.items()}
        expected = {path: checksums_of(content) for path, content in files.items()}
        commit = with_retries(lambda: _commit(repo, files, into, message))
        _compare(expected, with_retries(lambda: _tree(repo, commit.oid)), commit.oid[:10])
        _warn_of_bases(contents)
    return str(commit.commit_url)


def print_pushed(folder: Path, address: str) -> None:
    print(f"pushed {folder} to {address}", flush=True)


def retry_command(folder: Path, repo: Repo, more: Sequence[str] = ()) -> str:
    """The command that pushes the folder once more."""
    flags = ["--hub_private_repo", "false"] if repo.private is False else []
    flags += ["--hub_revision", repo.revision] if repo.revision else []
    words = ["python", "-m", "rlhf_recipes", "push", "--folder", str(folder), "--hub_model_id", repo.name]
    return shlex.join([*words, *flags, *more])


def files_to_push(folder: Path, whole: bool = False) -> Iterator[tuple[str, Path]]:
    """(path in the folder, file) of what is pushed: nothing hidden, and unless `whole` no checkpoints or state of a run."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") or part == "__pycache__" for part in parts)
        state = any(part.startswith("checkpoint-") for part in parts[:-1]) or _like(parts[-1], RUN_STATE_PATTERNS)
        if path.is_file() and not hidden and (whole or not state):
            yield "/".join(parts), path


class Sums(NamedTuple):
    """A file's size, its SHA-256, by which the Hub knows large files, and the sum by which git knows small ones."""

    size: int
    sha256: str
    git: str


def checksums_of(content: Content) -> Sums:
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    large, small = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    for part in [content] if isinstance(content, bytes) else _parts(content):
        large.update(part)
        small.update(part)
    return Sums(size, large.hexdigest(), small.hexdigest())


def _parts(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while part := stream.read(1 << 20):
            yield part


def _commit(repo: Repo, files: Mapping[str, Content], into: str, message: str) -> Any:
    """One commit, whatever the size: of a large folder the library's `upload_folder` makes several, one after the other."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    gone = [path for path in _tree(repo, repo.revision) if path not in files and _belongs(path, into, repo.kind)]
    operations: list[Any] = [CommitOperationDelete(path) for path in gone]
    operations += [CommitOperationAdd(path, content) for path, content in files.items()]
    return api(repo.token).create_commit(
        **repo.address, operations=operations, commit_message=message, revision=repo.revision
    )


def _belongs(path: str, into: str, kind: str) -> bool:
    """Whether a file of the repo is of what is pushed, and goes where the folder has it no more."""
    if into:
        return path.startswith(f"{into}/")
    place, _, name = path.rpartition("/")
    if kind == "dataset":
        return place in ("", "data") and _like(name, ROW_PATTERNS)
    return place in ("", "value_model") and _like(name, WEIGHT_PATTERNS)


def _tree(repo: Repo, revision: str | None) -> dict[str, Any]:
    entries = api(repo.token).list_repo_tree(**repo.address, recursive=True, revision=revision)
    return {each.path: each for each in entries if hasattr(each, "blob_id")}


def _compare(expected: Mapping[str, Sums], found: Mapping[str, Any], commit: str) -> None:
    for path, sums in expected.items():
        there = found.get(path)
        if there is None:
            raise ContentMismatch(f"commit {commit} lacks {path}; look for it in the .gitignore of the repo")
        same = there.lfs.sha256 == sums.sha256 if there.lfs else there.blob_id == sums.git
        if there.size != sums.size or not same:
            raise ContentMismatch(f"{path} in commit {commit} is not the file that was sent")


def _warn_of_bases(contents: Mapping[str, Content]) -> None:
    """An adapter says where its base model is. On this machine only, it can be loaded on this machine only."""
    for name, content in contents.items():
        if name.rpartition("/")[2] == ADAPTER_CONFIG:
            text = content if isinstance(content, bytes) else content.read_bytes()
            base = str(json.loads(text).get("base_model_name_or_path"))
            if Path(base).exists() or not HUB_ID.fullmatch(base):
                logger.warning(
                    "%s was pushed and names the local folder %s as its base, so nobody else can load it: push that as well, "
                    "then this once more with the Hub id of that as --base_model", name, base,
                )  # fmt: skip


def _join(into: str, name: str) -> str:
    return f"{into}/{name}" if into else name


def _like(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
