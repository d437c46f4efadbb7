"""The preallocated KV cache against the one of transformers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
)

from rlhf_recipes.optimizations import kv_cache as cache
from rlhf_recipes.optimizations.attention import (
    fuse_kernels_,
)
from rlhf_recipes.optimizations.kv_cache import preallocated_cache

CPU = torch.device("cpu")
ARCHITECTURES = ["gpt2", "llama", "neox"]


def test_preallocated_cache_equals_transformers_dynamic_cache(model_of: Callable[[str], Any], input_ids: Any) -> None:
    model = model_of("llama")
    dynamic, preallocated = DynamicCache(config=model.config), preallocated_cache(model.config)
    rows = torch.arange(3)
    for step in range(70):  # more tokens than the first buffer holds
        ids = input_ids[rows] if step == 0 else input_ids[rows, step % 11 : step % 11 + 1]
        with torch.no_grad():
            logits = [model(ids, past_key_values=kv, use_cache=True).logits for kv in (dynamic, preallocated)]
        torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=0)
        if step in (5, 30):
            for kv in (dynamic, preallocated):
                kv.batch_select_indices(torch.tensor([1, 0] if step == 5 else [1]))
            rows = rows[[1, 0]] if step == 5 else rows[[1]]
    for dynamic_layer, layer in zip(dynamic.layers, preallocated.layers, strict=True):
        assert dynamic_layer.keys.shape == layer.keys.shape
        torch.testing.assert_close(layer.values, dynamic_layer.values, atol=1e-5, rtol=0)


@pytest.mark.parametrize("widened", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cached_keys_in_float32_and_bfloat16_are_as_accurate_as_pytorch(
    architecture: str, widened: bool, model_of: Callable[[str], Any], input_ids: Any
) -> None:
    """Rows are padded on the left, and one of them leaves the batch; bfloat16 logits are compared with float64."""
    ids, mask = input_ids.clone(), torch.ones_like(input_ids)
    mask[1, :4] = 0
    models = [model_of(architecture).to(dtype) for dtype in (torch.float64, torch.bfloat16, torch.bfloat16)]
    models[0].load_state_dict(models[1].state_dict())  # the weights rounded to bfloat16
    fuse_kernels_(models[2], CPU)
    caches = [DynamicCache(config=models[0].config), DynamicCache(config=models[1].config)]
    caches.append(preallocated_cache(models[2].config))
    for layer in caches[2].layers:
        layer.widened = widened
    errors = torch.zeros(3)
    tokens, positions = ids, (mask.cumsum(1) - 1).clamp(min=0)
    for step in range(12):
        with torch.no_grad():
            outputs = [
                model(tokens, attention_mask=mask, position_ids=positions, past_key_values=kv, use_cache=True)
                for model, kv in zip(models, caches, strict=True)
            ]
        exact, *_ = logits = [output.logits[:, -1] for output in outputs]
        errors += torch.stack([(rounded.double() - exact).abs().mean().float() for rounded in logits])
        rows = torch.tensor([0, 1] if step == 5 else range(len(ids)))
        for kv in caches:
            kv.batch_select_indices(rows)
        ids, mask, positions = ids[rows], mask[rows], positions[rows][:, -1:] + 1
        tokens, mask = exact[rows].argmax(1, keepdim=True), torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    assert caches[2].layers[0].keys.dtype == (torch.float32 if widened else torch.bfloat16)
    assert 0 < errors[2] <= 1.1 * errors[1]


@pytest.mark.parametrize("unit,widened", [("", True), ("bfloat16 vector unit", True), ("bfloat16 matrix unit", False)])
def test_cached_keys_are_float32_where_one_query_is_slow_in_bfloat16(
    unit: str, widened: bool, monkeypatch: pytest.MonkeyPatch, model_of: Callable[[str], Any]
) -> None:
    monkeypatch.setattr(cache, "bf16_support", lambda: unit)
    config = fuse_kernels_(model_of("gpt2"), CPU).config
    assert {layer.widened for layer in preallocated_cache(config).layers} == {widened}
    assert not any(layer.widened for layer in preallocated_cache(model_of("gpt2").config).layers), (
        "without short attention keys keep their type"
    )
