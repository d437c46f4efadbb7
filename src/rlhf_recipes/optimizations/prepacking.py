"""Prepacked weights: oneDNN's layout of each weight is computed once, not at every product.

oneDNN reorders a weight for each product. With few rows, as in decoding, that is a third of the time. Prepacking
changes only the order in which float32 numbers are added; in bfloat16 the measured results were equal to the bit.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

MIN_SIZE = 256  # rows and columns of a weight; smaller products are over before anything is gained


@contextmanager
def prepacked_weights(model: nn.Module) -> Iterator[None]:
    """Within this block the plain linear layers of the model use prepacked weights, on x86 processors.

    Use it for forward passes without gradient in which no weight changes. Each weight is copied at its first product,
    in the precision it is multiplied in, and the copies are freed at the end. Quantized layers, small layers, and
    layers whose `forward` was already replaced stay as they are.
    """
    layers = [layer for layer in model.modules() if type(layer) in (nn.Linear, Conv1D) and _worth_prepacking(layer)]
    for layer in layers:
        vars(layer)["forward"] = _PrepackedForward(layer)
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


class _PrepackedForward:
    """`forward` of a linear layer with the weight that the layer had at the first call."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.plain_forward = layer, layer.forward
        self.packed: dict[torch.dtype, tuple[Tensor, Tensor | None]] = {}  # weight and bias in each precision

    def __call__(self, states: Tensor) -> Tensor:
        """Apply the layer: (..., in) -> (..., out)."""
        autocast = torch.is_autocast_enabled("cpu")
        precision = torch.get_autocast_dtype("cpu") if autocast else states.dtype
        mixed = not autocast and precision != self.layer.weight.dtype
        if mixed or torch.is_grad_enabled() or not states.numel() or not _has_fast_products(precision):
            return self.plain_forward(states)
        if precision not in self.packed:
            weight = self.layer.weight.detach().to(precision)
            outputs_first = weight.t() if isinstance(self.layer, Conv1D) else weight
            bias = None if self.layer.bias is None else self.layer.bias.detach().to(precision)
            self.packed[precision] = (torch.ops.mkldnn._reorder_linear_weight(outputs_first, None), bias)
        multiply: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise
        return multiply(states.to(precision), *self.packed[precision], "none", [], "")


def _worth_prepacking(layer: Any) -> bool:
    weight = layer.weight
    plain = type(weight) in (Tensor, nn.Parameter) and weight.device.type == "cpu"  # not sharded, for example
    return (
        plain and min(weight.shape) >= MIN_SIZE and "forward" not in vars(layer) and _has_fast_products(weight.dtype)
    )


def _has_fast_products(precision: torch.dtype) -> bool:
    """Whether this processor's oneDNN gains by prepacking in this precision."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return False
    return precision == torch.float32 or (precision == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported())
