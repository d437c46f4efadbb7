"""Workarounds for bugs of bitsandbytes on a CPU."""

import logging
import math
import sys
import warnings
from functools import cache
from typing import Any

logger = logging.getLogger(__name__)


def apply_bitsandbytes_workarounds_(model: Any) -> Any:
    """Change quantized layers, in place, and bitsandbytes' CPU decoding so that results are right; return the model.

    - At the first forward pass in eval mode bitsandbytes packs 4-bit layers for AVX512_BF16. Packed layers do not
      train, merge or save correctly, and packing fails for layer sizes that are no multiples of 32 and 64. Here packing
      is switched off. Layers that are packed already are unpacked; their scales remain rounded to bfloat16.
    - With AVX512 it decodes rows whose length is no multiple of 64 with the scales of other rows
      (see `_patch_4bit_decoding_`).
    - It warns at every 8-bit product that the input is rounded. Here it warns once.
    """
    library = sys.modules.get("bitsandbytes")
    if library is None:  # without it no model is quantized
        return model
    layers = [module for module in model.modules() if isinstance(module, library.nn.Linear4bit)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    unpacked = sum(_unpack_(layer) for layer in layers)
    if unpacked:
        logger.warning(
            "a forward pass of bitsandbytes had packed %d 4-bit layers; they are unpacked, with scales rounded to "
            "bfloat16. For exact scales, load the model again and pass it on before its first forward pass",
            unpacked,
        )
    if any(layer.in_features % getattr(layer.weight, "blocksize", layer.in_features) for layer in layers):
        _patch_4bit_decoding_()
    if any(isinstance(module, library.nn.Linear8bitLt) for module in model.modules()):
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_log_once)
    return model


def _unpack_(layer: Any) -> bool:
    """Undo the packing of a layer's weight, or the transposed scales left by saving; return whether it was packed."""
    state = getattr(layer.weight, "quant_state", None)  # a weight that FSDP2 shards has none
    if state is None or state.absmax.dim() < 2:
        return False
    if getattr(state, "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        state.original_nested = False  # packing dequantized the scales; do not quantize them again
        layer.weight.data, _ = _convert_weight_packed_for_cpu_inverse(layer.weight.data, state)
    state.absmax = state.absmax.T.reshape(-1).float()
    return True


@cache
def _patch_4bit_decoding_() -> Any:
    """Patch bitsandbytes' CPU kernel to decode 4-bit weights block by block if their rows are no multiple of a block.

    A scale belongs to 64 consecutive weights, across row ends. The AVX512 kernel instead starts a new block with each
    row. Returns the torch library that holds the patch, or None if the kernel decodes a test weight correctly.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.ones(2, 48)
    weight[1, 16:] = 10.0  # the second block of 64
    if torch.equal(dequantize_4bit(*quantize_4bit(weight, blocksize=64, quant_type="nf4")), weight):
        return None
    kernel = torch.library.get_kernel("bitsandbytes::dequantize_4bit", "CPU")

    def decode(
        keys: Any, packed: Any, absmax: Any, blocksize: int, quant_type: str, shape: Any, dtype: Any
    ) -> torch.Tensor:
        count, rows = math.prod(shape), list(shape)
        if shape[-1] % blocksize:
            rows = [1, count] if count % blocksize else [count // blocksize, blocksize]
        return torch.as_tensor(kernel.call_boxed(keys, packed, absmax, blocksize, quant_type, rows, dtype)).reshape(
            shape
        )

    patch = torch.library.Library("bitsandbytes", "IMPL")
    with warnings.catch_warnings():  # torch warns that this overrides a kernel, which is intended
        warnings.simplefilter("ignore")
        patch.impl("dequantize_4bit", decode, "CPU", with_keyset=True, allow_override=True)
    return patch


def _log_once(record: logging.LogRecord) -> bool:
    """Log filter: return whether this message is logged for the first time."""
    message = record.getMessage()
    is_new = message not in _LOGGED_MESSAGES
    _LOGGED_MESSAGES.add(message)
    return is_new


_LOGGED_MESSAGES: set[str] = set()
