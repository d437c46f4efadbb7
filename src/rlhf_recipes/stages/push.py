"""A folder that a stage left, or a folder of rows -> a repo of the Hugging Face Hub, private unless told otherwise."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.markdown import escape_markdown, front_matter
from rlhf_recipes.core.processes import is_main_process
from rlhf_recipes.data import data_splits, load_split
from rlhf_recipes.folders import RECIPE_FILE, require_unlocked
from rlhf_recipes.hub import ADAPTER_CONFIG, Repo, check_repo, files_to_push, print_pushed, push_folder

MODEL_FILES = ("config.json", ADAPTER_CONFIG, "tokenizer_config.json", "value_head.safetensors")
SPLITS = {"train", "test", "validation"}


@dataclass
class PushArguments:
    """Which folder goes where."""

    folder: str | None = field(default=None, metadata={"help": "Folder to push: what a stage left, or rows by split."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Repo to push to, as owner/name."})
    hub_private_repo: bool = field(
        default=True,
        metadata={"help": "A new repo on the Hub is private, and a public one is refused; false: a public one."},
    )
    hub_revision: str | None = field(default=None, metadata={"help": "Branch to push to. Unset: main."})
    hub_token: str | None = field(
        default=None, repr=False, metadata={"help": "Token. Unset: HF_TOKEN, or that of `hf auth login`."}
    )
    base_model: str | None = field(
        default=None,
        metadata={"help": "Hub id that a pushed LoRA adapter names as its base, where that was a local folder."},
    )


def run_push(arguments: PushArguments) -> Path:
    """Push a folder whole, or leave the repo as it was. The folder is read, never written to."""
    if not arguments.folder:
        raise UserError("no folder to push; pass --folder with what a stage left, or a folder of rows")
    folder = Path(arguments.folder)
    kind = kind_of(folder)
    repo = Repo.from_arguments(arguments, kind)
    check_repo(repo)
    require_unlocked(folder)
    replacements = _cards_of_rows(folder) if kind == "dataset" else _adapters(folder, arguments.base_model)
    if is_main_process():
        flags = ["--base_model", arguments.base_model] if arguments.base_model is not None else []
        print_pushed(folder, push_folder(folder, repo, replacements=replacements, flags=flags))
    return folder


def kind_of(folder: Path) -> str:
    """``model`` for what a stage left (a model, an adapter, a tokenizer, a report), ``dataset`` for rows by split.

    Raises:
        UserError: neither.
    """
    if not folder.is_dir():
        raise UserError(f"folder {folder}: no such folder; give one that a stage left")
    if any((folder / name).is_file() for name in MODEL_FILES):
        return "model"
    splits = data_splits(folder)
    if splits and (SPLITS & set(splits) or not (folder / RECIPE_FILE).is_file()):
        return "dataset"
    if (folder / RECIPE_FILE).is_file():
        return "model"
    raise UserError(f"folder {folder} holds neither what a stage left nor rows (train.jsonl, ...); give one that does")


def _adapters(folder: Path, base: str | None) -> dict[str, Path | bytes]:
    """Each adapter_config.json of the folder, naming `base` as the base model; none where that is not asked."""
    changed: dict[str, Path | bytes] = {}
    for name, path in files_to_push(folder) if base is not None else ():
        if path.name == ADAPTER_CONFIG:
            config = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": base}
            changed[name] = (json.dumps(config, indent=2) + "\n").encode()
    if base is not None and not changed:
        raise UserError(f"base_model is given, but {folder} holds no adapter; leave it out")
    return changed


def _cards_of_rows(folder: Path) -> dict[str, Path | bytes]:
    """A card for rows that have none: where each split is, how many rows it has and in which columns."""
    if (folder / "README.md").is_file():
        return {}
    splits = data_splits(folder)
    places = [{"split": name, "path": [_below(folder, file) for file in files]} for name, files in splits.items()]
    lines = [front_matter(tags=["rlhf-recipes"], configs=[{"config_name": "default", "data_files": places}])]
    lines += [f"# {escape_markdown(folder.absolute().name)}", "", "| split | rows | columns |", "|---|---|---|"]
    for name in splits:
        rows: Any = load_split(str(folder), name)
        lines.append(f"| {escape_markdown(name)} | {len(rows)} | {escape_markdown(', '.join(rows.column_names))} |")
    lines += ["", "Pushed by rlhf-recipes as they are. Who made the rows, and from what, is not known here.", ""]
    return {"README.md": "\n".join(lines).encode()}


def _below(folder: Path, file: Path) -> str:
    return file.relative_to(folder).as_posix()
