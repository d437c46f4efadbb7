"""Push a folder as one commit, and compare the files of that commit with the folder."""

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

# Files that a run needs to resume, and that nobody needs to use its model.
RUN_STATE_PATTERNS = (
    *(CHECKSUMS_FILE, "training_args.bin", "optimizer.*", "optimizer_by_name.pt", "scheduler.*", "scaler.*"),
    *("rng_state*", "progress_*.json", "rollout_*.safetensors"),
    *("*_optim_states.pt", "*_model_states.pt", "latest", "zero_to_fp32.py"),  # DeepSpeed's
)
# Files of these names that only the repo has are deleted: loaders would prefer or add them.
WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", ADAPTER_CONFIG)
ROW_PATTERNS = ("*.jsonl", "*.jsonl.gz", "*.csv", "*.csv.gz", "*.tsv", "*.parquet")

logger = logging.getLogger(__name__)


def open_requested_repo(arguments: Any) -> None:
    """Call `open_repo`, if the arguments request a push."""
    if arguments.push_to_hub:
        open_repo(Repo.from_arguments(arguments))


def push_if_requested(folder: Path, arguments: Any) -> None:
    """Push a stage's output folder and print its address, if the arguments request a push."""
    if arguments.push_to_hub:
        print_pushed(folder, push_folder(folder, Repo.from_arguments(arguments)))


def push_checkpoint(checkpoint: Path, step: int, arguments: Any) -> None:
    """Push a checkpoint folder as `hub_strategy` requests. A failure is logged, and the training continues."""
    if arguments.hub_strategy == "end":
        return
    repo, message = Repo.from_arguments(arguments), f"Training in progress, step {step}"
    card = f"---\nlibrary_name: transformers\n---\n{message}. The model card follows at the end.\n".encode()
    subfolder = {"checkpoint": "last-checkpoint", "all_checkpoints": checkpoint.name}.get(arguments.hub_strategy)
    try:
        push_folder(checkpoint, repo, message, replacements={"README.md": card})
        if subfolder is not None:
            push_folder(checkpoint, repo, f"{message}, checkpoint", into=subfolder, with_run_state=True)
    except UserError as error:
        logger.warning("%s. The training continues", error)


def push_folder(
    folder: str | Path,
    repo: Repo,
    message: str = "Pushed by rlhf-recipes",
    *,
    into: str = "",
    with_run_state: bool = False,
    replacements: Mapping[str, Content] | None = None,
    flags: Sequence[str] = (),
) -> str:
    """Push a folder as one commit, verify the commit, and return its address.

    Args:
        folder: the folder to push. It is not changed.
        repo: the repo to push to, which is created if it does not exist.
        message: the commit message.
        into: folder inside the repo; by default its root.
        with_run_state: also push the files that only a resumed run needs (optimizer, random states, checksums).
        replacements: contents to push in place of, or in addition to, the folder's files, by path in the folder.
        flags: more flags for the command to try again, which a failure reports.

    Raises:
        UserError: the push failed; the message says why and gives the command to try again.
    """
    folder = Path(folder)
    end = f"; the folder is unchanged, push it with: {retry_command(folder, repo, flags)}"
    with one_line_hub_errors(f"{folder} was not pushed to {repo.name}", end, repo.token):
        ensure_repo(repo)
        contents = dict(files_to_push(folder, with_run_state)) | dict(replacements or {})
        files = {_join_path(into, name): content for name, content in contents.items()}
        expected = {path: checksums_of(content) for path, content in files.items()}
        commit = with_retries(lambda: _commit(repo, files, into, message))
        _verify(expected, with_retries(lambda: _files_in_repo(repo, commit.oid)), commit.oid[:10])
        _warn_about_local_bases(contents)
    return str(commit.commit_url)


def print_pushed(folder: Path, address: str) -> None:
    """Print where a folder was pushed to."""
    print(f"pushed {folder} to {address}", flush=True)


def retry_command(folder: Path, repo: Repo, flags: Sequence[str] = ()) -> str:
    """Return the shell command that pushes the folder again."""
    words = ["python", "-m", "rlhf_recipes", "push", "--folder", str(folder), "--hub_model_id", repo.name]
    words += ["--hub_private_repo", "false"] if repo.private is False else []
    words += ["--hub_revision", repo.revision] if repo.revision else []
    return shlex.join([*words, *flags])


