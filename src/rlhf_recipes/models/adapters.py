"""Several LoRA adapters on one copy of the base weights: switch, copy, load and save them.

When peft activates an adapter, it makes that adapter trainable and freezes the others. PPO trains two adapters and
switches inside a step, so the functions here restore `requires_grad` after each switch.
"""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.models.sources import find_file

VALUE_ADAPTER, REFERENCE_ADAPTER = "ppo_value", "ppo_reference"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def has_adapter(model: nn.Module) -> bool:
    """Return whether the model is wrapped by peft."""
    return "peft_config" in dir(model) and "disable_adapter" in dir(model)


@contextmanager
def use_adapter(model: Any, adapter: str) -> Iterator[None]:
    """Within this block, `adapter` is the active adapter of the model. `requires_grad` does not change."""
    previous, flags = model.active_adapter, _trainable_flags(model)
    model.set_adapter(adapter)
    _restore_trainable_(flags)
    try:
        yield
    finally:
        model.set_adapter(previous)
        _restore_trainable_(flags)


@contextmanager
def disable_adapters(model: Any) -> Iterator[None]:
    """Within this block, the model runs without adapters. `requires_grad` does not change."""
    flags = _trainable_flags(model)
    with model.disable_adapter():
        yield
    _restore_trainable_(flags)


def _trainable_flags(model: nn.Module) -> list[tuple[nn.Parameter, bool]]:
    return [(parameter, parameter.requires_grad) for parameter in model.parameters()]


def _restore_trainable_(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, trainable in flags:
        parameter.requires_grad_(trainable)


def adapter_parameters(model: nn.Module, adapter: str) -> list[nn.Parameter]:
    """Return the parameters of one adapter, in the model's order."""
    pattern = re.compile(rf"\.{re.escape(adapter)}(\.|$)")
    return [parameter for name, parameter in model.named_parameters() if pattern.search(name)]


def copy_adapter(model: Any, name: str, trainable: bool) -> str:
    """Add an adapter to the model, as a copy of the active one, and return its name."""
    flags = _trainable_flags(model)
    if name in model.peft_config:  # added by an earlier trainer of the same policy
        model.delete_adapter(name)
    config = copy.deepcopy(model.peft_config[model.active_adapter])
    if getattr(config, "init_lora_weights", True) is not True:
        config.init_lora_weights = True  # other initialisations change the shared base; weights are copied below
    model.add_adapter(name, config)
    load_adapter_state(model, name, adapter_state(model, model.active_adapter))
    _restore_trainable_(flags)
    for parameter in adapter_parameters(model, name):
        parameter.requires_grad_(trainable)
    return name


def add_adapter_from(model: Any, folder: str, name: str) -> dict[str, Tensor]:
    """Add the adapter of a folder to the model, frozen. Return the folder's other weights, such as a head, by name.

    Raises:
        UserError: the adapter's weights do not fit the base model.
    """
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(folder)
    config.modules_to_save, config.task_type, config.inference_mode = None, None, True
    flags = _trainable_flags(model)
    if name in model.peft_config:
        model.delete_adapter(name)
    model.add_adapter(name, config)
    _restore_trainable_(flags)
    state = load_file(find_file(folder, ADAPTER_WEIGHTS) or Path(folder) / ADAPTER_WEIGHTS)
    lora_state = {key: value for key, value in state.items() if ".lora_" in key}
    load_adapter_state(model, name, lora_state)
    for parameter in adapter_parameters(model, name):
        parameter.requires_grad_(False)
    if len(adapter_parameters(model, name)) != len(lora_state):
        raise UserError(f"adapter {folder} does not fit the base model; give a reward model trained on the same base")
    return {key: value for key, value in state.items() if key not in lora_state}


def adapter_state(model: Any, adapter: str, state_dict: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return copies of one adapter's weights, by peft's names. state_dict: full weights of a sharded model."""
    from peft import get_peft_model_state_dict

    base = Path(str(model.peft_config[adapter].base_model_name_or_path))
    # If the base folder has no config.json (a merged adapter), "auto" would make peft request it from the Hub.
    embeddings = False if base.is_dir() and not (base / "config.json").is_file() else "auto"
    state = get_peft_model_state_dict(
        model, state_dict=state_dict, adapter_name=adapter, save_embedding_layers=embeddings
    )
    return {key: value.detach().clone().contiguous() for key, value in state.items()}


def load_adapter_state(model: Any, adapter: str, state: dict[str, Tensor]) -> None:
    """Load the weights that `adapter_state` returned into an adapter of the model."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, state, adapter_name=adapter)


def save_adapter(model: Any, adapter: str, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """Save one adapter as a folder that peft loads, independent of the adapter's name in this model."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(adapter_state(model, adapter, state_dict), Path(folder) / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = model.peft_config[adapter]
    inference_mode, config.inference_mode = config.inference_mode, True
    config.save_pretrained(folder)
    config.inference_mode = inference_mode
