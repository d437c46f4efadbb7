"""Several adapters on one copy of the base weights: which of them speaks, without waking or freezing any.

peft makes the active adapter trainable and freezes the others whenever one is switched on. PPO switches in the middle
of a step and trains two at once, so each switch here puts the flags back.
"""

import copy
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.models.sources import find_file

VALUE_ADAPTER, REFERENCE_ADAPTER = "ppo_value", "ppo_reference"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def has_adapter(model: nn.Module) -> bool:
    return "peft_config" in dir(model) and "disable_adapter" in dir(model)


@contextmanager
def use_adapter(model: Any, adapter: str) -> Iterator[None]:
    """For the time, `model` answers with this adapter."""
    before, flags = model.active_adapter, _flags(model)
    model.set_adapter(adapter)
    _restore(flags)
    try:
        yield
    finally:
        model.set_adapter(before)
        _restore(flags)


@contextmanager
def disable_adapters(model: Any) -> Iterator[None]:
    """For the time, `model` answers as its base."""
    flags = _flags(model)
    with model.disable_adapter():
        yield
    _restore(flags)


def under(model: Any, adapter: str | None) -> AbstractContextManager[None]:
    """`use_adapter`, or nothing to do where there is no adapter to switch to."""
    return nullcontext() if adapter is None or model.active_adapter == adapter else use_adapter(model, adapter)


def _flags(model: nn.Module) -> list[tuple[nn.Parameter, bool]]:
    return [(parameter, parameter.requires_grad) for parameter in model.parameters()]


def _restore(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, trainable in flags:
        parameter.requires_grad_(trainable)


def adapter_parameters(model: nn.Module, adapter: str) -> list[nn.Parameter]:
    """The weights of one adapter, in the order of the model's."""
    name_of = re.compile(rf"\.{re.escape(adapter)}(\.|$)")
    return [parameter for name, parameter in model.named_parameters() if name_of.search(name)]


def copy_adapter(model: Any, name: str, trainable: bool) -> str:
    """Add an adapter that starts as a copy of the active one; returns its name."""
    flags = _flags(model)
    if name in model.peft_config:  # of an earlier trainer of the same policy
        model.delete_adapter(name)
    config = copy.deepcopy(model.peft_config[model.active_adapter])
    if getattr(config, "init_lora_weights", True) is not True:
        config.init_lora_weights = (
            True  # its weights come from the first; other ways to begin change the base they share
        )
    model.add_adapter(name, config)
    load_adapter_state(model, name, adapter_state(model, model.active_adapter))
    _restore(flags)
    for parameter in adapter_parameters(model, name):
        parameter.requires_grad_(trainable)
    return name


def add_adapter_from(model: Any, folder: str, name: str) -> dict[str, Tensor]:
    """Add the adapter of a folder, frozen. Returns what else the folder holds, such as a head, by name.

    Raises:
        UserError: its weights do not fit the base.
    """
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(folder)
    config.modules_to_save, config.task_type, config.inference_mode = None, None, True
    flags = _flags(model)
    if name in model.peft_config:
        model.delete_adapter(name)
    model.add_adapter(name, config)
    _restore(flags)
    state = load_file(find_file(folder, ADAPTER_WEIGHTS) or Path(folder) / ADAPTER_WEIGHTS)
    inner = {key: value for key, value in state.items() if ".lora_" in key}
    load_adapter_state(model, name, inner)
    for parameter in adapter_parameters(model, name):
        parameter.requires_grad_(False)
    if len(adapter_parameters(model, name)) != len(inner):
        raise UserError(f"adapter {folder} does not fit the base model; give a reward model trained on the same base")
    return {key: value for key, value in state.items() if key not in inner}


def adapter_state(model: Any, adapter: str, state_dict: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    base = Path(str(model.peft_config[adapter].base_model_name_or_path))
    # Of a folder without a config, such as an adapter's that was merged into this base, peft asks the Hub by its name.
    embeddings = False if base.is_dir() and not (base / "config.json").is_file() else "auto"
    state = get_peft_model_state_dict(
        model, state_dict=state_dict, adapter_name=adapter, save_embedding_layers=embeddings
    )
    return {key: value.detach().clone().contiguous() for key, value in state.items()}


def load_adapter_state(model: Any, adapter: str, state: dict[str, Tensor]) -> None:
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, state, adapter_name=adapter)


def save_adapter(model: Any, adapter: str, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """Leave one adapter as a folder that peft loads, whatever its name is here."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(adapter_state(model, adapter, state_dict), Path(folder) / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = model.peft_config[adapter]
    trained, config.inference_mode = config.inference_mode, True
    config.save_pretrained(folder)
    config.inference_mode = trained
