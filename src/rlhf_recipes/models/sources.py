"""Find a model: a folder, a Hub repo, or the subfolder ``value_model`` that ppo saves in either."""

import json
from pathlib import Path

from rlhf_recipes.core.errors import UserError

VALUE_MODEL_FOLDER = "value_model"


def locate(name: str) -> tuple[str, dict[str, str]]:
    """Return the source for `from_pretrained`, and its keyword argument `subfolder` for ``owner/name/value_model``."""
    repo, _, subfolder = name.rpartition("/")
    if subfolder == VALUE_MODEL_FOLDER and repo.count("/") == 1 and not _is_path(repo) and not Path(name).is_dir():
        return repo, {"subfolder": subfolder}
    return name, {}


def find_file(name: str, file: str) -> Path | None:
    """Return the path of a file in a folder or Hub repo, downloaded if needed; None if there is no such file."""
    source, subfolder = locate(name)
    if Path(source).exists() or _is_path(source) or source.count("/") > 1:
        path = Path(name) / file
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, file, subfolder=subfolder.get("subfolder")))
    except (OSError, ValueError):
        return None


def config_source(name: str) -> str:
    """Return the folder or repo with config.json: `name`, or the base model of an adapter without one.

    Raises:
        UserError: adapters name one another as base models.
    """
    seen = {name}
    while find_file(name, "config.json") is None and is_adapter(name):
        name = base_model_name(name)
        if name in seen:
            raise UserError(f"adapter {name} is its own base model; name another model in its adapter_config.json")
        seen.add(name)
    return name


def base_model_name(name: str) -> str:
    """Return the base model that an adapter names in adapter_config.json; for any other source, `name`.

    Raises:
        UserError: the adapter names no base model.
    """
    adapter = find_file(name, "adapter_config.json")
    if adapter is None:
        return name
    try:
        values = json.loads(adapter.read_text(encoding="utf-8"))
    except ValueError:
        values = None
    base = values.get("base_model_name_or_path") if isinstance(values, dict) else None
    if not isinstance(base, str):
        raise UserError(f"adapter {name} names no base model; set base_model_name_or_path in {adapter}")
    return base


def is_adapter(name: str) -> bool:
    """Return whether a folder or repo holds a LoRA adapter of another model."""
    return base_model_name(name) != name


def check_source(name: str, role: str) -> None:
    """Refuse a source that is neither a folder nor a Hub id that can be downloaded. role: its name in messages.

    Raises:
        UserError: the message says what to give.
    """
    path = Path(name)
    if path.is_file():
        raise UserError(f"{role} {name} is a file; give the folder that holds config.json, or a Hub id")
    if path.is_dir():
        return
    source, subfolder = locate(name)
    if _is_path(source) or source.count("/") > 1:
        raise UserError(f"{role} {name}: no such folder; run the stage that makes it first, or give a Hub id")
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(source)
    except HFValidationError:
        raise UserError(
            f"{role} {name} is neither a local folder nor a Hub id (owner/name); give one of them"
        ) from None
    files = ["/".join([*subfolder.values(), file]) for file in ("config.json", "adapter_config.json")]
    cached = any(isinstance(try_to_load_from_cache(source, file), str) for file in files)
    if constants.HF_HUB_OFFLINE and not cached:
        raise UserError(
            f"{role} {name} is no local folder, and cannot be downloaded from the Hub while HF_HUB_OFFLINE=1; give a "
            "folder, or unset HF_HUB_OFFLINE"
        )


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.split("/")[0] == "runs"
