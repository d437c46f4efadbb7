"""The model that fine-tuning starts from, checked from what is small to read."""

from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.models.loading import context_length, is_reward_model, load_config, load_tokenizer
from rlhf_recipes.models.quantization import will_be_quantized
from rlhf_recipes.models.sources import is_adapter
from rlhf_recipes.system import refuse_sharded_8bit

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase
    from trl import ModelConfig


class StartingModel(NamedTuple):
    """`max_length` is the longest row in tokens: what was asked for, else the model's context, else None."""

    name: str
    config: "PretrainedConfig"
    tokenizer: "PreTrainedTokenizerBase"
    max_length: int | None


def check_starting_model(
    model_config: "ModelConfig",
    max_length: int | None,
    *,
    eos_token: str | None = None,
    pad_token: str | None = None,
    trust_remote_code: bool = False,
) -> StartingModel:
    """Read the configuration and tokenizer of ``--model_name_or_path``. No weights are read.

    Raises:
        UserError: no model, one that cannot be read, a tokenizer without EOS or pad or with more tokens than the
            model, rows longer than the context, quantized weights without LoRA, LoRA on top of LoRA.
    """
    name = model_config.model_name_or_path
    if not name:
        raise UserError("no model; pass --model_name_or_path with a folder that an earlier stage left, or a Hub id")
    reads: dict[str, Any] = {"revision": model_config.model_revision, "trust_remote_code": trust_remote_code}
    config = load_config(name, **reads)
    tokens = {key: value for key, value in (("eos_token", eos_token), ("pad_token", pad_token)) if value is not None}
    tokenizer = load_tokenizer(name, "tokenizer of the model", **reads, **tokens)
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"model {name} has embeddings for {config.vocab_size} tokens, but its tokenizer has {len(tokenizer)}; "
            "give the model the tokenizer it was trained with"
        )
    limit = context_length(config)
    if max_length is not None and max_length < 2:
        raise UserError(f"max_length is {max_length}; give at least 2 tokens")
    if max_length is not None and limit is not None and max_length > limit:
        raise UserError(f"max_length {max_length} is beyond the {limit} tokens that {name} reads; lower it")
    check_quantization(model_config, config)
    if model_config.use_peft and is_adapter(name):
        raise UserError(
            f"model {name} is itself a LoRA adapter; start from its base model, or go on without --use_peft and without "
            "load_in_4bit/8bit (the adapter is then merged)"
        )
    return StartingModel(name, config, tokenizer, max_length or limit)


def check_quantization(model_config: "ModelConfig", config: "PretrainedConfig", adapter_goes_on: bool = False) -> None:
    """Refuse to train quantized weights themselves. adapter_goes_on: one that the folder holds is what will be trained.

    Raises:
        UserError: they would be; or a new adapter would be put on one that goes on; or FSDP is to cut 8 bits apart.
    """
    if not will_be_quantized(model_config, config):
        return
    saved = getattr(config, "quantization_config", None) or {}
    if model_config.load_in_8bit or dict(saved).get("load_in_8bit"):
        refuse_sharded_8bit()
    holds_one = adapter_goes_on and is_adapter(str(model_config.model_name_or_path))
    if holds_one and model_config.use_peft:
        raise UserError(
            f"model {model_config.model_name_or_path} is itself a LoRA adapter, and goes on as one in 4 or 8 bits; leave "
            "--use_peft out"
        )
    if not holds_one and not model_config.use_peft:
        raise UserError("quantized weights cannot be trained; add --use_peft true, or leave out load_in_4bit/8bit")


def check_policy(model_config: "ModelConfig", max_length: int | None, **reads: Any) -> StartingModel:
    """`check_starting_model` for a model that has to answer. reads: `eos_token`, `pad_token`, `trust_remote_code`, where given.

    Raises:
        UserError: as `check_starting_model`; or the model is a reward model.
    """
    start = check_starting_model(model_config, max_length, **reads)
    if is_reward_model(start.name, trust_remote_code=reads.get("trust_remote_code", False)):
        raise UserError(f"model {start.name} is a reward model, which cannot answer; start from a language model")
    return start