def files_to_push(folder: Path, with_run_state: bool = False) -> Iterator[tuple[str, Path]]:
    """Yield (path in the folder, file) of the files to push; hidden files are left out.

    Without `with_run_state`, checkpoints and the files that only a resumed run needs are left out too.
    """
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") or part == "__pycache__" for part in parts)
        run_state = any(part.startswith("checkpoint-") for part in parts[:-1])
        run_state = run_state or _matches_any(parts[-1], RUN_STATE_PATTERNS)
        if path.is_file() and not hidden and (with_run_state or not run_state):
            yield "/".join(parts), path


class Checksums(NamedTuple):
    """A file's size in bytes, its SHA-256 (which the Hub lists for LFS files), and its git blob id (for others)."""

    size: int
    sha256: str
    git: str


def checksums_of(content: Content) -> Checksums:
    """Return the size and checksums of a file, or of bytes, in one pass."""
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    sha256, blob_id = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    for part in [content] if isinstance(content, bytes) else _read_in_parts(content):
        sha256.update(part)
        blob_id.update(part)
    return Checksums(size, sha256.hexdigest(), blob_id.hexdigest())


def _read_in_parts(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while part := stream.read(1 << 20):
            yield part


def _commit(repo: Repo, files: Mapping[str, Content], into: str, message: str) -> Any:
    """Push the files as one commit of any size; huggingface_hub's `upload_folder` splits large folders."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    remote = _files_in_repo(repo, repo.revision)
    stale = [path for path in remote if path not in files and _is_replaced(path, into, repo.kind)]
    operations: list[Any] = [CommitOperationDelete(path) for path in stale]
    operations += [CommitOperationAdd(path, content) for path, content in files.items()]
    return api(repo.token).create_commit(
        **repo.address, operations=operations, commit_message=message, revision=repo.revision
    )


def _is_replaced(path: str, into: str, kind: str) -> bool:
    """Return whether a push replaces this file of the repo, that is, deletes it if the folder has no such file."""
    if into:
        return path.startswith(f"{into}/")
    parent, _, name = path.rpartition("/")
    if kind == "dataset":
        return parent in ("", "data") and _matches_any(name, ROW_PATTERNS)
    return parent in ("", "value_model") and _matches_any(name, WEIGHT_PATTERNS)


def _files_in_repo(repo: Repo, revision: str | None) -> dict[str, Any]:
    """Return huggingface_hub's record of each file in the repo, by path."""
    entries = api(repo.token).list_repo_tree(**repo.address, recursive=True, revision=revision)
    return {entry.path: entry for entry in entries if hasattr(entry, "blob_id")}


def _verify(expected: Mapping[str, Checksums], remote: Mapping[str, Any], commit: str) -> None:
    for path, checksums in expected.items():
        file = remote.get(path)
        if file is None:
            raise ContentMismatch(f"commit {commit} lacks {path}; check the .gitignore of the repo")
        same = file.lfs.sha256 == checksums.sha256 if file.lfs else file.blob_id == checksums.git
        if file.size != checksums.size or not same:
            raise ContentMismatch(f"{path} in commit {commit} differs from the file that was sent")


def _warn_about_local_bases(contents: Mapping[str, Content]) -> None:
    """Log a warning for each adapter whose base model is a local folder: no other machine can load it."""
    for name, content in contents.items():
        if name.rpartition("/")[2] == ADAPTER_CONFIG:
            text = content if isinstance(content, bytes) else content.read_bytes()
            base = str(json.loads(text).get("base_model_name_or_path"))
            if Path(base).exists() or not HUB_ID.fullmatch(base):
                logger.warning(
                    "%s was pushed but names the local folder %s as its base model, so nobody else can load it; push "
                    "that folder as well, then push this one again with --base_model and its Hub id", name, base,
                )  # fmt: skip


def _join_path(into: str, name: str) -> str:
    return f"{into}/{name}" if into else name


def _matches_any(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
