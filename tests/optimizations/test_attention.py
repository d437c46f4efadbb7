"""Fused kernels, short attention and cached casts against plain PyTorch, in float64 where rounding would hide a difference."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
)

from rlhf_recipes.optimizations.attention import (
    CastCache,
    ShortCausalAttention,
    cached_casts,
    fuse_kernels_,
    short_attention,
    without_cudnn_attention,
)
from rlhf_recipes.optimizations.packing import SHORT_ATTENTION

CPU = torch.device("cpu")


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute causal attention by its definition (Vaswani et al. 2017, equation 1)."""
    future = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).triu(1)
    scores = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).masked_fill(future, -torch.inf)
    return scores.softmax(-1) @ value


@pytest.mark.parametrize("tokens", [2, 17, 96])
def test_short_attention_gradients_match_the_definition(tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    exact = [torch.randn(2, 3, tokens, 8, dtype=torch.float64, generator=generator).requires_grad_() for _ in "qkv"]
    inputs = [tensor.detach().clone().requires_grad_() for tensor in exact]
    weights = torch.randn(2, 3, tokens, 8, dtype=torch.float64, generator=generator)
    expected, output = causal_attention(*exact), ShortCausalAttention.apply(*inputs, 8**-0.5)
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=0)
    (expected * weights).sum().backward()
    (output * weights).sum().backward()
    for tensor, exact_tensor in zip(inputs, exact, strict=True):  # attention weights are stored in float32
        torch.testing.assert_close(tensor.grad, exact_tensor.grad, atol=2e-5, rtol=0)


@pytest.mark.parametrize("groups", [1, 2])
def test_short_attention_in_bfloat16_is_as_accurate_as_pytorch(groups: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 40, 16, generator=generator).bfloat16()
    key, value = (torch.randn(2, 4 // groups, 40, 16, generator=generator).bfloat16() for _ in "kv")
    module = nn.Module()
    module.num_key_value_groups = groups
    repeated = [tensor.double().repeat_interleave(groups, 1) for tensor in (key, value)]
    exact = [tensor.requires_grad_() for tensor in (query.double(), *repeated)]
    causal_attention(*exact).sum().backward()
    errors = []
    for function in (short_attention, None):
        inputs = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        if function is None:
            out = nn.functional.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=groups > 1)
        else:
            out = function(module, *inputs, None, scaling=0.25)[0].transpose(1, 2)
        torch.testing.assert_close(
            out.double(), causal_attention(*(tensor.detach() for tensor in exact)), atol=0.03, rtol=0
        )
        out.sum().backward()
        error = (inputs[0].grad.double() - exact[0].grad).abs().max()  # type: ignore[union-attr]
        errors.append(float(error))
    assert errors[0] <= 2 * errors[1] + 1e-3


def test_fusing_kernels_changes_neither_outputs_nor_the_saved_config(
    model_of: Callable[[str], Any], input_ids: Any
) -> None:
    model = model_of("gpt2")
    before, config = model(input_ids).logits, model.config.to_json_string()
    assert not any(isinstance(module, nn.GELU) for module in model.modules())
    fuse_kernels_(model, CPU)
    assert sum(isinstance(module, nn.GELU) for module in model.modules()) == 3
    assert model.config._attn_implementation == SHORT_ATTENTION
    torch.testing.assert_close(model(input_ids).logits, before, atol=1e-5, rtol=0)
    mask = torch.ones_like(input_ids)
    mask[0, :4] = 0  # rows with padding use PyTorch's attention
    plain = model_of("gpt2")(input_ids, attention_mask=mask).logits
    torch.testing.assert_close(model(input_ids, attention_mask=mask).logits[1:], plain[1:], atol=1e-5, rtol=0)
    assert model.config.to_json_string() == config


def test_fusing_kernels_keeps_bidirectional_attention(input_ids: Any) -> None:
    """Without padding, BERT's attention gets no mask, like that of a causal model."""
    torch.manual_seed(1)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 60,
    }
    model = BertForSequenceClassification(BertConfig(num_labels=1, initializer_range=0.5, **shape)).eval()
    model = model.to(torch.bfloat16)
    before = model(input_ids).logits
    fuse_kernels_(model, CPU)
    assert model.config._attn_implementation == SHORT_ATTENTION
    torch.testing.assert_close(model(input_ids).logits, before)
    other = input_ids.clone()
    other[:, -1] = 1
    with torch.no_grad():
        first = [model.bert(ids).last_hidden_state[:, 0] for ids in (input_ids, other)]
    assert (first[0] - first[1]).abs().max() > 1e-3, "the first token attends to the last one"


def test_fusing_kernels_keeps_eager_attention(model_of: Callable[[str], Any]) -> None:
    model = model_of("gpt2")
    model.set_attn_implementation("eager")
    assert fuse_kernels_(model, CPU).config._attn_implementation == "eager"


# Casts.


def casts_in(model: nn.Module, passes: int) -> int:
    """Return how many casts of float32 weights autocast makes in this number of forward passes."""
    with torch.profiler.profile(record_shapes=True) as profile, torch.autocast("cpu", torch.bfloat16):
        for _ in range(passes):
            model(torch.ones(1, 6))
    return sum(event.name == "aten::_to_copy" and event.input_shapes[0] == [5, 6] for event in profile.events())


@pytest.mark.parametrize("before", [True, False])
def test_cudnn_attention_is_off_within_the_block_and_restored_after_it(before: bool) -> None:
    """The setting is also restored after an error."""
    within, saved = [], torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(before)
    try:
        with pytest.raises(KeyError), without_cudnn_attention():
            within.append(torch.backends.cuda.cudnn_sdp_enabled())
            raise KeyError
        assert [*within, torch.backends.cuda.cudnn_sdp_enabled()] == [False, before]
    finally:
        torch.backends.cuda.enable_cudnn_sdp(saved)


def test_cached_casts_are_made_once_and_from_the_current_weights() -> None:
    model = nn.Linear(6, 5).requires_grad_(False)
    with torch.no_grad():
        assert casts_in(model, 4) == 4, "without the cache, every pass casts frozen weights"
    with cached_casts(model):
        assert casts_in(model, 4) == 1
        assert casts_in(model, 4) == 0
    assert not model.weight.requires_grad
    nn.init.ones_(model.weight)
    nn.init.zeros_(model.bias)
    with cached_casts(model), torch.autocast("cpu", torch.bfloat16):
        assert model(torch.ones(1, 6)).tolist() == [[6.0] * 5], "no cast of the old weights is used"


def test_gradients_through_a_cached_cast_accumulate() -> None:
    """Two backward passes through one cast give the gradients of two casts."""
    grads = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        model, cast_cache = nn.Linear(6, 5), CastCache()
        if use_cache:
            cast_cache.begin()
        for row in (1.0, 2.0):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(torch.full((3, 6), row)).float().square().sum()
            loss.backward()
        cast_cache.end()
        grads.append(model.weight.grad)
    assert torch.equal(grads[0], grads[1])  # type: ignore[arg-type]
