"""Weights in 8 and 4 bits (bitsandbytes): how they are asked for, and the form in which they are kept."""

import logging
import math
import sys
import warnings
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from rlhf_recipes.arguments import UserError

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PretrainedConfig
    from trl import ModelConfig

BITS = (8, 4)

logger = logging.getLogger(__name__)


@dataclass
class FrozenArguments:
    """In how many bits those are read that nothing is learnt by."""

    frozen_bits: int | None = field(
        default=None,
        metadata={"help": "Read judges and the reference model in so many bits, 8 or 4. Unset: full precision."},
    )

    def __post_init__(self) -> None:
        if self.frozen_bits not in (None, *BITS):
            raise UserError(f"frozen_bits is {self.frozen_bits}; give 8 or 4, or leave it out")

    def frozen(self, how: Any) -> dict[str, Any]:
        """What `load_judge` and `load_causal_lm` are given for them. how: who says which kind of 4 bits."""
        return in_bits(self.frozen_bits, how.bnb_4bit_quant_type, how.use_bnb_nested_quant)


@dataclass
class ReadingArguments(FrozenArguments):
    """The same for models that are measured, under the names of `trl.ModelConfig`."""

    load_in_8bit: bool = field(default=False, metadata={"help": "Read the models in 8 bits."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Read the models in 4 bits."})
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"help": "Kind of 4 bits: nf4 or fp4."})
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "Quantize the scales of 4 bits once more."})
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run the Python code that the models' folders or repos bring along. Read it first."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.load_in_8bit and self.load_in_4bit:
            raise UserError("load_in_8bit and load_in_4bit exclude one another; set one of them")
        if self.bnb_4bit_quant_type not in ("nf4", "fp4"):
            raise UserError(f"bnb_4bit_quant_type is {self.bnb_4bit_quant_type!r}; choose nf4 or fp4")

    @property
    def bits(self) -> int | None:
        return 8 if self.load_in_8bit else 4 if self.load_in_4bit else None

    @property
    def code(self) -> dict[str, Any]:
        """What every loader of these models is given."""
        return {"trust_remote_code": self.trust_remote_code}

    def measured(self) -> dict[str, Any]:
        """What `load_causal_lm` is given for the models."""
        return self.code | in_bits(self.bits, self.bnb_4bit_quant_type, self.use_bnb_nested_quant)


def in_bits(bits: int | None, kind: str = "nf4", nested: bool = False) -> dict[str, Any]:
    """Keyword arguments that let `load_causal_lm`, `load_judge` and `load_reward` read in 8 or 4 bits; none for None."""
    if bits is None:
        return {}
    from transformers import BitsAndBytesConfig

    four = {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": nested} if bits == 4 else {}
    return {"quantization_config": BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, **four)}


def quantization_of(model_config: "ModelConfig") -> "BitsAndBytesConfig | None":
    """What a `ModelConfig` asks for. 4 bits are computed with in its dtype, where it names one."""
    from trl import get_quantization_config

    named = replace(model_config, dtype=None) if model_config.dtype == "auto" else model_config
    return get_quantization_config(named)


def asks_for_bits(model_config: "ModelConfig", config: "PretrainedConfig") -> bool:
    """Whether a model will be quantized: as it is read, or because it was saved so."""
    asked = model_config.load_in_4bit or model_config.load_in_8bit
    return asked or getattr(config, "quantization_config", None) is not None


def without_traps(model: Any) -> Any:
    """Keep what is in 4 or 8 bits right on a CPU, where bitsandbytes does not; returns the model, changed in place.

    - At the first forward pass in eval mode it packs 4-bit layers for AVX512_BF16. From there on they do not train, merge or
      save rightly, and layers whose widths are no multiples of 32 and 64 cannot be packed at all. They stay as they are
      here. What was packed before is unpacked; its scales stay rounded to bfloat16, as that form has them.
    - With AVX512 it decodes rows that are no multiple of 64 long with other rows' scales (see `_mend_decoding`).
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
        _mend_decoding()
    if any(isinstance(each, library.nn.Linear8bitLt) for each in model.modules()):
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_said_once)
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
def _mend_decoding() -> Any:
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


def _said_once(record: logging.LogRecord) -> bool:
    """A filter that lets each text pass once."""
    said = record.getMessage()
    new = said not in _SAID
    _SAID.add(said)
    return new


_SAID: set[str] = set()
