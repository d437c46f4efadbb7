"""Loading with checks that fail before weights are read, and never with pickles or remote code."""

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.unwrapping import base_model
from rlhf_recipes.models.gpt2 import CAUSAL_LOSS
from rlhf_recipes.models.quantization import quantization_config_of
from rlhf_recipes.models.sources import base_model_name, check_source, config_source, find_file, is_adapter, locate
from rlhf_recipes.system import apply_bitsandbytes_workarounds_, load_unsharded, release_freed_memory_

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from trl import ModelConfig

# GPT-2 keeps its weights in Conv1D layers; the attention and MLP projections are what LoRA adapts.
GPT2_LORA_TARGETS = ["c_attn", "c_proj", "c_fc"]
GENERATION_FILE = "generation_config.json"


def load_config(name: str, role: str = "model", **kwargs: Any) -> "PretrainedConfig":
    """The configuration alone: cheap, so a wrong path or shape is found before any weights are read."""
    from transformers import AutoConfig

    check_source(name, role)
    kwargs.setdefault("trust_remote_code", False)
    try:
        place, inside = locate(config_source(name))
        return AutoConfig.from_pretrained(place, **inside, **kwargs)
    except (OSError, ValueError) as error:
        raise UserError(_not_loadable(name, role, "config.json", error)) from None


def load_tokenizer(name: str, role: str = "tokenizer", **kwargs: Any) -> "PreTrainedTokenizerBase":
    """A tokenizer with an EOS and a pad token.

    Raises:
        UserError: it cannot be loaded, or lacks EOS or pad (pad may be the same token as EOS).
    """
    from transformers import AutoTokenizer

    check_source(name, role)
    kwargs.setdefault("trust_remote_code", False)
    try:
        place, inside = locate(name)
        tokenizer = AutoTokenizer.from_pretrained(place, **inside, **kwargs)
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        raise UserError(_not_loadable(name, role, "tokenizer files", error)) from None
    _check_template_names(tokenizer, name, role)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{role} {name} has no EOS token; set eos_token in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        raise UserError(
            f"{role} {name} has no pad token; set pad_token in its tokenizer_config.json "
            "(the EOS token may serve as both)"
        )
    return tokenizer


def _check_template_names(tokenizer: Any, name: str, role: str) -> None:
    """Each further chat template is saved as a file of its name, which is to stay in its folder."""
    templates = tokenizer.chat_template
    for each in templates if isinstance(templates, dict) else ():
        if not each or Path(each).name != each or "\\" in each:
            raise UserError(f"{role} {name} has a chat template named {each!r}, which is no file name; rename it")


def load_causal_lm(name: str, model_config: "ModelConfig | None" = None, **kwargs: Any) -> "PreTrainedModel":
    """A causal language model from a folder or Hub id; a LoRA folder is merged into the base it names.

    In 4 or 8 bits merging would round again, so there the adapter stays one, on the base as it was trained on.
    """
    from transformers import AutoModelForCausalLM

    model = _load(AutoModelForCausalLM, name, "model", model_config, **kwargs)
    base = base_model(model)
    if base.loss_type is None:
        base.loss_type = CAUSAL_LOSS
    return model


def load_reward_model(
    name: str, model_config: "ModelConfig | None" = None, *, labels: int | None = None, **kwargs: Any
) -> "PreTrainedModel":
    """A sequence-classification model: one label ranks, two labels classify (label 1 is the good one).

    labels: start a new head of so many labels on `name`'s trunk, or go on with the head of a reward model that has as many;
    None: take the reward model as it is.
    """
    from transformers import AutoModelForSequenceClassification

    code: dict[str, Any] = {"trust_remote_code": kwargs.get("trust_remote_code", False)}
    if labels is None:
        labels = reward_label_count(name, **code)
    elif is_reward_model(name, **code) and load_config(name, "reward model", **code).num_labels != labels:
        raise UserError(
            f"reward model {name} has another number of labels than {labels}, so its head cannot be trained on; "
            "start from a language model"
        )
    if base_model_name(name) != name and is_reward_model(name, **code):
        # A LoRA folder's own: its base may have any number of labels.
        kwargs["config"] = load_config(name, "reward model", **code)
    else:
        kwargs["num_labels"] = labels
    return _load(AutoModelForSequenceClassification, name, "reward model", model_config, **kwargs)


def reward_label_count(name: str, **kwargs: Any) -> int:
    """1 for a ranking reward model, 2 for a classifier. kwargs: of `load_config`.

    Raises:
        UserError: `name` is no reward model, or has another number of labels.
    """
    config = load_config(name, "reward model", **kwargs)
    if not is_reward_model(name, **kwargs):
        raise UserError(
            f"reward model {name} is a {'/'.join(config.architectures or []) or 'model without a head'}, not a sequence "
            "classifier; train one with the reward stage"
        )
    if config.num_labels not in (1, 2):
        raise UserError(
            f"reward model {name} has {config.num_labels} labels; a reward model has one (a score) or two (bad, good): "
            "train it with the reward stage"
        )
    return int(config.num_labels)


def is_reward_model(name: str, **kwargs: Any) -> bool:
    """Whether a folder or Hub id holds a sequence classifier rather than a language model. kwargs: of `load_config`."""
    architectures = load_config(name, "reward model", **kwargs).architectures or []
    return any("SequenceClassification" in architecture for architecture in architectures)


