"""Quicker forms of the same arithmetic: each against the slow one, in float64 where rounding would hide a difference."""

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


def model_of(kind: str) -> Any:
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(CONFIGS[kind]()).eval()


# Attention and GELU.


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention as its definition reads."""
    future = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).triu(1)
    scores = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).masked_fill(future, -torch.inf)
    return scores.softmax(-1) @ value


@pytest.mark.parametrize("tokens", [2, 17, 96])
def test_the_backward_pass_of_short_attention_is_that_of_its_definition(tokens: int) -> None:
    draw = torch.Generator().manual_seed(tokens)
    exact = [torch.randn(2, 3, tokens, 8, dtype=torch.float64, generator=draw).requires_grad_() for _ in "qkv"]
    found = [each.detach().clone().requires_grad_() for each in exact]
    weights = torch.randn(2, 3, tokens, 8, dtype=torch.float64, generator=draw)
    wanted, told = attend(*exact), ShortCausalAttention.apply(*found, 8**-0.5)
    torch.testing.assert_close(told, wanted, atol=1e-6, rtol=0)
    (wanted * weights).sum().backward()
    (told * weights).sum().backward()
    for one, other in zip(found, exact, strict=True):  # the weights of attention are float32 in between
        torch.testing.assert_close(one.grad, other.grad, atol=2e-5, rtol=0)


@pytest.mark.parametrize("groups", [1, 2])
def test_short_attention_in_bfloat16_is_as_near_to_float64_as_pytorch_s(groups: int) -> None:
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 40, 16, generator=draw).bfloat16()
    key, value = (torch.randn(2, 4 // groups, 40, 16, generator=draw).bfloat16() for _ in "kv")
    module = nn.Module()
    module.num_key_value_groups = groups
    wide = [each.double().repeat_interleave(groups, 1) for each in (key, value)]
    exact = [each.requires_grad_() for each in (query.double(), *wide)]
    attend(*exact).sum().backward()
    errors = []
    for function in (short_attention, None):
        mine = [each.clone().requires_grad_() for each in (query, key, value)]
        if function is None:
            out = nn.functional.scaled_dot_product_attention(*mine, is_causal=True, enable_gqa=groups > 1)
        else:
            out = function(module, *mine, None, scaling=0.25)[0].transpose(1, 2)
        torch.testing.assert_close(out.double(), attend(*(each.detach() for each in exact)), atol=0.03, rtol=0)
        out.sum().backward()
        far = (mine[0].grad.double() - exact[0].grad).abs().max()  # type: ignore[union-attr]
        errors.append(float(far))
    assert errors[0] <= 2 * errors[1] + 1e-3


def test_a_model_reads_the_same_after_it_was_quickened_and_saves_the_same_config() -> None:
    model = model_of("gpt2")
    before, config = model(IDS).logits, model.config.to_json_string()
    assert not any(isinstance(each, nn.GELU) for each in model.modules())
    fuse_kernels_(model, CPU)
    assert sum(isinstance(each, nn.GELU) for each in model.modules()) == 3
    assert model.config._attn_implementation == SHORT_ATTENTION
    torch.testing.assert_close(model(IDS).logits, before, atol=1e-5, rtol=0)
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0  # padding goes the ordinary way
    plain = model_of("gpt2")(IDS, attention_mask=mask).logits
    torch.testing.assert_close(model(IDS, attention_mask=mask).logits[1:], plain[1:], atol=1e-5, rtol=0)
    assert model.config.to_json_string() == config


def test_a_model_that_reads_both_ways_still_does_in_bfloat16() -> None:
    """Without padding it has no mask, and neither has a causal one."""
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
    assert (first[0] - first[1]).abs().max() > 1e-3, "the last token is read by the first"


def test_a_model_with_eager_attention_keeps_it() -> None:
    model = model_of("gpt2")
    model.set_attn_implementation("eager")
    assert fuse_kernels_(model, CPU).config._attn_implementation == "eager"


# Casts.


def casts_in(model: nn.Module, passes: int) -> int:
    """How many copies of float32 weights autocast makes in so many passes."""
    with torch.profiler.profile(record_shapes=True) as profile, torch.autocast("cpu", torch.bfloat16):
        for _ in range(passes):
            model(torch.ones(1, 6))
    return sum(each.name == "aten::_to_copy" and each.input_shapes[0] == [5, 6] for each in profile.events())


@pytest.mark.parametrize("before", [True, False])
def test_cudnn_s_attention_is_off_for_a_time_and_comes_back_as_it_was(before: bool) -> None:
    """Also after an error."""
    found, kept = [], torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(before)
    try:
        with pytest.raises(KeyError), without_cudnn_attention():
            found.append(torch.backends.cuda.cudnn_sdp_enabled())
            raise KeyError
        assert [*found, torch.backends.cuda.cudnn_sdp_enabled()] == [False, before]
    finally:
        torch.backends.cuda.enable_cudnn_sdp(kept)


def test_casts_are_made_once_and_are_those_of_the_weights_as_they_are() -> None:
    model = nn.Linear(6, 5).requires_grad_(False)
    with torch.no_grad():
        assert casts_in(model, 4) == 4, "frozen weights are cast again and again"
    with cached_casts(model):
        assert casts_in(model, 4) == 1
        assert casts_in(model, 4) == 0
    assert not model.weight.requires_grad
    nn.init.ones_(model.weight)
    nn.init.zeros_(model.bias)
    with cached_casts(model), torch.autocast("cpu", torch.bfloat16):
        assert model(torch.ones(1, 6)).tolist() == [[6.0] * 5], "nothing is kept from before"


def test_gradients_through_a_kept_cast_add_up() -> None:
    """Two backward passes through one cast give what two casts give."""
    grads = []
    for keep in (True, False):
        torch.manual_seed(0)
        model, kept = nn.Linear(6, 5), CastCache()
        if keep:
            kept.begin()
        for row in (1.0, 2.0):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(torch.full((3, 6), row)).float().square().sum()
            loss.backward()
        kept.end()
        grads.append(model.weight.grad)
    assert torch.equal(grads[0], grads[1])  # type: ignore[arg-type]


# The cache.


def test_the_roomy_cache_holds_what_transformers_cache_holds() -> None:
    model = model_of("llama")
    plain, roomy = DynamicCache(config=model.config), preallocated_cache(model.config)
    rows = torch.arange(3)
    for step in range(70):  # past the room that is made at first
        ids = IDS[rows] if step == 0 else IDS[rows, step % 11 : step % 11 + 1]
        with torch.no_grad():
            told = [model(ids, past_key_values=each, use_cache=True).logits for each in (plain, roomy)]
        torch.testing.assert_close(told[1], told[0], atol=1e-5, rtol=0)
        if step in (5, 30):
            for each in (plain, roomy):
                each.batch_select_indices(torch.tensor([1, 0] if step == 5 else [1]))
            rows = rows[[1, 0]] if step == 5 else rows[[1]]
    for one, other in zip(plain.layers, roomy.layers, strict=True):
        assert one.keys.shape == other.keys.shape
        torch.testing.assert_close(other.values, one.values, atol=1e-5, rtol=0)


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("kind", CONFIGS)
def test_keys_of_either_width_are_attended_as_near_to_float64_as_pytorch_attends_bfloat16(
    kind: str, wide: bool
) -> None:
    """Rows with padding on the left, some of which leave, in bfloat16; each token against a model in float64."""
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    mask[1, :4] = 0
    models = [model_of(kind).to(dtype) for dtype in (torch.float64, torch.bfloat16, torch.bfloat16)]
    models[0].load_state_dict(models[1].state_dict())  # the weights as bfloat16 has them
    fuse_kernels_(models[2], CPU)
    caches = [DynamicCache(config=models[0].config), DynamicCache(config=models[1].config)]
    caches.append(preallocated_cache(models[2].config))
    for layer in caches[2].layers:
        layer.widened = wide
    errors = torch.zeros(3)
    tokens, place = ids, (mask.cumsum(1) - 1).clamp(min=0)
    for step in range(12):
        with torch.no_grad():
            told = [
                model(tokens, attention_mask=mask, position_ids=place, past_key_values=each, use_cache=True).logits[
                    :, -1
                ]
                for model, each in zip(models, caches, strict=True)
            ]
        errors += torch.stack([(each.double() - told[0]).abs().mean().float() for each in told])
        kept = torch.tensor([0, 1] if step == 5 else range(len(ids)))
        for each in caches:
            each.batch_select_indices(kept)
        ids, mask, place = ids[kept], mask[kept], place[kept][:, -1:] + 1
        tokens, mask = told[0][kept].argmax(1, keepdim=True), torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    assert caches[2].layers[0].keys.dtype == (torch.float32 if wide else torch.bfloat16)
    assert 0 < errors[2] <= 1.1 * errors[1]


@pytest.mark.parametrize("unit,wide", [("", True), ("bfloat16 vector unit", True), ("bfloat16 matrix unit", False)])
def test_keys_are_kept_wide_where_one_query_is_slow_in_bfloat16(
    unit: str, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "bf16_support", lambda: unit)
    config = fuse_kernels_(model_of("gpt2"), CPU).config
    assert {layer.widened for layer in preallocated_cache(config).layers} == {wide}
    assert not any(layer.widened for layer in preallocated_cache(model_of("gpt2").config).layers), (
        "attention as it came"
    )


# Weights laid out once.


def wide_model() -> Any:
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(
        GPT2Config(n_embd=256, n_layer=2, n_head=4, vocab_size=300, bos_token_id=0, eos_token_id=0)
    ).eval()


def products_in(model: nn.Module, low: bool) -> tuple[Tensor, int]:
    """Logits, and how many products were made with weights laid out before."""
    with (
        torch.profiler.profile() as profile,
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16, enabled=low),
    ):
        logits = model(IDS).logits
    return logits, sum(each.name == "mkldnn::_linear_pointwise" for each in profile.events())


needs_onednn = pytest.mark.skipif(
    not _has_fast_products(torch.float32), reason="this processor's oneDNN has no products that are worth it"
)


@needs_onednn
@pytest.mark.parametrize("low", [False, True])
def test_weights_laid_out_once_give_the_same_products(low: bool) -> None:
    model = wide_model()
    plain, none = products_in(model, low)
    with prepacked_weights(model):
        told, some = products_in(model, low)
        again, as_many = products_in(model, low)
    expected = 9 if not low or _has_fast_products(torch.bfloat16) else 0  # four a layer, and the head
    assert (none, some, as_many) == (0, expected, expected)
    assert torch.equal(told, again) and told.dtype == plain.dtype
    torch.testing.assert_close(told, plain, atol=0.02 if low else 1e-5, rtol=0)
    assert products_in(model, low)[1] == 0, "and none afterwards"


@needs_onednn
def test_weights_laid_out_are_those_of_the_moment_and_gradients_go_the_ordinary_way() -> None:
    layer = nn.Linear(256, 256)
    rows = torch.randn(3, 256)
    for _ in range(2):
        with torch.no_grad(), prepacked_weights(layer):
            torch.testing.assert_close(layer(rows), nn.functional.linear(rows, layer.weight, layer.bias))
            layer.weight.mul_(2)  # from the next time on
    with prepacked_weights(layer):
        layer(rows).sum().backward()
    torch.testing.assert_close(layer.weight.grad, rows.sum(0).expand(256, 256))
    assert layer.double()(rows.double()).dtype == torch.float64


@needs_onednn
def test_an_error_leaves_layers_as_they_were_and_those_of_others_are_let_alone() -> None:
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(256, 256), Own(256, 256), nn.Linear(256, 8), nn.Linear(256, 256))
    model[3].forward = lambda states: states  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="stop"), prepacked_weights(model), prepacked_weights(model):
        assert ["forward" in vars(layer) and not isinstance(layer.forward, type(wide_model)) for layer in model] == [
            True,
            False,
            False,
            False,
        ]
        raise RuntimeError("stop")
    assert ["forward" in vars(layer) for layer in model] == [False, False, False, True]


# A model in two.


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_upper_layers_on_the_lower_ones_are_the_model(kind: str) -> None:
    model = model_of(kind)
    freeze_lower_layers_(model, 1)
    upper = UpperLayers(model, 1)
    states = lower_layers(model, 1)(input_ids=IDS, use_cache=False).last_hidden_state
    torch.testing.assert_close(upper.head(upper(states)), model(IDS).logits, atol=1e-5, rtol=0)
    learning = {name for name, each in model.named_parameters() if each.requires_grad}
    assert learning and all(".2." in name or "norm" in name or "ln_f" in name or "head" in name for name in learning)
    assert model.training is False


def test_a_frozen_copy_stays_and_shares_what_cannot_move() -> None:
    model = model_of("gpt2")
    freeze_lower_layers_(model, 2)
    upper = UpperLayers(model, 2)
    copy = upper.frozen_copy()
    states = torch.randn(1, 4, 32)
    before = copy(states)
    with torch.no_grad():
        for each in model.parameters():
            each.add_(0.1)
    assert torch.equal(copy(states), before) and not torch.equal(upper(states), before)
    assert copy.head.weight is model.lm_head.weight, "the tied head stands still, so there is one"
    assert not any(each.requires_grad for each in copy.parameters())


@pytest.mark.parametrize("count", [0, 3])
def test_there_must_be_something_above_and_below(count: int) -> None:
    with pytest.raises(UserError, match="the policy has 3 layers: take 1 to 2"):
        freeze_lower_layers_(model_of("gpt2"), count)


def test_a_model_that_cannot_be_cut_is_refused(make_model: Callable[..., Any]) -> None:
    model = AutoModelForCausalLM.from_config(OPTConfig(ffn_dim=48, word_embed_proj_dim=32, **SMALL))
    with pytest.raises(UserError, match="does not know the layers of a OPTModel"):
        freeze_lower_layers_(model, 1)
