"""Build GPT-2 by named size: gpt2 to xl as in Radford et al. (2019); nano, tiny and mini for a CPU."""

import math
from typing import TYPE_CHECKING

from rlhf_recipes.core.errors import UserError

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

SIZES: dict[str, dict[str, int]] = {
    "nano": {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "tiny": {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": 128},
    "mini": {"n_embd": 320, "n_layer": 6, "n_head": 5, "n_positions": 512},
    "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024},
    "medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16, "n_positions": 1024},
    "large": {"n_embd": 1280, "n_layer": 36, "n_head": 20, "n_positions": 1024},
    "xl": {"n_embd": 1600, "n_layer": 48, "n_head": 25, "n_positions": 1024},
}

# transformers chooses the loss by the class name, and GPT-2's does not match. Trainer then averages over
# one token too many in each row.
CAUSAL_LOSS = "ForCausalLM"


def build_gpt2(
    size: str, tokenizer: "PreTrainedTokenizerBase", *, positions: int | None = None, dropout: float = 0.1
) -> "GPT2LMHeadModel":
    """Return a randomly initialised GPT-2 with the tokenizer's vocabulary and special token ids.

    Args:
        size: a key of `SIZES`.
        tokenizer: needs an EOS and a pad token.
        positions: context length in tokens; None: that of the size.
        dropout: probability for residuals, attention and embeddings.

    Raises:
        UserError: unknown size.
    """
    from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

    if size not in SIZES:
        raise UserError(f"unknown model size {size!r}; choose one of {', '.join(SIZES)}")
    shape = SIZES[size] | ({"n_positions": positions} if positions else {})
    # Radford et al. use 0.02 for 768 units; narrower layers need larger weights for equal activations.
    initializer_range = 0.02 * math.sqrt(768 / shape["n_embd"])
    special = {
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = GPT2Config(
        vocab_size=len(tokenizer),
        initializer_range=initializer_range,
        activation_function="gelu_pytorch_tanh",  # equal to gelu_new, as one fused operation
        resid_pdrop=dropout,
        attn_pdrop=dropout,
        embd_pdrop=dropout,
        **shape,
        **special,
    )
    model = GPT2LMHeadModel(config)
    model.loss_type = CAUSAL_LOSS
    model.generation_config = GenerationConfig(**special)
    return model
