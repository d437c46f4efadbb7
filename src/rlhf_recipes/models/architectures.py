"""What architectures differ in: sizes in the config, positions, packed rows, left padding, ids without a token.

Numbers are read from the text part of a config. `behavior` measures what a config cannot tell.
"""

from typing import TYPE_CHECKING, Any

from rlhf_recipes.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

CONTEXT_NAMES = ("n_positions", "max_position_embeddings", "max_seq_len")  # max_seq_len: MPT's ALiBi ends there
# Their attention reads the neighbours in a packed row: transformers' code for them has no mask from position_ids.
MIXES_PACKED_ROWS = {
    "biogpt", "bloom", "ctrl", "falcon", "gpt_oss", "mpt", "openai-gpt", "opt", "rwkv", "xglm", "xlstm",
}  # fmt: skip
FIXED_MASKS = {"gpt_neo"}  # their mask ends at the context; a packed batch is one row that may be longer
RECURRENT_LAYERS = ("linear_attention", "conv", "mamba", "mamba2", "recurrent", "hybrid", "gated_deltanet", "kda")
MIXES_LEFT_PADDING = {"minimax", "rwkv"}  # their state reads the padding before a prompt


def text_config(config: Any) -> Any:
    """Return the part of a config that describes the language model; the config itself for models of text only."""
    return config.get_text_config() if "get_text_config" in dir(config) else config


def context_length(config: "PretrainedConfig") -> int | None:
    """Return the model's context length in tokens, or None if it has no limit."""
    for name in CONTEXT_NAMES:
        length = getattr(text_config(config), name, None)
        if length:
            return int(length)
    return None


def vocabulary_size(config: "PretrainedConfig") -> int | None:
    """Return the number of token embeddings, or None if the config does not say."""
    size = getattr(text_config(config), "vocab_size", None)
    return None if size is None else int(size)


def hidden_size_of(config: "PretrainedConfig") -> int:
    """Return the width of the model's layers."""
    return int(text_config(config).hidden_size)


def token_count(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the largest id of a token, plus 1. A model may have more embeddings, padded to a round number."""
    return max(tokenizer.get_vocab().values()) + 1


def check_token_ids(rows: Any, size: int | None, role: str) -> None:
    """Check that the model has an embedding for every id of the rows.

    Args:
        rows: lists of ids.
        size: the number of embeddings; None: unknown, nothing is checked.
        role: what messages call the rows.

    Raises:
        UserError: names the row and the id.
    """
    for index, row in enumerate(rows):
        strange = next((token for token in row if size is not None and not 0 <= token < size), None)
        if strange is not None:
            raise UserError(
                f"{role} {index} has the id {strange}, and the model has {size} token embeddings; tokenize it with the "
                "model's tokenizer"
            )


def check_prompts_fit(rows: Any, config: "PretrainedConfig", new_tokens: int, name: str) -> None:
    """Check that a model can read every prompt and has room for its answer.

    Args:
        rows: the ids of each prompt.
        new_tokens: longest answer in tokens.
        name: the model's, for messages.

    Raises:
        UserError: it cannot.
    """
    check_token_ids(rows, vocabulary_size(config), f"for model {name}, prompt")
    limit, longest = context_length(config), max(len(row) for row in rows)
    if limit and longest + new_tokens > limit:
        raise UserError(
            f"a prompt of {longest} tokens and an answer of {new_tokens} do not fit the context of model {name} "
            f"({limit} tokens); drop long prompts or lower --max_new_tokens"
        )


def check_stop_id(stop_id: int | None, size: int) -> None:
    """Check that a stop token can be sampled. size: ids from 0 up to, not including, this number are tokens.

    Raises:
        UserError: it cannot.
    """
    if stop_id is not None and not 0 <= stop_id < size:
        raise UserError(
            f"stop_token_id is {stop_id}; the model's tokens have the ids 0 to {size - 1}, give one of them"
        )


def has_recurrent_layers(config: "PretrainedConfig") -> bool:
    """Return whether the config names layers with a state in place of keys and values."""
    config = text_config(config)
    kinds = [*(getattr(config, "layer_types", None) or []), *(getattr(config, "layers_block_type", None) or [])]
    return any(kind in RECURRENT_LAYERS for kind in kinds)


def refuse_packing(config: "PretrainedConfig", name: str) -> None:
    """Refuse a model whose packed rows would read each other, or not fit its mask, as far as its config tells.

    Raises:
        UserError: names the model.
    """
    if text_config(config).model_type in MIXES_PACKED_ROWS or has_recurrent_layers(config):
        raise packing_error(name, text_config(config).model_type)
    if text_config(config).model_type in FIXED_MASKS:
        raise UserError(
            f"model {name} has a mask for {context_length(config)} tokens, and a packed batch is one longer row; leave out "
            "--packing and --padding_free"
        )


def packing_error(name: str, kind: str) -> UserError:
    """Return the error of a model, and of its kind, whose packed rows would read each other."""
    return UserError(
        f"model {name} ({kind}) would read the neighbours of a packed row; leave out --packing and --padding_free"
    )


def refuse_left_padding(config: "PretrainedConfig", name: str) -> None:
    """Refuse a model that reads padding on the left, as far as its config tells: TRL's online trainers pad there.

    Raises:
        UserError: names the model.
    """
    if text_config(config).model_type in MIXES_LEFT_PADDING:
        raise left_padding_error(name, text_config(config).model_type)


def left_padding_error(name: str, kind: str) -> UserError:
    """Return the error of a model, and of its kind, that reads padding on the left."""
    return UserError(f"model {name} ({kind}) reads the padding before a prompt, which RLOO needs; use the ppo stage")
