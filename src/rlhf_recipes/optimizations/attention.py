"""The same arithmetic in fewer passes: what a transformer's layers are made of, where a quicker form is at hand.

Nothing here changes what a model computes beyond the rounding of its precision, nor what is saved of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.activations import NewGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf_recipes.core.unwrapping import base_model
from rlhf_recipes.optimizations.packing import ATTENTION, narrow_last_layer_, supports_packing
from rlhf_recipes.system import apply_bitsandbytes_workarounds_

SHORT = 256  # tokens; from there on PyTorch's own backward pass is the quicker one (benchmarks/attention.py)


def fuse_kernels_(model: Any, device: torch.device) -> Any:
    """Exchange GPT-2's tanh GELU, eight passes over the widest activations, for the fused one; on a CPU its attention too.

    Attention is exchanged only where it is PyTorch's (sdpa). Returns the model, changed in place. device: where it will
    run.
    """
    for module in apply_bitsandbytes_workarounds_(model).modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))
    base = base_model(model)
    if device.type == "cpu" and getattr(base.config, "_attn_implementation", None) == "sdpa":
        base.set_attn_implementation(ATTENTION)
        trunk = getattr(base, base.base_model_prefix, None)
        if supports_packing(trunk):
            narrow_last_layer_(trunk)
    return model


def short_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' attention function: PyTorch's, but for whole short rows in bfloat16, whose backward pass is ours.

    query: (batch, heads, tokens, size); key, value: (batch, key heads, tokens, size) -> (batch, tokens, heads, size).
    packed: the `PackedLayout` of several rows that came as one. Keys in float32, which the cache makes of bfloat16, are asked in
    float32: for the one query of a token to come PyTorch's form for bfloat16 takes five times as long.
    """
    layout = options.pop("packed", None)
    if key.dtype != query.dtype:
        with torch.autocast(query.device.type, enabled=False):
            out = sdpa_attention_forward(module, query.to(key.dtype), key, value, attention_mask, **options)[0]
        return out.to(query.dtype), None
    if layout is not None:
        query, key, value = (layout.spread(each.transpose(1, 2)).transpose(1, 2) for each in (query, key, value))
        return layout.packed(short_attention(module, query, key, value, None, **options)[0]), None
    tokens = query.shape[2]
    whole = attention_mask is None and 1 < tokens == key.shape[2] <= SHORT and not options.get("dropout")
    causal = options.get("is_causal")  # without a mask: what transformers' own function goes by
    whole = whole and bool(getattr(module, "is_causal", True) if causal is None else causal)
    if not whole or query.dtype != torch.bfloat16 or options.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    scaling = options.get("scaling") or query.shape[-1] ** -0.5
    return ShortCausalAttention.apply(query, key, value, scaling).transpose(1, 2), None


class ShortCausalAttention(torch.autograd.Function):
    """Attention forward by PyTorch; backward by a few batched products (Dao et al. 2022, section 3.1, without tiles)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        ctx.save_for_backward(query, key, value, out)
        ctx.scaling = scaling
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, out = (tensor.contiguous() for tensor in ctx.saved_tensors)
        gradient = gradient.contiguous()
        past = torch.full((query.shape[2],) * 2, -torch.inf, device=query.device).triu_(1)
        weights = torch.add(past, query @ key.transpose(2, 3), alpha=ctx.scaling).softmax(dim=-1)
        of_scores = (gradient @ value.transpose(2, 3)).float()
        of_scores -= (gradient * out).sum(dim=-1, keepdim=True, dtype=torch.float32)
        of_scores = of_scores.mul_(weights).to(query.dtype)
        of_value = weights.to(query.dtype).transpose(2, 3) @ gradient
        return of_scores @ key * ctx.scaling, of_scores.transpose(2, 3) @ query * ctx.scaling, of_value, None


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """For passes over rows of ever other lengths: not cuDNN's attention, which PyTorch asks first on an H100 or H200.

    It builds a plan for each shape that is new, 0.08 s for each token of an answer whenever the longest prompt is of another
    length (measured on an H200: 1.5 s an update where all shapes were known, 10 s where they were not).
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@contextmanager
def cached_casts(model: nn.Module) -> Iterator[None]:
    """For passes without gradient: autocast casts each weight once, not once a pass.

    It keeps the casts of weights that require a gradient, so for the time all of them say that they do.
    """
    frozen = [each for each in model.parameters() if not each.requires_grad and each.is_floating_point()]
    for parameter in frozen:
        parameter.requires_grad_(True)
    kept = CastCache()
    kept.begin()
    try:
        with torch.no_grad():
            yield
    finally:
        kept.end()
        for parameter in frozen:
            parameter.requires_grad_(False)


class CastCache:
    """Lets autocast's copies of the weights outlive its own blocks, until the weights are about to change."""

    def __init__(self) -> None:
        self._keeping = False

    def begin(self) -> None:
        if not self._keeping:
            torch.autocast_increment_nesting()
            self._keeping = True

    def end(self) -> None:
        if self._keeping:
            self._keeping = False
            if torch.autocast_decrement_nesting() == 0:
                torch.clear_autocast_cache()


AttentionInterface.register(ATTENTION, short_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
