"""What architectures differ in: sizes in the config, positions, packed rows, left padding, ids without a token.

Numbers are read from the text part of a config. What a config cannot tell is measured on a few tokens.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.unwrapping import base_model, trunk_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

CONTEXT_NAMES = ("n_positions", "max_position_embeddings", "max_seq_len")  # max_seq_len: MPT's ALiBi ends there
# Their attention reads the neighbours in a packed row: transformers' code for them has no mask from position_ids.
MIXES_PACKED_ROWS = {
    "biogpt", "bloom", "ctrl", "falcon", "gpt_oss", "mpt", "openai-gpt", "opt", "rwkv", "xglm", "xlstm",
}  # fmt: skip
RECURRENT_LAYERS = ("linear_attention", "conv", "mamba", "mamba2", "recurrent", "hybrid", "gated_deltanet", "kda")
MIXES_LEFT_PADDING = {"minimax", "rwkv"}  # their state reads the padding before a prompt
ATTENTION_ON_CPU = (None, "eager", "sdpa", "sdpa_with_short_backward")


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
    """Refuse a model whose packed rows would read each other, as far as its config tells.

    Raises:
        UserError: names the model.
    """
    if text_config(config).model_type in MIXES_PACKED_ROWS or has_recurrent_layers(config):
        raise _packing_error(name, text_config(config).model_type)


def check_packing(model: Any, name: str) -> None:
    """Check on a few tokens that a packed row equals its rows; transformers separates them by `position_ids`.

    Raises:
        UserError: it does not.
    """
    if "position_ids" not in _parameters(model):
        raise _packing_error(name, type(base_model(model)).__name__)
    first, second = torch.arange(2, 9), torch.arange(9, 2, -1)
    packed = {"input_ids": torch.cat([first, second])[None], "position_ids": torch.arange(7).repeat(2)[None]}
    alone = [_states(model, input_ids=row[None]) for row in (first, second)]
    if not _equal(_states(model, **packed), torch.cat(alone, dim=1)):
        raise _packing_error(name, type(base_model(model)).__name__)


def _packing_error(name: str, kind: str) -> UserError:
    return UserError(
        f"model {name} ({kind}) would read the neighbours of a packed row; leave out --packing and --padding_free"
    )


def refuse_left_padding(config: "PretrainedConfig", name: str) -> None:
    """Refuse a model that reads padding on the left, as far as its config tells: TRL's online trainers pad there.

    Raises:
        UserError: names the model.
    """
    if text_config(config).model_type in MIXES_LEFT_PADDING:
        raise _left_padding_error(name, text_config(config).model_type)


def check_left_padding(model: Any, name: str) -> None:
    """Check on a few tokens that padding on the left changes no state of a row.

    Raises:
        UserError: it does.
    """
    row, padding = torch.arange(2, 9), torch.ones(3, dtype=torch.long)
    padded = {
        "input_ids": torch.cat([padding, row])[None],
        "attention_mask": torch.cat([padding * 0, row * 0 + 1])[None],
    }
    if "position_ids" in _parameters(model):
        padded["position_ids"] = torch.cat([padding * 0, torch.arange(len(row))])[None]
    if not _equal(_states(model, **padded)[:, len(padding) :], _states(model, input_ids=row[None])):
        raise _left_padding_error(name, type(base_model(model)).__name__)


def _left_padding_error(name: str, kind: str) -> UserError:
    return UserError(f"model {name} ({kind}) reads the padding before a prompt, which RLOO needs; use the ppo stage")


def _parameters(model: Any) -> Any:
    import inspect

    return inspect.signature(type(trunk_of(model)).forward).parameters


@torch.no_grad()
def _states(model: Any, **inputs: Tensor) -> Tensor:
    """Return the last hidden states, (rows, tokens, hidden_size), in eval mode. Restores the model's mode."""
    base = base_model(model)
    device, mode, attention = next(base.parameters()).device, base.training, base.config._attn_implementation
    size = vocabulary_size(base.config) or 9
    inputs = {key: (value % size if key == "input_ids" else value).to(device) for key, value in inputs.items()}
    for_gpu = device.type == "cpu" and attention not in ATTENTION_ON_CPU
    base.eval()
    try:
        if for_gpu:
            base.set_attn_implementation("eager")
        return torch.as_tensor(trunk_of(base)(**inputs, use_cache=False).last_hidden_state).float()
    finally:
        if for_gpu:
            base.set_attn_implementation(attention)
        base.train(mode)


def _equal(actual: Tensor, expected: Tensor) -> bool:
    """Return whether states agree up to the rounding of bfloat16."""
    return bool((actual - expected).abs().max() <= 5e-2 * expected.abs().max())


def drop_tokenless_logits_(model: Any, tokens: int) -> None:
    """Add a hook to the model that drops the logits of ids that are no token, so that none is sampled.

    tokens: from `token_count`. A model without such ids is not changed.
    """
    size = vocabulary_size(base_model(model).config)
    if size is not None and tokens < size:
        base_model(model).register_forward_hook(_DropLogits(tokens))


class _DropLogits:
    """A forward hook that keeps the first `tokens` logits."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def __call__(self, module: Any, inputs: Any, output: Any) -> Any:
        output.logits = output.logits[..., : self.tokens]
        return output
