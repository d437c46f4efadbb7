"""Load models and tokenizers. Checks run before weights are read; pickles and remote code are refused by default."""

import copy
import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.unwrapping import base_model
from rlhf_recipes.models.generation_config import repair_generation_config_
from rlhf_recipes.models.gpt2 import CAUSAL_LOSS
from rlhf_recipes.models.lora import prepare_for_lora_
from rlhf_recipes.models.quantization import is_quantized, quantization_config_of
from rlhf_recipes.models.sources import base_model_name, check_source, config_source, find_file, is_adapter, locate
from rlhf_recipes.system import apply_bitsandbytes_workarounds_, load_unsharded, release_freed_memory_

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from trl import ModelConfig

GENERATION_FILE = "generation_config.json"


def load_config(name: str, role: str = "model", **kwargs: Any) -> "PretrainedConfig":
    """Load a model's configuration without its weights, so that a wrong path or shape fails early.

    Args:
        name: a folder or Hub id, which may be an adapter.
        role: what error messages call the model.
        kwargs: passed to `AutoConfig.from_pretrained`.

    Raises:
        UserError: the configuration cannot be loaded.
    """
    from transformers import AutoConfig

    check_source(name, role)
    kwargs.setdefault("trust_remote_code", False)
    try:
        source, subfolder = locate(config_source(name))
        return AutoConfig.from_pretrained(source, **subfolder, **kwargs)
    except (OSError, ValueError) as error:
        raise UserError(_loading_error(name, role, "config.json", error)) from None


def load_tokenizer(name: str, role: str = "tokenizer", **kwargs: Any) -> "PreTrainedTokenizerBase":
    """Load a tokenizer that has an EOS and a pad token.

    Args:
        name: a folder or Hub id.
        role: what error messages call the tokenizer.
        kwargs: passed to `AutoTokenizer.from_pretrained`.

    Raises:
        UserError: it cannot be loaded, or has no EOS or no pad token (one token may serve as both).
    """
    from transformers import AutoTokenizer

    check_source(name, role)
    kwargs.setdefault("trust_remote_code", False)
    try:
        source, subfolder = locate(name)
        tokenizer = AutoTokenizer.from_pretrained(source, **subfolder, **kwargs)
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        raise UserError(_loading_error(name, role, "tokenizer files", error)) from None
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
    """Refuse chat templates whose names contain a path: each is saved as a file of its name."""
    templates = tokenizer.chat_template
    for template in templates if isinstance(templates, dict) else ():
        if not template or Path(template).name != template or "\\" in template:
            raise UserError(f"{role} {name} has a chat template named {template!r}, which is no file name; rename it")


def saved_eos_ids(name: str, config: "PretrainedConfig") -> tuple[int, ...]:
    """Return the EOS ids of a model from its small files: of generation_config.json, or else of its config.

    name: a folder or Hub id; an adapter without the file has that of its base.
    """
    for source in dict.fromkeys([name, base_model_name(name)]):
        path = find_file(source, GENERATION_FILE)
        values = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
        if (ids := values.get("eos_token_id")) is not None:
            return tuple(ids) if isinstance(ids, list) else (int(ids),)
    ids = getattr(config, "eos_token_id", None)
    return () if ids is None else tuple(ids) if isinstance(ids, (list, tuple)) else (int(ids),)


def load_causal_lm(name: str, model_config: "ModelConfig | None" = None, **kwargs: Any) -> "PreTrainedModel":
    """Load a causal language model from a folder or Hub id. A LoRA adapter is merged into its base model.

    If the base is quantized, the adapter is not merged, because merging would round the weights again.

    Args:
        name: a folder or Hub id of a model or adapter.
        model_config: dtype, revision, attention and quantization; None: float32.
        kwargs: passed to `from_pretrained`; they override `model_config`.

    Raises:
        UserError: the model cannot be loaded.
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
    """Load a reward model: a sequence classifier with one label (a score) or two (label 1 is the good one).

    Args:
        name: a folder or Hub id of a model or adapter.
        model_config: dtype, revision, attention and quantization; None: float32.
        labels: number of labels to train. A language model gets a new head; a reward model must have this number.
            None: load a reward model with its own number of labels.
        kwargs: passed to `from_pretrained`; they override `model_config`.

    Raises:
        UserError: the model cannot be loaded, is no reward model, or has another number of labels.
    """
    from transformers import AutoModelForSequenceClassification

    code: dict[str, Any] = {"trust_remote_code": kwargs.get("trust_remote_code", False)}
    if labels is None:
        labels = reward_label_count(name, **code)
    elif is_reward_model(name, **code) and load_config(name, "reward model", **code).num_labels != labels:
        raise UserError(
            f"reward model {name} has another number of labels than {labels}, so its head cannot be trained further; "
            "start from a language model"
        )
    if base_model_name(name) != name and is_reward_model(name, **code):
        # The adapter's configuration has the number of labels; that of its base may differ.
        kwargs["config"] = load_config(name, "reward model", **code)
    else:
        kwargs["num_labels"] = labels
    return _load(AutoModelForSequenceClassification, name, "reward model", model_config, **kwargs)


def reward_label_count(name: str, **kwargs: Any) -> int:
    """Return 1 for a ranking reward model, 2 for a classifier. kwargs: passed to `load_config`.

    Raises:
        UserError: `name` is no reward model, or has another number of labels.
    """
    config = load_config(name, "reward model", **kwargs)
    if not is_reward_model(name, **kwargs):
        raise UserError(
            f"reward model {name} is a {'/'.join(config.architectures or []) or 'model without a head'}, not a "
            "sequence classifier; train one with the reward stage"
        )
    if config.num_labels not in (1, 2):
        raise UserError(
            f"reward model {name} has {config.num_labels} labels; a reward model has one (a score) or two (bad, "
            "good): train it with the reward stage"
        )
    return int(config.num_labels)


def is_reward_model(name: str, **kwargs: Any) -> bool:
    """Return whether a folder or Hub id holds a sequence classifier. kwargs: passed to `load_config`."""
    architectures = load_config(name, "reward model", **kwargs).architectures or []
    return any("SequenceClassification" in architecture for architecture in architectures)


def save_reward_model_config(model: Any, folder: str | Path) -> None:
    """Save a reward model's config.json, which peft leaves out: its labels and pad token are not the base's."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(base_model(model)).__name__]
    config.__dict__.pop("quantization_config", None)
    config.save_pretrained(folder)


