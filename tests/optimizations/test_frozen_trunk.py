"""Models split into frozen lower and trained upper layers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    OPTConfig,
)

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.optimizations.frozen_trunk import UpperLayers, freeze_lower_layers_, lower_layers

CPU = torch.device("cpu")
ARCHITECTURES = ["gpt2", "llama", "neox"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lower_and_upper_layers_together_equal_the_model(
    architecture: str, model_of: Callable[[str], Any], input_ids: Any
) -> None:
    model = model_of(architecture)
    freeze_lower_layers_(model, 1)
    upper = UpperLayers(model, 1)
    states = lower_layers(model, 1)(input_ids=input_ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(upper.head(upper(states)), model(input_ids).logits, atol=1e-5, rtol=0)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable and all(".2." in name or "norm" in name or "ln_f" in name or "head" in name for name in trainable)
    assert model.training is False


def test_frozen_copy_does_not_change_and_shares_frozen_weights(model_of: Callable[[str], Any]) -> None:
    model = model_of("gpt2")
    freeze_lower_layers_(model, 2)
    upper = UpperLayers(model, 2)
    copy = upper.frozen_copy()
    states = torch.randn(1, 4, 32)
    before = copy(states)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    assert torch.equal(copy(states), before) and not torch.equal(upper(states), before)
    assert copy.head.weight is model.lm_head.weight, "the tied head is frozen, so the copy shares it"
    assert not any(parameter.requires_grad for parameter in copy.parameters())


@pytest.mark.parametrize("count", [0, 3])
def test_number_of_frozen_layers_is_checked(count: int, model_of: Callable[[str], Any]) -> None:
    with pytest.raises(UserError, match="the policy has 3 layers: take 1 to 2"):
        freeze_lower_layers_(model_of("gpt2"), count)


def test_a_model_without_known_layers_cannot_be_split(make_model: Callable[..., Any]) -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 60}
    model = AutoModelForCausalLM.from_config(OPTConfig(ffn_dim=48, word_embed_proj_dim=32, **shape))
    with pytest.raises(UserError, match="does not know the layers of a OPTModel"):
        freeze_lower_layers_(model, 1)
