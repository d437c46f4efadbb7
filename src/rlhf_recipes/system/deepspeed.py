"""Support for DeepSpeed ZeRO (Rajbhandari et al. 2020), where PPO needs more than Trainer's own integration.

- DeepSpeed's engine takes the optimizer step inside the backward pass. PPO decides afterwards whether to take or to
  skip it, so the step is deferred (`DeferredStepEngine`).
- Under ZeRO-3 transformers shards every model that it loads. Models that only generate or score are loaded unsharded.
"""

import os
import pickle
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from torch import nn

from rlhf_recipes.core.errors import RankError, UserError
from rlhf_recipes.system.launch import zero_stage

# Variables that override the argument `weights_only` of torch.load. Setting both is an error.
WEIGHTS_ONLY_VARIABLE, ANY_PICKLE_VARIABLE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"

AUTO_SIZES = {
    "reduce_bucket_size": lambda width: width * width,
    "stage3_prefetch_bucket_size": lambda width: int(0.9 * width * width),
    "stage3_param_persistence_threshold": lambda width: 10 * width,
}  # values that transformers computes for "auto", from the hidden size of a model


def cast_like_engine_(module: nn.Module, args: Any) -> None:
    """Cast the module's parameters to the precision that DeepSpeed's engine uses for the models it trains.

    Only parameters are cast, as in `DeepSpeedEngine._cast_module_mixed_precision`. Buffers keep their precision: rotary
    frequencies in bfloat16 would change the angle of distant tokens. Quantized parameters are not cast.
    """
    for parameter in _castable(module, args):
        if not hasattr(parameter, "quant_state"):
            parameter.data = parameter.data.to(torch.bfloat16)


def check_quantized_storage(model: nn.Module, args: Any) -> None:
    """Check that DeepSpeed's engine would not cast the 4-bit weights of a model before its training.

    Raises:
        UserError: the weights are stored in a dtype (`bnb_4bit_quant_storage`) that the engine would cast.
    """
    if any(hasattr(parameter, "quant_state") for parameter in _castable(model, args)):
        raise UserError(
            "DeepSpeed in bfloat16 would cast 4-bit weights that are stored in float32 or float16; set "
            "bnb_4bit_quant_storage to uint8 or bfloat16, or bf16 to false"
        )


def _castable(module: nn.Module, args: Any) -> list[nn.Parameter]:
    """Return the parameters that DeepSpeed's engine casts to bfloat16; none in float32 or without DeepSpeed."""
    if zero_stage(args) is None or not args.bf16:
        return []
    return [parameter for parameter in module.parameters() if parameter.dtype in (torch.float32, torch.float16)]


def deepspeed_engine(accelerator: Any) -> Any:
    """Return DeepSpeed's engine; None before training starts, and without DeepSpeed."""
    return getattr(getattr(accelerator, "deepspeed_engine_wrapped", None), "engine", None)


def shards_weights(engine: Any) -> bool:
    """Return whether the engine shards the weights (ZeRO-3). Each forward pass is then a collective operation."""
    return engine is not None and int(engine.zero_optimization_stage()) == 3


def gather_weights(engine: Any) -> AbstractContextManager[Any]:
    """Within this block, every process holds the full weights of the engine's model. All ranks must call it."""
    if not shards_weights(engine):
        return nullcontext()
    from deepspeed.runtime.zero.stage3 import unwrap_model_for_generation

    return unwrap_model_for_generation(engine)


@contextmanager
def load_unsharded() -> Iterator[None]:
    """Within this block, transformers loads models unsharded; under ZeRO-3 it shards every model otherwise."""
    from transformers.integrations import deepspeed

    config_reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config_reference


def exclude_frozen_weights_(engine: Any) -> None:
    """Patch the engine to save and load trainable weights only, as transformers does for a `PeftModel`.

    Without it a checkpoint of adapters would contain the frozen base. DeepSpeed could not load the quantization state
    that bitsandbytes keeps beside each weight.
    """
    save, load = engine.save_checkpoint, engine.load_checkpoint

    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        return load(*args, **kwargs | {"load_module_strict": False})

    engine.save_checkpoint, engine.load_checkpoint = partial(save, exclude_frozen_parameters=True), load_checkpoint


def fill_bucket_sizes_(accelerator: Any, hidden_size: int) -> None:
    """Set the "auto" bucket sizes of the accelerator's DeepSpeed configuration from a hidden size.

    transformers reads the hidden size from the model's config, which a module of several models does not have.
    Source: `HfTrainerDeepSpeedConfig.trainer_config_finalize` of transformers.
    """
    config = accelerator.state.deepspeed_plugin.hf_ds_config
    for name, size in AUTO_SIZES.items():
        if config.is_auto(f"zero_optimization.{name}"):
            config.fill_only(f"zero_optimization.{name}", size(hidden_size))


class DeferredStepEngine(DeepSpeedEngineWrapper):
    """Accelerate's wrapper of DeepSpeed's engine, with the optimizer step apart from the backward pass."""

    @classmethod
    def install_(cls, accelerator: Any) -> "DeferredStepEngine | None":
        """Replace the accelerator's wrapper by this one, and return it; None without an engine."""
        wrapper = getattr(accelerator, "deepspeed_engine_wrapped", None)
        if wrapper is not None and not isinstance(wrapper, cls):
            wrapper = accelerator.deepspeed_engine_wrapped = cls(wrapper.engine)
        return wrapper

    def backward(self, loss: Any, sync_gradients: bool = True, **kwargs: Any) -> None:
        """Run the backward pass. sync_gradients: whether it is the last one before the optimizer step."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss, **kwargs)

    def step(self) -> None:
        """Clip the gradients, take the optimizer step, clear the gradients and advance the schedule."""
        self.engine.step()

    def skip_step(self) -> None:
        """Clear the gradients and advance the schedule without a step: weights and moments do not change."""
        optimizer = self.engine.optimizer
        if shards_weights(self.engine):
            optimizer._pre_step()
            optimizer._overflow_clean_up(optimizer.loss_scale)
        else:
            optimizer.micro_step_id = -1  # its value before the first backward pass
            optimizer.zero_grad(set_to_none=True)
            optimizer._release_preflattened_grad_buffers()
            if optimizer.cpu_offload:
                optimizer._offload_accumulated_param_ids = set()
                optimizer.reset_cpu_buffers()
            else:
                for group in optimizer.averaged_gradients:
                    optimizer.averaged_gradients[group] = optimizer.all_grad_tensors[group] = None
        self.engine._global_grad_norm = 0.0
        if self.engine.lr_scheduler is not None:
            self.engine.lr_scheduler.step()


@contextmanager
def safe_deepspeed_loading() -> Iterator[None]:
    """Within this block, DeepSpeed loads only tensors, plain values and its own record classes from a checkpoint.

    By default it unpickles any object, which can run code.

    Raises:
        RankError: the checkpoint holds any other object.
    """
    import torch
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    variables = {name: os.environ.pop(name, None) for name in (WEIGHTS_ONLY_VARIABLE, ANY_PICKLE_VARIABLE)}
    os.environ[WEIGHTS_ONLY_VARIABLE] = "1"
    try:
        with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
            yield
    except pickle.UnpicklingError as error:
        match = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise RankError(
            f"the checkpoint holds a pickle that would run code ({match[1] if match else 'unknown object'}); "
            "resume from a checkpoint that one of your own runs saved"
        ) from None
    finally:
        os.environ.pop(WEIGHTS_ONLY_VARIABLE)
        os.environ.update({name: value for name, value in variables.items() if value is not None})