def context_length(config: "PretrainedConfig") -> int | None:
    """The longest sequence in tokens that the model can read, or None if it has no limit."""
    for name in ("n_positions", "max_position_embeddings"):
        length = getattr(config, name, None)
        if length:
            return int(length)
    return None


def build_lora_config(model_config: "ModelConfig", task: str = "CAUSAL_LM") -> Any | None:
    """The peft configuration that ``--use_peft`` asks for, or None. GPT-2's Conv1D layers are adapted as such."""
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


def prepare_for_lora(model: "PreTrainedModel", gradient_checkpointing: bool = False) -> "PreTrainedModel":
    """Freeze a quantized model and bring what is not quantized to float32 (QLoRA); others are left as they are."""
    if not is_quantized(model):
        return model
    from peft import prepare_model_for_kbit_training

    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=gradient_checkpointing)


def is_quantized(model: "PreTrainedModel") -> bool:
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def trainable_to_float32_(model: Any) -> None:
    """What TRL rounds to bfloat16 on a quantized model, where small steps of Adam would be rounded away."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def save_reward_model_config(model: Any, folder: str | Path) -> None:
    """Leave a reward model's config.json beside its weights, which LoRA leaves out: labels and pad id are not the base's."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(base_model(model)).__name__]
    config.__dict__.pop("quantization_config", None)
    config.save_pretrained(folder)


def is_peft(model: Any) -> bool:
    from peft import PeftModel

    return isinstance(model, PeftModel)


def _load(
    auto_class: Any, name: str, role: str, model_config: "ModelConfig | None", **kwargs: Any
) -> "PreTrainedModel":
    check_source(name, role)
    options = _options(model_config) | kwargs
    options.setdefault("use_safetensors", True)  # a pickle can run code while it is read
    options.setdefault("trust_remote_code", False)  # unset, transformers would ask at the terminal
    base = base_model_name(name)
    if is_adapter(base) and "quantization_config" in options:
        raise UserError(
            f"{role} {name} is an adapter on {base}, itself one, which would have to be merged in 4 or 8 bits; read it in "
            "full precision, or save it merged first: load_causal_lm(...).save_pretrained(...)"
        )
    try:
        if is_adapter(base):  # an adapter on a model that was itself made by merging one
            model = _load(auto_class, base, role, model_config, **kwargs)
        else:
            place, inside = locate(base)
            # What is quantized transformers cannot cut apart as it reads it.
            with load_unsharded() if options.get("quantization_config") is not None else nullcontext():
                model = apply_bitsandbytes_workarounds_(auto_class.from_pretrained(place, **inside, **options))
        if is_quantized(model):
            release_freed_memory_()  # of the weights as they were read
        return _add_adapter(model, name) if is_adapter(name) else model
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(_not_loadable(name, role, "safetensors weights", error)) from None


def _add_adapter(model: "PreTrainedModel", name: str) -> Any:
    """The model with the adapter of a folder: merged into it, or on it where it is quantized."""
    from peft import PeftConfig, PeftModel
    from transformers import GenerationConfig

    place, inside = locate(name)
    config = PeftConfig.from_pretrained(place, **inside)
    if config.task_type == "CAUSAL_LM" and "SequenceClassification" in type(model).__name__:
        config.task_type = None  # the trunk of a language model, which peft would ask how it generates
    if find_file(name, GENERATION_FILE) is not None:
        model.generation_config = GenerationConfig.from_pretrained(place, **inside)
    if is_quantized(model):
        return PeftModel.from_pretrained(prepare_for_lora(model), place, config=config, **inside, is_trainable=True)
    merged = PeftModel.from_pretrained(model, place, config=config, **inside, is_trainable=False).merge_and_unload()
    for parameter in merged.parameters():
        if parameter.is_floating_point():  # peft froze the base; merged, it is a model like any other
            parameter.requires_grad_(True)
    merged.name_or_path = name  # no longer the base, on which other adapters would fit
    return merged


def _options(model_config: "ModelConfig | None") -> dict[str, Any]:
    if model_config is None:
        return {"dtype": "float32"}
    options: dict[str, Any] = {
        "dtype": model_config.dtype or "float32",
        "revision": model_config.model_revision,
    }
    if model_config.attn_implementation:
        options["attn_implementation"] = model_config.attn_implementation
    quantization = quantization_config_of(model_config)
    if quantization is not None:
        options |= {"quantization_config": quantization, "device_map": _device()}
    return options


def _device() -> str:
    """Where quantized weights go: this process's GPU, or the CPU."""
    import torch

    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"


def _not_loadable(name: str, role: str, missing: str, error: Exception) -> str:
    why = str(error).strip().splitlines()[0].rstrip(".")
    if "trust_remote_code=True" in str(error):
        return (
            f"{role} {name} brings Python code of its own, which is not run unasked; read it, then pass "
            "--trust_remote_code true"
        )
    unseen = why.startswith("401 ") or "is not a valid model identifier" in why
    hint = "; if the repo is private, log in with `hf auth login` or set HF_TOKEN" if unseen else ""
    return f"{role} {name} cannot be loaded ({missing}): {why}{hint}"
