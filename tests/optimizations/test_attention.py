"""Each optimization against plain PyTorch, in float64 where rounding would hide a difference."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    DynamicCache,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
)

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.optimizations import kv_cache as cache
from rlhf_recipes.optimizations.attention import (
    CastCache,
    ShortCausalAttention,
    cached_casts,
    fuse_kernels_,
    short_attention,
    without_cudnn_attention,
)
from rlhf_recipes.optimizations.frozen_trunk import UpperLayers, freeze_lower_layers_, lower_layers
from rlhf_recipes.optimizations.kv_cache import preallocated_cache
from rlhf_recipes.optimizations.packing import SHORT_ATTENTION
from rlhf_recipes.optimizations.prepacking import _has_fast_products, prepacked_weights

CPU = torch.device("cpu")
SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 60}
CONFIGS = {
    "gpt2": lambda: GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=60, bos_token_id=0, eos_token_id=0),
    "llama": lambda: LlamaConfig(intermediate_size=48, num_key_value_heads=2, **SMALL),
    "neox": lambda: GPTNeoXConfig(intermediate_size=48, **SMALL),
}
IDS = torch.randint(1, 60, (3, 11), generator=torch.Generator().manual_seed(0))


def model_of(architecture: str) -> Any:
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(CONFIGS[architecture]()).eval()


# Attention and GELU.


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


def test_fusing_kernels_changes_neither_outputs_nor_the_saved_config() -> None:
    model = model_of("gpt2")
    before, config = model(IDS).logits, model.config.to_json_string()
    assert not any(isinstance(module, nn.GELU) for module in model.modules())
    fuse_kernels_(model, CPU)
    assert sum(isinstance(module, nn.GELU) for module in model.modules()) == 3
    assert model.config._attn_implementation == SHORT_ATTENTION
    torch.testing.assert_close(model(IDS).logits, before, atol=1e-5, rtol=0)
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0  # rows with padding use PyTorch's attention
    plain = model_of("gpt2")(IDS, attention_mask=mask).logits
    torch.testing.assert_close(model(IDS, attention_mask=mask).logits[1:], plain[1:], atol=1e-5, rtol=0)
    assert model.config.to_json_string() == config


def test_fusing_kernels_keeps_bidirectional_attention() -> None:
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
    before = model(IDS).logits
    fuse_kernels_(model, CPU)
    assert model.config._attn_implementation == SHORT_ATTENTION
    torch.testing.assert_close(model(IDS).logits, before)
    other = IDS.clone()
    other[:, -1] = 1
    with torch.no_grad():
        first = [model.bert(ids).last_hidden_state[:, 0] for ids in (IDS, other)]
    assert (first[0] - first[1]).abs().max() > 1e-3, "the first token attends to the last one"


def test_fusing_kernels_keeps_eager_attention() -> None:
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


# The KV cache.


def test_preallocated_cache_equals_transformers_dynamic_cache() -> None:
    model = model_of("llama")
    dynamic, preallocated = DynamicCache(config=model.config), preallocated_cache(model.config)
    rows = torch.arange(3)
    for step in range(70):  # more tokens than the first buffer holds
        ids = IDS[rows] if step == 0 else IDS[rows, step % 11 : step % 11 + 1]
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
@pytest.mark.parametrize("architecture", CONFIGS)
def test_cached_keys_in_float32_and_bfloat16_are_as_accurate_as_pytorch(architecture: str, widened: bool) -> None:
    """Rows are padded on the left, and one of them leaves the batch; bfloat16 logits are compared with float64."""
    ids, mask = IDS.clone(), torch.ones_like(IDS)
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
    unit: str, widened: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "bf16_support", lambda: unit)
    config = fuse_kernels_(model_of("gpt2"), CPU).config
    assert {layer.widened for layer in preallocated_cache(config).layers} == {widened}
    assert not any(layer.widened for layer in preallocated_cache(model_of("gpt2").config).layers), (
        "without short attention keys keep their type"
    )


# Prepacked weights.


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


# Lower and upper layers.


@pytest.mark.parametrize("architecture", CONFIGS)
def test_lower_and_upper_layers_together_equal_the_model(architecture: str) -> None:
    model = model_of(architecture)
    freeze_lower_layers_(model, 1)
    upper = UpperLayers(model, 1)
    states = lower_layers(model, 1)(input_ids=IDS, use_cache=False).last_hidden_state
    torch.testing.assert_close(upper.head(upper(states)), model(IDS).logits, atol=1e-5, rtol=0)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable and all(".2." in name or "norm" in name or "ln_f" in name or "head" in name for name in trainable)
    assert model.training is False


def test_frozen_copy_does_not_change_and_shares_frozen_weights() -> None:
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
def test_number_of_frozen_layers_is_checked(count: int) -> None:
    with pytest.raises(UserError, match="the policy has 3 layers: take 1 to 2"):
        freeze_lower_layers_(model_of("gpt2"), count)


def test_a_model_without_known_layers_cannot_be_split(make_model: Callable[..., Any]) -> None:
    model = AutoModelForCausalLM.from_config(OPTConfig(ffn_dim=48, word_embed_proj_dim=32, **SMALL))
    with pytest.raises(UserError, match="does not know the layers of a OPTModel"):
        freeze_lower_layers_(model, 1)
