"""Check, clear and complete a stage's output folder: weights or rows, README.md, recipe.yaml, metrics.json.

Files are written under a temporary name and then renamed, so a reader never sees part of a file.
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

RECIPE_FILE = "recipe.yaml"  # every finished stage writes it
EARLY_FILES = {"completions.jsonl", "samples.md"}  # files that a run writes before its first checkpoint
LEFTOVERS = {LOCK_FILE, STAGING_FOLDER}  # temporary files of a run that was killed


def check_output_folder(
    folder: str | Path,
    overwrite: bool,
    inputs: Sequence[str | None] = (),
    resuming: bool = False,
    restarting: bool = False,
) -> Path:
    """Refuse an output folder in which the stage would overwrite other files. Nothing is deleted or written.

    An empty or missing folder is accepted.

    Args:
        folder: the output folder.
        overwrite: accept a folder that an earlier stage wrote.
        inputs: the models and datasets that the stage reads. Neither they nor the base models of adapters among them
            may be inside the folder.
        resuming: the run resumes from a checkpoint in the folder, which may then have any content.
        restarting: accept the files of a run that was interrupted before its first checkpoint.

    Raises:
        UserError: the folder cannot be used; the message names the reason and the flag to change.
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
    content = [name for name in names if not _is_leftover(name) and not (restarting and name in EARLY_FILES)]
    if content and not overwrite:
        raise UserError(f"output folder {path} is not empty; choose another --output_dir or pass --overwrite true")
    if content and not _is_stage_output(path):
        raise UserError(
            f"output folder {path} holds files that no stage wrote ({content[0]}, ...); choose another --output_dir"
        )
    return path


def _with_bases(names: Sequence[str | None]) -> Iterator[str]:
    """Yield the sources, and for each local adapter its base model, recursively."""
    seen: set[str] = set()
    for name in names:
        while name and name not in seen:
            seen.add(name)
            yield name
            name = _base_model_of(Path(name) / "adapter_config.json")


def _base_model_of(config: Path) -> str | None:
    """Return the base model in an adapter_config.json, or None; a broken file is reported when it is loaded."""
    try:
        values = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    except (OSError, ValueError):
        return None
    base = values.get("base_model_name_or_path") if isinstance(values, dict) else None
    return base if isinstance(base, str) else None


def _is_stage_output(path: Path) -> bool:
    """Return whether a stage wrote the folder: a finished run, one with a checkpoint, or one that just started."""
    names = {item.name for item in path.iterdir()}
    checkpoints = list_checkpoints(path)
    if RECIPE_FILE in names or any(
        (folder / STATE_FILE).is_file() or (folder / CHECKSUMS_FILE).is_file() for folder in checkpoints
    ):
        return True
    return all(name in EARLY_FILES or _is_leftover(name) for name in names)


def _is_leftover(name: str) -> bool:
    """Return whether a killed run leaves such a file: its lock, a partial checkpoint, or a partial file."""
    return name in LEFTOVERS or any(name.startswith(f".{early}.") for early in EARLY_FILES)


def clear_output_folder(folder: str | Path) -> Path:
    """Create the folder and delete the files of an earlier stage in it. Call it after all other checks.

    Raises:
        UserError: the folder cannot be written.
    """
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
    """Write metrics.json, the model card README.md and recipe.yaml (the requested values); return the folder.

    Args:
        folder: the output folder, which holds the weights or rows already.
        stage, title, parents, metrics, images, notes: see `model_card`.
        arguments: the stage's dataclass instances, from which recipe.yaml is written.
    """
    import yaml

    path = Path(folder)
    write_json(path / "metrics.json", metrics)
    recipe = redact(yaml.safe_dump(requested_values(*arguments), sort_keys=False, allow_unicode=True))
    library = "peft" if (path / "adapter_config.json").is_file() else "transformers"
    write_text(path / "README.md", model_card(stage, title, parents, metrics, recipe, images, notes, library))
    return write_text(path / RECIPE_FILE, f"# python -m rlhf_recipes {stage} --config {RECIPE_FILE}\n{recipe}").parent
