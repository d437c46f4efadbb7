"""LoRA on any architecture: the adapter's configuration, checked before weights load, and a quantized base."""

import copy
import logging
import re
from typing import TYPE_CHECKING, Any

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.models.empty import build_empty_model
from rlhf_recipes.models.quantization import is_quantized

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel
    from trl import ModelConfig

# GPT-2's attention and MLP projections, which are Conv1D layers; peft's own table has c_attn only.
GPT2_LORA_TARGETS = ["c_attn", "c_proj", "c_fc"]
ALL_LINEAR = "all-linear"
# Parts of a model for text and images that text never passes through.
OTHER_MODALITIES = r".*(vision|visual|image|audio|multi_modal|multimodal).*"
# Mamba's code reads these weights directly, past an adapter. peft refuses the second kind in these models.
TIME_STEP = "dt_proj"
MAMBA_TYPES = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
MAMBA_KERNEL_WEIGHTS = "out_proj|conv1d"

logger = logging.getLogger(__name__)


def build_lora_config(
    model_config: "ModelConfig", config: "PretrainedConfig", task: str = "CAUSAL_LM", trust_remote_code: bool = False
) -> Any | None:
    """Return the LoRA configuration that ``--use_peft`` requests, or None. No weights are loaded.

    Without `lora_target_modules` the adapter is on the modules that peft names for the architecture, or else on all
    linear layers. It is tried on a copy of the model without weights.

    Args:
        config: the model's configuration.
        task: CAUSAL_LM or SEQ_CLS.

    Raises:
        UserError: the adapter does not fit the model.
    """
    if not model_config.use_peft:
        return None
    from peft import LoraConfig

    parameters = _as_list(getattr(model_config, "lora_target_parameters", None))
    targets = _named_targets(model_config.lora_target_modules)
    if targets is None:
        targets = [] if parameters else default_lora_targets(config)
    gpt2 = config.get_text_config().model_type == "gpt2"
    try:
        lora = LoraConfig(
            task_type=task,
            r=model_config.lora_r,
            lora_alpha=model_config.lora_alpha,
            lora_dropout=model_config.lora_dropout,
            target_modules=targets,
            modules_to_save=_as_list(model_config.lora_modules_to_save),
            use_rslora=model_config.use_rslora,
            use_dora=model_config.use_dora,
            fan_in_fan_out=gpt2 and targets == GPT2_LORA_TARGETS,
            **({"target_parameters": parameters} if parameters else {}),
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"LoRA cannot be set up: {_first_line(error)}; change the lora_ options") from None
    return _tried_on_empty_model(lora, config, trust_remote_code)


def default_lora_targets(config: "PretrainedConfig") -> list[str] | str:
    """Return the modules that LoRA adapts by default: those peft names for the architecture, else all linear layers."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TABLE

    kind = config.get_text_config().model_type
    if kind == "gpt2":
        return GPT2_LORA_TARGETS
    return TABLE.get(kind, ALL_LINEAR)


def _excluded_modules(model: Any, targets: Any) -> str | None:
    """Return a pattern of the modules that get no adapter though the targets would match them, or None."""
    if model.config.get_text_config() is not model.config:
        return OTHER_MODALITIES
    names = [TIME_STEP] if any(name.endswith(TIME_STEP) for name, _ in model.named_modules()) else []
    names += [MAMBA_KERNEL_WEIGHTS] if model.config.model_type in MAMBA_TYPES else []
    return rf".*\.({'|'.join(names)})" if names and targets == ALL_LINEAR else None


def attach_adapter(model: Any, config: Any) -> Any:
    """Return the model wrapped by peft with a new adapter.

    Raises:
        UserError: the adapter does not fit the model.
    """
    from peft import get_peft_model

    try:
        return get_peft_model(model, config)
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise UserError(_adapter_error(error, type(model).__name__)) from None


def _tried_on_empty_model(lora: Any, config: "PretrainedConfig", trust_remote_code: bool) -> Any:
    """Return the LoRA configuration once it fits a copy of the model on the meta device.

    peft adapts fused experts by parameters, which cannot have dropout: there it is set to 0, with a line in the log.
    """
    import torch
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer, ParamWrapper

    empty = build_empty_model(config, lora.task_type, trust_remote_code)
    lora.exclude_modules = _excluded_modules(empty, lora.target_modules)
    name, without_dropout = type(empty).__name__, copy.deepcopy(lora)
    without_dropout.lora_dropout = 0.0
    try:
        with torch.device("meta"):
            adapted = get_peft_model(empty, without_dropout)
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise UserError(_adapter_error(error, name)) from None
    if any(part.endswith(TIME_STEP) and isinstance(module, LoraLayer) for part, module in adapted.named_modules()):
        raise UserError(
            f"a {name} reads the weight of {TIME_STEP} past an adapter; leave it out of lora_target_modules"
        )
    if lora.lora_dropout and any(isinstance(module, ParamWrapper) for module in adapted.modules()):
        logger.warning("LoRA on the experts of a %s cannot have dropout: lora_dropout is 0", name)
        lora.lora_dropout = 0.0
    return lora


def _adapter_error(error: Exception, name: str) -> str:
    return (
        f"LoRA does not fit a {name}: {_first_line(error)}; give --lora_target_modules names of its linear layers, or "
        "leave it out"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__


def _named_targets(targets: list[str] | str | None) -> list[str] | str | None:
    """Return the target modules as peft takes them. A name stays a name: peft would match a string as a pattern."""
    if isinstance(targets, str) and targets != ALL_LINEAR and re.fullmatch(r"[\w.]+", targets):
        return [targets]
    if isinstance(targets, (list, tuple)) and list(targets) == [ALL_LINEAR]:
        return ALL_LINEAR
    return targets


def _as_list(names: list[str] | str | None) -> list[str] | None:
    return [names] if isinstance(names, str) else names


def prepare_for_lora_(model: "PreTrainedModel", gradient_checkpointing: bool = False) -> "PreTrainedModel":
    """Freeze a quantized model and cast its other weights to float32 (QLoRA, Dettmers et al. 2023); return the model.

    A model that is not quantized is not changed.
    """
    if not is_quantized(model):
        return model
    from peft import prepare_model_for_kbit_training

    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=gradient_checkpointing)


def trainable_to_float32_(model: Any) -> None:
    """Cast the trainable weights to float32, because TRL casts those on a quantized model to bfloat16.

    Small steps of Adam would be lost in bfloat16.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
