"""Small models of three architectures, and the ids that they read."""

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="session")
def model_of() -> Callable[[str], Any]:
    """(architecture) -> a new model with three layers: gpt2, llama or neox."""
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig

    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 60}
    configs: dict[str, Callable[[], Any]] = {
        "gpt2": lambda: GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=60, bos_token_id=0, eos_token_id=0),
        "llama": lambda: LlamaConfig(intermediate_size=48, num_key_value_heads=2, **shape),
        "neox": lambda: GPTNeoXConfig(intermediate_size=48, **shape),
    }

    def make(architecture: str) -> Any:
        torch.manual_seed(1)
        return AutoModelForCausalLM.from_config(configs[architecture]()).eval()

    return make


@pytest.fixture(scope="session")
def input_ids() -> Any:
    """Token ids, shape (3, 11)."""
    import torch

    return torch.randint(1, 60, (3, 11), generator=torch.Generator().manual_seed(0))
