"""Every stage leaves a folder of the same anatomy: weights or rows, README.md, recipe.yaml, metrics.json.

Files are written beside their final name and then renamed, so a reader never meets half a file.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_recipes.core.arguments import requested_values
from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.files import write_json, write_text
from rlhf_recipes.core.secrets import redact
from rlhf_recipes.folders.card import model_card
from rlhf_recipes.folders.checkpoints import CHECKSUMS_FILE, STAGING_FOLDER, STATE_FILE, list_checkpoints
from rlhf_recipes.folders.lock import LOCK_FILE

RECIPE_FILE = "recipe.yaml"  # a folder that holds it was left by a stage
EARLY_FILES = {"completions.jsonl", "samples.md"}  # what a run that is cut off may leave before its first checkpoint
LEFTOVERS = {LOCK_FILE, STAGING_FOLDER}  # and what it may leave at any time


def check_output_folder(
    folder: str | Path,
    overwrite: bool,
    inputs: Sequence[str | None] = (),
    resuming: bool = False,
    restarting: bool = False,
) -> Path:
    """Refuse, before anything is loaded or written, a folder that would lose someone's files.

    An empty or missing folder is fine. A folder that a stage left is fine with `overwrite`, and a run that resumes
    goes on in its own; one that is `restarting` may have been cut off before its first checkpoint. Nothing is deleted here.
    `inputs` are the models and datasets the stage reads: none of them, nor the base of an adapter among them, may live in
    the folder it is about to replace.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise UserError(f"output folder {path} is a file; choose another --output_dir")
    ancestor = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not os.access(ancestor, os.W_OK):
        raise UserError(f"output folder {path} cannot be written; choose another --output_dir")
    for source in _with_bases(inputs):
        if Path(source).exists() and Path(source).resolve().is_relative_to(path.resolve()):
            raise UserError(f"output folder {path} holds the input {source}; choose another --output_dir")
    names = [] if resuming or not path.is_dir() else [item.name for item in path.iterdir()]
    held = [name for name in names if not _remains(name) and not (restarting and name in EARLY_FILES)]
    if held and not overwrite:
        raise UserError(f"output folder {path} is not empty; choose another --output_dir or pass --overwrite true")
    if held and not _left_by_a_stage(path):
        raise UserError(
            f"output folder {path} holds files that no stage left ({held[0]}, ...); choose another --output_dir"
        )
    return path


def _with_bases(names: Sequence[str | None]) -> Iterator[str]:
    """The sources, and of each local adapter the base that it names, and that one's."""
    seen: set[str] = set()
    for name in names:
        while name and name not in seen:
            seen.add(name)
            yield name
            name = _base_of(Path(name) / "adapter_config.json")


def _base_of(config: Path) -> str | None:
    """None too of a file that says nothing: the loader says what is wrong with it."""
    try:
        told = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    except (OSError, ValueError):
        return None
    base = told.get("base_model_name_or_path") if isinstance(told, dict) else None
    return base if isinstance(base, str) else None


def _left_by_a_stage(path: Path) -> bool:
    names = {item.name for item in path.iterdir()}
    if RECIPE_FILE in names or any(
        (point / STATE_FILE).is_file() or (point / CHECKSUMS_FILE).is_file() for point in list_checkpoints(path)
    ):
        return True
    return all(name in EARLY_FILES or _remains(name) for name in names)


def _remains(name: str) -> bool:
    """What a run leaves that was killed: its lock, a checkpoint that was being saved, a file that was being written."""
    return name in LEFTOVERS or any(name.startswith(f".{early}.") for early in EARLY_FILES)


def clear_output_folder(folder: str | Path) -> Path:
    """Empty the folder of what an earlier stage left, and create it. Call it once nothing can fail any more."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        for item in path.iterdir():
            if item.is_dir() and not item.is_symlink():
                shutil.rmtree(item)
            elif item.name != LOCK_FILE:
                item.unlink()
    except OSError as error:
        raise UserError(f"output folder {path} cannot be written ({error}); choose another --output_dir") from None
    return path


def complete_output_folder(
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
    write_json(path / "metrics.json", metrics)
    recipe = redact(yaml.safe_dump(requested_values(*arguments), sort_keys=False, allow_unicode=True))
    library = "peft" if (path / "adapter_config.json").is_file() else "transformers"
    write_text(path / "README.md", model_card(stage, title, parents, metrics, recipe, images, notes, library))
    return write_text(path / RECIPE_FILE, f"# python -m rlhf_recipes {stage} --config {RECIPE_FILE}\n{recipe}").parent