def _load(
    auto_class: Any, name: str, role: str, model_config: "ModelConfig | None", **kwargs: Any
) -> "PreTrainedModel":
    """Load a model, or an adapter on its base model; errors become a `UserError` that calls the model `role`."""
    check_source(name, role)
    options = _loading_kwargs(model_config) | kwargs
    options.setdefault("use_safetensors", True)  # a pickle can run code while it is loaded
    options.setdefault("trust_remote_code", False)  # unset, transformers prompts at the terminal
    base = base_model_name(name)
    if is_adapter(base) and "quantization_config" in options:
        raise UserError(
            f"{role} {name} is an adapter on the adapter {base}, which cannot be merged into quantized weights; load "
            "it in full precision, or save it merged first: load_causal_lm(...).save_pretrained(...)"
        )
    try:
        if is_adapter(base):  # the base is a merged adapter
            model = _load(auto_class, base, role, model_config, **kwargs)
        else:
            source, subfolder = locate(base)
            # transformers cannot shard quantized weights while it loads them.
            with load_unsharded() if options.get("quantization_config") is not None else nullcontext():
                model = apply_bitsandbytes_workarounds_(auto_class.from_pretrained(source, **subfolder, **options))
        if is_quantized(model):
            release_freed_memory_()  # of the full-precision weights
        model = _add_adapter(model, name) if is_adapter(name) else model
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(_loading_error(name, role, "safetensors weights", error)) from None
    if "rescale_every" in dir(base_model(model).config):
        base_model(model).config.rescale_every = 0  # RWKV halves weights in eval mode, and would save them so
    repair_generation_config_(base_model(model), name)
    return model


def _add_adapter(model: "PreTrainedModel", name: str) -> Any:
    """Return the model with an adapter: merged, or as a `PeftModel` if the model is quantized."""
    from peft import PeftConfig, PeftModel
    from transformers import GenerationConfig

    source, subfolder = locate(name)
    config = PeftConfig.from_pretrained(source, **subfolder)
    if config.task_type == "CAUSAL_LM" and "SequenceClassification" in type(model).__name__:
        config.task_type = None  # peft requires a generation method of a CAUSAL_LM
    if find_file(name, GENERATION_FILE) is not None:
        model.generation_config = GenerationConfig.from_pretrained(source, **subfolder)
    if is_quantized(model):
        return PeftModel.from_pretrained(
            prepare_for_lora_(model), source, config=config, **subfolder, is_trainable=True
        )
    adapted = PeftModel.from_pretrained(model, source, config=config, **subfolder, is_trainable=False)
    merged = adapted.merge_and_unload()
    for parameter in merged.parameters():
        if parameter.is_floating_point():  # peft froze the base
            parameter.requires_grad_(True)
    merged.name_or_path = name  # adapters for the base no longer fit
    return merged


def _loading_kwargs(model_config: "ModelConfig | None") -> dict[str, Any]:
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
        options |= {"quantization_config": quantization, "device_map": _quantization_device()}
    return options


def _quantization_device() -> str:
    """Return the device for quantized weights: this process's GPU, or the CPU."""
    import torch

    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"


def _loading_error(name: str, role: str, missing: str, error: Exception) -> str:
    """Return the message of an error while loading. missing: the files that could not be loaded."""
    reason = str(error).strip().splitlines()[0].rstrip(".")
    if "trust_remote_code=True" in str(error):
        return (
            f"{role} {name} contains Python code, which is not run by default; read the code, then pass "
            "--trust_remote_code true"
        )
    not_visible = reason.startswith("401 ") or "is not a valid model identifier" in reason
    hint = "; if the repo is private, log in with `hf auth login` or set HF_TOKEN" if not_visible else ""
    return f"{role} {name} cannot be loaded ({missing}): {reason}{hint}"
