"""Prepare a model to be trained with LoRA: the adapter's configuration, and the dtypes of a quantized base."""

from typing import TYPE_CHECKING, Any

from rlhf_recipes.models.quantization import is_quantized

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from trl import ModelConfig

# GPT-2's attention and MLP projections, which are Conv1D layers.
GPT2_LORA_TARGETS = ["c_attn", "c_proj", "c_fc"]


def build_lora_config(model_config: "ModelConfig", task: str = "CAUSAL_LM") -> Any | None:
    """Return the LoRA configuration that ``--use_peft`` requests, or None. The default targets are GPT-2's."""
    if not model_config.use_peft:
        return None
    from peft import LoraConfig

    targets = model_config.lora_target_modules or GPT2_LORA_TARGETS
    return LoraConfig(
        task_type=task,
        r=model_config.lora_r,
        lora_alpha=model_config.lora_alpha,
        lora_dropout=model_config.lora_dropout,
        target_modules=targets,
        modules_to_save=model_config.lora_modules_to_save,
        use_rslora=model_config.use_rslora,
        use_dora=model_config.use_dora,
        fan_in_fan_out=targets == GPT2_LORA_TARGETS,
    )


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
