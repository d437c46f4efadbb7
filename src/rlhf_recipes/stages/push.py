"""Push a folder that a stage left, or a dataset folder, to the Hugging Face Hub. New repos are private by default."""

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
    """The folder and the repo it is pushed to."""

    folder: str | None = field(
        default=None, metadata={"help": "Folder to push: a stage's output folder, or a dataset with a file per split."}
    )
    hub_model_id: str | None = field(default=None, metadata={"help": "Repo to push to, as owner/name."})
    hub_private_repo: bool = field(
        default=True,
        metadata={"help": "Create a private repo, and refuse a public one; false: public."},
    )
    hub_revision: str | None = field(default=None, metadata={"help": "Branch to push to. Unset: main."})
    hub_token: str | None = field(
        default=None, repr=False, metadata={"help": "Token. Unset: HF_TOKEN, or the token of `hf auth login`."}
    )
    base_model: str | None = field(
        default=None,
        metadata={"help": "Hub id of the base model that a pushed LoRA adapter names, where it names a local folder."},
    )


def run_push(arguments: PushArguments) -> Path:
    """Push the whole folder as one commit, or leave the repo unchanged. The folder is only read."""
    if not arguments.folder:
        raise UserError("no folder to push; pass --folder with a stage's output folder or a dataset folder")
    folder = Path(arguments.folder)
    kind = repo_type_of(folder)
    repo = Repo.from_arguments(arguments, kind)
    check_repo(repo)
    require_unlocked(folder)
    replacements = _dataset_cards(folder) if kind == "dataset" else _rebased_adapters(folder, arguments.base_model)
    if is_main_process():
        flags = ["--base_model", arguments.base_model] if arguments.base_model is not None else []
        print_pushed(folder, push_folder(folder, repo, replacements=replacements, flags=flags))
    return folder


def repo_type_of(folder: Path) -> str:
    """Return ``model`` for a stage's output folder (model, adapter, tokenizer, report), ``dataset`` for rows by split.

    Raises:
        UserError: the folder is neither.
    """
    if not folder.is_dir():
        raise UserError(f"folder {folder}: no such folder; pass a stage's output folder")
    if any((folder / name).is_file() for name in MODEL_FILES):
        return "model"
    splits = data_splits(folder)
    if splits and (SPLITS & set(splits) or not (folder / RECIPE_FILE).is_file()):
        return "dataset"
    if (folder / RECIPE_FILE).is_file():
        return "model"
    raise UserError(f"folder {folder} is neither a stage's output nor a dataset (train.jsonl, ...); pass one of them")


def _rebased_adapters(folder: Path, base: str | None) -> dict[str, Path | bytes]:
    """Return each adapter_config.json of the folder with `base` as its base model; nothing if `base` is None."""
    changed: dict[str, Path | bytes] = {}
    for name, path in files_to_push(folder) if base is not None else ():
        if path.name == ADAPTER_CONFIG:
            config = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": base}
            changed[name] = (json.dumps(config, indent=2) + "\n").encode()
    if base is not None and not changed:
        raise UserError(f"base_model is given, but {folder} holds no adapter; leave it out")
    return changed


def _dataset_cards(folder: Path) -> dict[str, Path | bytes]:
    """Return a dataset card for rows without one: the files, rows and columns of each split."""
    if (folder / "README.md").is_file():
        return {}
    splits = data_splits(folder)
    data_files = [
        {"split": name, "path": [file.relative_to(folder).as_posix() for file in files]}
        for name, files in splits.items()
    ]
    lines = [front_matter(tags=["rlhf-recipes"], configs=[{"config_name": "default", "data_files": data_files}])]
    lines += [f"# {escape_markdown(folder.absolute().name)}", "", "| split | rows | columns |", "|---|---|---|"]
    for name in splits:
        rows: Any = load_split(str(folder), name)
        lines.append(f"| {escape_markdown(name)} | {len(rows)} | {escape_markdown(', '.join(rows.column_names))} |")
    lines += ["", "Pushed by rlhf-recipes without changes. The origin of the rows is not known.", ""]
    return {"README.md": "\n".join(lines).encode()}
