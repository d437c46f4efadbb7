"""Check the model that fine-tuning starts from, before its weights are loaded."""

from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.models.architectures import context_length, vocabulary_size
from rlhf_recipes.models.loading import is_reward_model, load_config, load_tokenizer
from rlhf_recipes.models.quantization import will_be_quantized
from rlhf_recipes.models.sources import is_adapter
from rlhf_recipes.system import refuse_sharded_8bit

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase
    from trl import ModelConfig


class StartingModel(NamedTuple):
    """A checked starting model.

    max_length: longest row in tokens, as requested; else the context length; None without a limit.
    """

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
    """Load and check the configuration and tokenizer of ``--model_name_or_path``. No weights are loaded.

    Args:
        model_config: names the model, its revision, quantization and LoRA.
        max_length: requested longest row in tokens, or None.
        eos_token, pad_token: replace those of the tokenizer.
        trust_remote_code: run Python code of the model's folder or repo.

    Raises:
        UserError: no model, a model that cannot be loaded, a tokenizer without EOS or pad or with more tokens than the
            model, rows longer than the context, quantized weights without LoRA, LoRA on top of LoRA.
    """
    name = model_config.model_name_or_path
    if not name:
        raise UserError("no model; pass --model_name_or_path with the output folder of an earlier stage, or a Hub id")
    options: dict[str, Any] = {"revision": model_config.model_revision, "trust_remote_code": trust_remote_code}
    config = load_config(name, **options)
    tokens = {key: value for key, value in (("eos_token", eos_token), ("pad_token", pad_token)) if value is not None}
    tokenizer = load_tokenizer(name, "tokenizer of the model", **options, **tokens)
    size = vocabulary_size(config)
    if size is not None and len(tokenizer) > size:
        raise UserError(
            f"model {name} has embeddings for {size} tokens, but its tokenizer has {len(tokenizer)}; "
            "give the model the tokenizer it was trained with"
        )
    limit = context_length(config)
    if max_length is not None and max_length < 2:
        raise UserError(f"max_length is {max_length}; give at least 2 tokens")
    if max_length is not None and limit is not None and max_length > limit:
        raise UserError(f"max_length {max_length} exceeds the {limit} tokens of context of {name}; lower it")
    check_quantization(model_config, config)
    if model_config.use_peft and is_adapter(name):
        raise UserError(
            f"model {name} is itself a LoRA adapter; start from its base model, or leave out --use_peft and "
            "load_in_4bit/8bit (the adapter is then merged)"
        )
    return StartingModel(name, config, tokenizer, max_length or limit)


def check_quantization(
    model_config: "ModelConfig", config: "PretrainedConfig", trains_loaded_adapter: bool = False
) -> None:
    """Refuse to train quantized weights without an adapter.

    Args:
        model_config: requests quantization and LoRA.
        config: the model's configuration, which names a quantization if it was saved in quantized form.
        trains_loaded_adapter: if the model is an adapter, training continues with that adapter.

    Raises:
        UserError: quantized weights would be trained; or a new adapter is requested on top of a loaded one; or FSDP
            would have to shard 8-bit weights.
    """
    if not will_be_quantized(model_config, config):
        return
    saved = getattr(config, "quantization_config", None) or {}
    if model_config.load_in_8bit or dict(saved).get("load_in_8bit"):
        refuse_sharded_8bit()
    continues_adapter = trains_loaded_adapter and is_adapter(str(model_config.model_name_or_path))
    if continues_adapter and model_config.use_peft:
        raise UserError(
            f"model {model_config.model_name_or_path} is itself a LoRA adapter, which is trained further on its "
            "quantized base; leave out --use_peft"
        )
    if not continues_adapter and not model_config.use_peft:
        raise UserError("quantized weights cannot be trained; add --use_peft true, or leave out load_in_4bit/8bit")


def check_policy(model_config: "ModelConfig", max_length: int | None, **options: Any) -> StartingModel:
    """Check a starting model that has to generate. The arguments are those of `check_starting_model`.

    Raises:
        UserError: as in `check_starting_model`; or the model is a reward model.
    """
    start = check_starting_model(model_config, max_length, **options)
    if is_reward_model(start.name, trust_remote_code=options.get("trust_remote_code", False)):
        raise UserError(f"model {start.name} is a reward model, which cannot generate; start from a language model")
    return start
