"""Fused GELU, attention with a fast backward pass for short rows, and autocast that casts each weight once.

A model computes the same values as before, up to the rounding of its precision. Its saved weights and config stay
the same.
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
from rlhf_recipes.optimizations.packing import SHORT_ATTENTION, narrow_last_layer_, supports_packing
from rlhf_recipes.system import apply_bitsandbytes_workarounds_

# Longest row, in tokens, with our backward pass; beyond it PyTorch's is faster
# (benchmarks/attention.py).
SHORT_ROW = 256


def fuse_kernels_(model: Any, device: torch.device) -> Any:
    """Replace GPT-2's tanh GELU in the model by PyTorch's fused one and, on a CPU, its attention by `short_attention`.

    The unfused GELU makes eight passes over the widest activations. Attention is replaced only where it is PyTorch's
    (sdpa); the last layer of a GPT-2 is then also narrowed (`narrow_last_layer_`). Quantized models get the workarounds
    for bitsandbytes.

    Args:
        model: changed in place, and returned.
        device: where the model will run.
    """
    for module in apply_bitsandbytes_workarounds_(model).modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))
    base = base_model(model)
    if device.type == "cpu" and getattr(base.config, "_attn_implementation", None) == "sdpa":
        base.set_attn_implementation(SHORT_ATTENTION)
        trunk = getattr(base, base.base_model_prefix, None)
        if supports_packing(trunk):
            narrow_last_layer_(trunk)
    return model


def short_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attend as PyTorch does, with a faster backward pass for short bfloat16 rows without padding.

    The signature is that of transformers' attention functions. Float32 keys with a bfloat16 query, which
    `PreallocatedLayer` keeps, are attended to in float32: for the single query of a decoding step PyTorch's bfloat16
    form takes five times as long.

    Args:
        query: (batch, heads, tokens, head size).
        key, value: (batch, key heads, tokens, head size).
        options: transformers' options; `packed` is the `PackedLayout` of several rows given as one.

    Returns:
        (batch, tokens, heads, head size), and None for the attention weights.
    """
    layout = options.pop("packed", None)
    if key.dtype != query.dtype:
        with torch.autocast(query.device.type, enabled=False):
            out = sdpa_attention_forward(module, query.to(key.dtype), key, value, attention_mask, **options)[0]
        return out.to(query.dtype), None
    if layout is not None:
        query, key, value = (layout.spread(states.transpose(1, 2)).transpose(1, 2) for states in (query, key, value))
        return layout.packed(short_attention(module, query, key, value, None, **options)[0]), None
    tokens = query.shape[2]
    short = attention_mask is None and 1 < tokens == key.shape[2] <= SHORT_ROW and not options.get("dropout")
    causal = options.get("is_causal")  # without a mask, transformers' own function decides by this too
    short = short and bool(getattr(module, "is_causal", True) if causal is None else causal)
    if not short or query.dtype != torch.bfloat16 or options.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    scaling = options.get("scaling") or query.shape[-1] ** -0.5
    return ShortCausalAttention.apply(query, key, value, scaling).transpose(1, 2), None


class ShortCausalAttention(torch.autograd.Function):
    """Causal attention: PyTorch's forward pass, and a backward pass of a few batched products.

    query, key, value: (batch, heads, tokens, head size), all of one shape. The gradient formulas are those of
    Dao et al. 2022 (FlashAttention), section 3.1, without tiling. The attention weights are float32 in between.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        ctx.save_for_backward(query, key, value, out)
        ctx.scaling = scaling
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, out = (tensor.contiguous() for tensor in ctx.saved_tensors)
        grad_out = grad_out.contiguous()
        causal_mask = torch.full((query.shape[2],) * 2, -torch.inf, device=query.device).triu_(1)
        weights = torch.add(causal_mask, query @ key.transpose(2, 3), alpha=ctx.scaling).softmax(dim=-1)
        grad_scores = (grad_out @ value.transpose(2, 3)).float()
        grad_scores -= (grad_out * out).sum(dim=-1, keepdim=True, dtype=torch.float32)
        grad_scores = grad_scores.mul_(weights).to(query.dtype)
        grad_value = weights.to(query.dtype).transpose(2, 3) @ grad_out
        return grad_scores @ key * ctx.scaling, grad_scores.transpose(2, 3) @ query * ctx.scaling, grad_value, None


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Within this block PyTorch does not use cuDNN's attention, which it prefers on an H100 or H200.

    Use it for forward passes whose shapes keep changing: cuDNN builds a plan for each new shape. Measured on an H200
    while sampling: 0.08 s per answer token for a new prompt length, so 10 s per update instead of 1.5 s.
    """
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)


@contextmanager
def cached_casts(model: nn.Module) -> Iterator[None]:
    """Within this block autocast casts each weight of the model once, not once per forward pass; gradients are off.

    Autocast caches only weights that require a gradient. So every weight requires one inside the block.
    """
    frozen = [weight for weight in model.parameters() if not weight.requires_grad and weight.is_floating_point()]
    for weight in frozen:
        weight.requires_grad_(True)
    cache = CastCache()
    cache.begin()
    try:
        with torch.no_grad():
            yield
    finally:
        cache.end()
        for weight in frozen:
            weight.requires_grad_(False)


class CastCache:
    """Keeps autocast's casts of the weights from one autocast block to the next.

    Call `begin` before the blocks and `end` before the weights change. Calling either twice does nothing more.
    """

    def __init__(self) -> None:
        self._active = False

    def begin(self) -> None:
        """Start to keep casts."""
        if not self._active:
            torch.autocast_increment_nesting()
            self._active = True

    def end(self) -> None:
        """Drop the casts, unless an outer autocast block is still open."""
        if self._active:
            self._active = False
            if torch.autocast_decrement_nesting() == 0:
                torch.clear_autocast_cache()


AttentionInterface.register(SHORT_ATTENTION, short_attention)
AttentionMaskInterface.register(SHORT_ATTENTION, sdpa_mask)
