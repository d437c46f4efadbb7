"""Weights prepacked for the processor: equal products, and nothing is left behind."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
)

from rlhf_recipes.optimizations.prepacking import _has_fast_products, prepacked_weights

CPU = torch.device("cpu")
IDS = torch.randint(1, 60, (3, 11), generator=torch.Generator().manual_seed(0))


def large_model() -> Any:
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(
        GPT2Config(n_embd=256, n_layer=2, n_head=4, vocab_size=300, bos_token_id=0, eos_token_id=0)
    ).eval()


def logits_and_prepacked_products(model: nn.Module, bf16: bool) -> tuple[Tensor, int]:
    """Return the logits, and the number of matrix products with prepacked weights."""
    with (
        torch.profiler.profile() as profile,
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        logits = model(IDS).logits
    return logits, sum(event.name == "mkldnn::_linear_pointwise" for event in profile.events())


needs_onednn = pytest.mark.skipif(
    not _has_fast_products(torch.float32), reason="prepacking does not pay with this processor's oneDNN"
)


@needs_onednn
@pytest.mark.parametrize("bf16", [False, True])
def test_prepacked_weights_give_the_same_logits(bf16: bool) -> None:
    model = large_model()
    plain, plain_count = logits_and_prepacked_products(model, bf16)
    with prepacked_weights(model):
        first, first_count = logits_and_prepacked_products(model, bf16)
        second, second_count = logits_and_prepacked_products(model, bf16)
    expected = 9 if not bf16 or _has_fast_products(torch.bfloat16) else 0  # four in each layer, and the head
    assert (plain_count, first_count, second_count) == (0, expected, expected)
    assert torch.equal(first, second) and first.dtype == plain.dtype
    torch.testing.assert_close(first, plain, atol=0.02 if bf16 else 1e-5, rtol=0)
    assert logits_and_prepacked_products(model, bf16)[1] == 0, "no prepacked product after the block"


@needs_onednn
def test_prepacking_uses_current_weights_and_leaves_gradients_unchanged() -> None:
    layer = nn.Linear(256, 256)
    rows = torch.randn(3, 256)
    for _ in range(2):
        with torch.no_grad(), prepacked_weights(layer):
            torch.testing.assert_close(layer(rows), nn.functional.linear(rows, layer.weight, layer.bias))
            layer.weight.mul_(2)  # used by the next block
    with prepacked_weights(layer):
        layer(rows).sum().backward()
    torch.testing.assert_close(layer.weight.grad, rows.sum(0).expand(256, 256))
    assert layer.double()(rows.double()).dtype == torch.float64


@needs_onednn
def test_prepacking_is_undone_after_an_error_and_skips_other_layer_types() -> None:
    class LinearSubclass(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(256, 256), LinearSubclass(256, 256), nn.Linear(256, 8), nn.Linear(256, 256))
    model[3].forward = lambda states: states  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="stop"), prepacked_weights(model), prepacked_weights(model):
        assert ["forward" in vars(layer) and not isinstance(layer.forward, type(large_model)) for layer in model] == [
            True,
            False,
            False,
            False,
        ]
        raise RuntimeError("stop")
    assert ["forward" in vars(layer) for layer in model] == [False, False, False, True]
