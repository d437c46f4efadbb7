"""Weights laid out once for many products, where they stand still: while answers are sampled.

For each product oneDNN brings a weight into an order of its own, which is a third of the time where there are few rows. It
changes nothing but the order in which float32 is added up; in bfloat16 the outcome was the same to the bit.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

LEAST = 256  # rows and columns of a weight; a smaller one is multiplied before anything is gained


@contextmanager
def prepacked_weights(model: nn.Module) -> Iterator[None]:
    """For passes without gradient in which no weight changes; of plain linear layers, on x86 processors.

    A copy of each weight, in the precision that it is multiplied in, is made at its first product and let go of at the end.
    Quantized layers, small ones, and those whose `forward` somebody else has replaced are left as they are.
    """
    changed = [each for each in model.modules() if type(each) in (nn.Linear, Conv1D) and _gains(each)]
    for layer in changed:
        vars(layer)["forward"] = _Prepacked(layer)
    try:
        yield
    finally:
        for layer in changed:
            vars(layer).pop("forward", None)


class _Prepacked:
    """`forward` of a linear layer with the weight that it had when it was first asked."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.plain = layer, layer.forward
        self.held: dict[torch.dtype, tuple[Tensor, Tensor | None]] = {}

    def __call__(self, states: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        low = torch.is_autocast_enabled("cpu")
        precision = torch.get_autocast_dtype("cpu") if low else states.dtype
        mixed = not low and precision != self.layer.weight.dtype
        if mixed or torch.is_grad_enabled() or not states.numel() or not _multiplies(precision):
            return self.plain(states)
        if precision not in self.held:
            weight = self.layer.weight.detach().to(precision)
            outputs_first = weight.t() if isinstance(self.layer, Conv1D) else weight
            bias = None if self.layer.bias is None else self.layer.bias.detach().to(precision)
            self.held[precision] = (torch.ops.mkldnn._reorder_linear_weight(outputs_first, None), bias)
        multiply: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise
        return multiply(states.to(precision), *self.held[precision], "none", [], "")


def _gains(layer: Any) -> bool:
    weight = layer.weight
    plain = type(weight) in (Tensor, nn.Parameter) and weight.device.type == "cpu"  # not cut apart, say
    return plain and min(weight.shape) >= LEAST and "forward" not in vars(layer) and _multiplies(weight.dtype)


def _multiplies(precision: torch.dtype) -> bool:
    """Whether oneDNN has products of this precision that are worth it here."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return False
    return precision == torch.float32 or (precision == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported())
