"""Every stage leaves a folder of the same anatomy: weights or rows, README.md, recipe.yaml, metrics.json.

Files are written beside their final name and then renamed, so a reader never meets half a file.
"""

import json
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_recipes.arguments import UserError, asked_for

MARK = "recipe.yaml"  # a folder that holds it was left by a stage
EARLY = {"completions.jsonl", "samples.md"}  # what a run that is cut off may leave before its first checkpoint


def check_output_folder(
    folder: str | Path, overwrite: bool, inputs: Sequence[str | None] = (), resuming: bool = False
) -> Path:
    """Refuse, before anything is loaded or written, a folder that would lose someone's files.

    An empty or missing folder is fine. A folder that a stage left is fine with `overwrite`, and a run that resumes
    goes on in its own. Nothing is deleted here.
    `inputs` are the models and datasets the stage reads: none of them may live in the folder it is about to replace.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise UserError(f"output folder {path} is a file; choose another --output_dir")
    ancestor = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not os.access(ancestor, os.W_OK):
        raise UserError(f"output folder {path} cannot be written; choose another --output_dir")
    for source in inputs:
        if source and Path(source).exists() and Path(source).resolve().is_relative_to(path.resolve()):
            raise UserError(f"output folder {path} holds the input {source}; choose another --output_dir")
    held = [] if resuming or not path.is_dir() else list(path.iterdir())
    if held and not overwrite:
        raise UserError(f"output folder {path} is not empty; choose another --output_dir or pass --overwrite true")
    if held and not _left_by_a_stage(path):
        raise UserError(
            f"output folder {path} holds files that no stage left ({held[0].name}, ...); choose another --output_dir"
        )
    return path


def _left_by_a_stage(path: Path) -> bool:
    names = {item.name for item in path.iterdir()}
    return MARK in names or any(name.startswith("checkpoint-") for name in names) or names <= EARLY


def resume_point(resume_from_checkpoint: str | bool | None, folder: str | Path) -> str | None:
    """The checkpoint folder to go on from, or None. `true` means the last complete one in `folder`.

    Raises:
        UserError: there is no such checkpoint.
    """
    asked = str(resume_from_checkpoint).lower()
    if asked in ("none", "false"):
        return None
    if asked != "true":
        point = Path(str(resume_from_checkpoint))
        if not (point / "trainer_state.json").is_file():
            raise UserError(f"--resume_from_checkpoint {point} is no checkpoint folder; give one that a run has saved")
        return str(point)
    points = {
        int(path.parent.name.rpartition("-")[2]): path.parent
        for path in Path(folder).glob("checkpoint-*/trainer_state.json")
        if _is_json(path)
    }
    if not points:
        raise UserError(f"output folder {folder} has no checkpoint to resume from; leave --resume_from_checkpoint out")
    return str(points[max(points)])


def _is_json(path: Path) -> bool:
    """Whether the file was written to its end. Trainer writes its state last, so then the checkpoint is whole."""
    try:
        return isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except ValueError:
        return False


def prepare_output_folder(folder: str | Path) -> Path:
    """Empty the folder of what an earlier stage left, and create it. Call it once nothing can fail any more."""
    path = Path(folder)
    if path.is_dir():
        for item in path.iterdir():
            shutil.rmtree(item) if item.is_dir() else item.unlink()
    path.mkdir(parents=True, exist_ok=True)
    return path


def write_text(path: str | Path, text: str) -> Path:
    """Write a UTF-8 file atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def write_json(path: str | Path, value: Any) -> Path:
    """Write JSON atomically; non-finite numbers become null, since JSON has none."""
    return write_text(path, json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value.item() if type(value).__module__ == "numpy" else value


def leave_folder(
    folder: str | Path,
    *,
    stage: str,
    title: str,
    parents: Mapping[str, str | None],
    metrics: Mapping[str, Any],
    arguments: Sequence[Any],
    images: Sequence[str] = (),
    notes: str = "",
) -> Path:
    """Complete a stage's output folder: metrics.json, recipe.yaml (what was asked) and a README.md card."""
    import yaml

    path = Path(folder)
    # Trainer pickles its arguments next to the weights; recipe.yaml says the same in the open.
    (path / "training_args.bin").unlink(missing_ok=True)
    write_json(path / "metrics.json", metrics)
    recipe = yaml.safe_dump(asked_for(*arguments), sort_keys=False, allow_unicode=True)
    write_text(path / "README.md", _card(stage, title, parents, metrics, recipe, images, notes))
    return write_text(path / MARK, f"# python -m rlhf_recipes {stage} --config {MARK}\n{recipe}").parent


def _card(
    stage: str,
    title: str,
    parents: Mapping[str, str | None],
    metrics: Mapping[str, Any],
    recipe: str,
    images: Sequence[str],
    notes: str,
) -> str:
    rows = [f"| {key} | {_number(value)} |" for key, value in metrics.items() if isinstance(value, (int, float, str))]
    command = " ".join(shlex.quote(word) for word in [Path(sys.argv[0]).name, *sys.argv[1:]])
    lines = ["---", "library_name: transformers", f"tags: [rlhf-recipes, {stage}]", "---", f"# {title}", ""]
    lines += [f"Left by the `{stage}` stage of rlhf-recipes.", ""]
    lines += [f"- {role}: `{source}`" for role, source in parents.items() if source]
    lines += ["", f"Command: `{command}`", ""] + ([notes, ""] if notes else [])
    lines += ["| metric | value |", "|---|---|", *rows, ""] if rows else []
    lines += [f"![{image}]({image})" for image in images]
    lines += ["", "What was asked (`recipe.yaml`):", "", "```yaml", recipe.rstrip(), "```", ""]
    return "\n".join(lines)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
