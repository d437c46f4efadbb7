"""Weights in 8 and 4 bits (bitsandbytes): how they are asked for, and the form in which they are kept."""

import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rlhf_recipes.core.errors import UserError

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PretrainedConfig
    from trl import ModelConfig

BITS = (8, 4)

logger = logging.getLogger(__name__)


@dataclass
class FrozenQuantizationArguments:
    """In how many bits those are read that nothing is learnt by."""

    frozen_bits: int | None = field(
        default=None,
        metadata={
            "help": "Read reward models and the reference model in so many bits, 8 or 4. Unset: full precision."
        },
    )

    def __post_init__(self) -> None:
        if self.frozen_bits not in (None, *BITS):
            raise UserError(f"frozen_bits is {self.frozen_bits}; give 8 or 4, or leave it out")

    def frozen(self, how: Any) -> dict[str, Any]:
        """What `load_reward_model` and `load_causal_lm` are given for them. how: who says which kind of 4 bits."""
        return quantization_kwargs(self.frozen_bits, how.bnb_4bit_quant_type, how.use_bnb_nested_quant)


@dataclass
class LoadingArguments(FrozenQuantizationArguments):
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
        return self.code | quantization_kwargs(self.bits, self.bnb_4bit_quant_type, self.use_bnb_nested_quant)


def quantization_kwargs(bits: int | None, kind: str = "nf4", nested: bool = False) -> dict[str, Any]:
    """Keyword arguments that let `load_causal_lm`, `load_reward_model` and `load_reward` read in 8 or 4 bits; none for None."""
    if bits is None:
        return {}
    from transformers import BitsAndBytesConfig

    four = {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": nested} if bits == 4 else {}
    return {"quantization_config": BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, **four)}


def quantization_config_of(model_config: "ModelConfig") -> "BitsAndBytesConfig | None":
    """What a `ModelConfig` asks for. 4 bits are computed with in its dtype, where it names one."""
    from trl import get_quantization_config

    named = replace(model_config, dtype=None) if model_config.dtype == "auto" else model_config
    return get_quantization_config(named)


def will_be_quantized(model_config: "ModelConfig", config: "PretrainedConfig") -> bool:
    """Whether a model will be quantized: as it is read, or because it was saved so."""
    asked = model_config.load_in_4bit or model_config.load_in_8bit
    return asked or getattr(config, "quantization_config", None) is not None
