"""Where a model is: a folder, a repo of the Hub, or the folder ``value_model`` that ppo leaves in either."""

import json
from pathlib import Path

from rlhf_recipes.core.errors import UserError

VALUE = "value_model"


def locate(name: str) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` takes: a folder or a repo, and for ``owner/name/value_model`` the folder in the repo."""
    repo, _, inside = name.rpartition("/")
    if inside == VALUE and repo.count("/") == 1 and not _is_path(repo) and not Path(name).is_dir():
        return repo, {"subfolder": inside}
    return name, {}


def find_file(name: str, file: str) -> Path | None:
    """A file of a folder, or of a repo of the Hub, from where it is fetched; None where there is none."""
    place, inside = locate(name)
    if Path(place).exists() or _is_path(place) or place.count("/") > 1:
        path = Path(name) / file
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(place, file, subfolder=inside.get("subfolder")))
    except (OSError, ValueError):
        return None


def config_source(name: str) -> str:
    """Where the configuration is: an adapter need not have one beside it, and its base, or that one's, has."""
    seen = {name}
    while find_file(name, "config.json") is None and is_adapter(name):
        name = base_model_name(name)
        if name in seen:
            raise UserError(f"adapter {name} is, by way of others, on itself; name a model in its adapter_config.json")
        seen.add(name)
    return name


def base_model_name(name: str) -> str:
    """An adapter names its base model in adapter_config.json; any other source is its own base.

    Raises:
        UserError: the adapter names none.
    """
    adapter = find_file(name, "adapter_config.json")
    if adapter is None:
        return name
    try:
        told = json.loads(adapter.read_text(encoding="utf-8"))
    except ValueError:
        told = None
    base = told.get("base_model_name_or_path") if isinstance(told, dict) else None
    if not isinstance(base, str):
        raise UserError(f"adapter {name} names no base model: set base_model_name_or_path in {adapter}")
    return base


def is_adapter(name: str) -> bool:
    """Whether a folder or repo holds LoRA weights on another model's."""
    return base_model_name(name) != name


def check_source(name: str, role: str) -> None:
    """Refuse what is neither a folder nor a repo that can be fetched.

    Raises:
        UserError: names the remedy.
    """
    path = Path(name)
    if path.is_file():
        raise UserError(f"{role} {name} is a file; give the folder that holds config.json, or a Hub id")
    if path.is_dir():
        return
    place, inside = locate(name)
    if _is_path(place) or place.count("/") > 1:
        raise UserError(f"{role} {name}: no such folder; run the stage that makes it first, or give a Hub id")
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(place)
    except HFValidationError:
        raise UserError(f"{role} {name} is no local folder and no Hub id (owner/name); give one of them") from None
    files = ["/".join([*inside.values(), file]) for file in ("config.json", "adapter_config.json")]
    kept = any(isinstance(try_to_load_from_cache(place, file), str) for file in files)
    if constants.HF_HUB_OFFLINE and not kept:
        raise UserError(
            f"{role} {name} is no local folder, and as a Hub id it cannot be fetched while HF_HUB_OFFLINE=1; "
            "give a folder, or unset HF_HUB_OFFLINE"
        )


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.split("/")[0] == "runs"
