"""Quantization to 8 and 4 bits with bitsandbytes: arguments, and the keyword arguments for loading."""

import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rlhf_recipes.core.errors import UserError

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
    from trl import ModelConfig

BITS = (8, 4)

logger = logging.getLogger(__name__)


@dataclass
class FrozenQuantizationArguments:
    """Quantization of frozen models (reward models and the reference)."""

    frozen_bits: int | None = field(
        default=None,
        metadata={"help": "Quantize reward models and the reference model to 8 or 4 bits. Unset: full precision."},
    )

    def __post_init__(self) -> None:
        if self.frozen_bits not in (None, *BITS):
            raise UserError(f"frozen_bits is {self.frozen_bits}; give 8 or 4, or leave it out")

    def frozen_model_kwargs(self, config: Any) -> dict[str, Any]:
        """Return the keyword arguments of `load_reward_model` and `load_causal_lm` for frozen models.

        config: has the fields `bnb_4bit_quant_type` and `use_bnb_nested_quant`, such as `trl.ModelConfig`.
        """
        return quantization_kwargs(self.frozen_bits, config.bnb_4bit_quant_type, config.use_bnb_nested_quant)


@dataclass
class LoadingArguments(FrozenQuantizationArguments):
    """How to load the models of an evaluation; the names are those of `trl.ModelConfig`."""

    load_in_8bit: bool = field(default=False, metadata={"help": "Quantize the models to 8 bits."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantize the models to 4 bits."})
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"help": "4-bit data type: nf4 or fp4."})
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "Also quantize the scales of 4-bit weights."})
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run Python code in the models' folders or repos. Read the code first."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.load_in_8bit and self.load_in_4bit:
            raise UserError("load_in_8bit and load_in_4bit are both set; set one of them")
        if self.bnb_4bit_quant_type not in ("nf4", "fp4"):
            raise UserError(f"bnb_4bit_quant_type is {self.bnb_4bit_quant_type!r}; choose nf4 or fp4")

    @property
    def bits(self) -> int | None:
        """The number of bits per weight: 8, 4, or None for full precision."""
        return 8 if self.load_in_8bit else 4 if self.load_in_4bit else None

    @property
    def remote_code_kwargs(self) -> dict[str, Any]:
        """The keyword arguments about remote code, which every loader of these models needs."""
        return {"trust_remote_code": self.trust_remote_code}

    def model_kwargs(self) -> dict[str, Any]:
        """Return the keyword arguments of `load_causal_lm` for the evaluated models."""
        quantization = quantization_kwargs(self.bits, self.bnb_4bit_quant_type, self.use_bnb_nested_quant)
        return self.remote_code_kwargs | quantization


def quantization_kwargs(bits: int | None, quant_type: str = "nf4", nested: bool = False) -> dict[str, Any]:
    """Return keyword arguments for `load_causal_lm`, `load_reward_model` and `load_reward` that quantize the weights.

    Args:
        bits: 8 or 4; None: no quantization, so no arguments.
        quant_type: 4-bit data type, nf4 or fp4.
        nested: also quantize the scales of 4-bit weights.
    """
    if bits is None:
        return {}
    from transformers import BitsAndBytesConfig

    four_bit = {"bnb_4bit_quant_type": quant_type, "bnb_4bit_use_double_quant": nested} if bits == 4 else {}
    return {"quantization_config": BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, **four_bit)}


def quantization_config_of(model_config: "ModelConfig") -> "BitsAndBytesConfig | None":
    """Return the quantization that a `ModelConfig` requests, or None. Its dtype, if any, is the compute dtype."""
    from trl import get_quantization_config

    with_dtype = replace(model_config, dtype=None) if model_config.dtype == "auto" else model_config
    return get_quantization_config(with_dtype)


def will_be_quantized(model_config: "ModelConfig", config: "PretrainedConfig") -> bool:
    """Return whether the loaded model is quantized: by request, or because it was saved in quantized form."""
    requested = model_config.load_in_4bit or model_config.load_in_8bit
    return requested or getattr(config, "quantization_config", None) is not None


def is_quantized(model: "PreTrainedModel") -> bool:
    """Return whether bitsandbytes quantized the model to 8 or 4 bits."""
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))
