"""Workarounds for faults of bitsandbytes on a CPU."""

import logging
import math
import sys
import warnings
from functools import cache
from typing import Any

logger = logging.getLogger(__name__)


def apply_bitsandbytes_workarounds_(model: Any) -> Any:
    """Keep what is in 4 or 8 bits right on a CPU, where bitsandbytes does not; returns the model, changed in place.

    - At the first forward pass in eval mode it packs 4-bit layers for AVX512_BF16. From there on they do not train, merge or
      save rightly, and layers whose widths are no multiples of 32 and 64 cannot be packed at all. They stay as they are
      here. What was packed before is unpacked; its scales stay rounded to bfloat16, as that form has them.
    - With AVX512 it decodes rows that are no multiple of 64 long with other rows' scales (see `_patch_4bit_decoding_`).
    - It says of every product in 8 bits that it rounds its input. Here once.
    """
    library = sys.modules.get("bitsandbytes")
    if library is None:  # then nothing can be in so few bits
        return model
    layers = [each for each in model.modules() if isinstance(each, library.nn.Linear4bit)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    unpacked = sum(_unpack(layer) for layer in layers)
    if unpacked:
        logger.warning(
            "%d layers in 4 bits had been packed by a forward pass of bitsandbytes and are unpacked; their scales stay "
            "rounded to bfloat16: for the exact ones read the model again and hand it over before it is asked anything",
            unpacked,
        )
    if any(layer.in_features % getattr(layer.weight, "blocksize", layer.in_features) for layer in layers):
        _patch_4bit_decoding_()
    if any(isinstance(each, library.nn.Linear8bitLt) for each in model.modules()):
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_log_once)
    return model


def _unpack(layer: Any) -> bool:
    """Undo the packing, or what bitsandbytes leaves of it as it saves: scales that lie across. Whether there was any."""
    state = getattr(layer.weight, "quant_state", None)  # a weight that FSDP2 has cut apart has none
    if state is None or state.absmax.dim() < 2:
        return False
    if getattr(state, "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        state.original_nested = False  # its scales, quantized no more, are not quantized again
        layer.weight.data, _ = _convert_weight_packed_for_cpu_inverse(layer.weight.data, state)
    state.absmax = state.absmax.T.reshape(-1).float()
    return True


@cache
def _patch_4bit_decoding_() -> Any:
    """Let 4 bits be decoded on a CPU in rows of one block each, where the rows of the weight are no whole blocks.

    Scales belong to 64 weights on end, wherever a row ends; the kernel for AVX512 counts whole blocks of each row instead.
    Returns what keeps this so, or None where the kernel is right.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.ones(2, 48)
    weight[1, 16:] = 10.0  # the second block
    if torch.equal(dequantize_4bit(*quantize_4bit(weight, blocksize=64, quant_type="nf4")), weight):
        return None
    kernel = torch.library.get_kernel("bitsandbytes::dequantize_4bit", "CPU")

    def decode(keys: Any, packed: Any, absmax: Any, blocksize: int, kind: str, shape: Any, dtype: Any) -> torch.Tensor:
        count, rows = math.prod(shape), list(shape)
        if shape[-1] % blocksize:
            rows = [1, count] if count % blocksize else [count // blocksize, blocksize]
        return torch.as_tensor(kernel.call_boxed(keys, packed, absmax, blocksize, kind, rows, dtype)).reshape(shape)

    ours = torch.library.Library("bitsandbytes", "IMPL")
    with warnings.catch_warnings():  # that there was one before, which is what is meant
        warnings.simplefilter("ignore")
        ours.impl("dequantize_4bit", decode, "CPU", with_keyset=True, allow_override=True)
    return ours


def _log_once(record: logging.LogRecord) -> bool:
    """A filter that lets each text pass once."""
    said = record.getMessage()
    new = said not in _SAID
    _SAID.add(said)
    return new


_SAID: set[str] = set()
