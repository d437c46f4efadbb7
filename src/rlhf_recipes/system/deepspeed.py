"""DeepSpeed's ZeRO (Rajbhandari et al. 2020), where PPO asks of it what Trainer's loop does not.

Its engine takes the optimizer step at the end of a backward pass. Here it is known only then whose gradients count; and
models that answer or reward model are read whole, whatever is cut apart as it trains.
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

# Which torch.load goes by, whatever its caller says; it does not take both.
WITHOUT_CODE, WITH_CODE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"

AUTOMATIC = {
    "reduce_bucket_size": lambda width: width * width,
    "stage3_prefetch_bucket_size": lambda width: int(0.9 * width * width),
    "stage3_param_persistence_threshold": lambda width: 10 * width,
}  # as transformers fills in what a configuration leaves to it, of a model that tells its width


def cast_like_engine_(module: nn.Module, args: Any) -> None:
    """Bring weights into the precision that the engine brings those into that it trains, where nothing else casts.

    Weights alone, as it does (`DeepSpeedEngine._cast_module_mixed_precision`): rotary frequencies in bfloat16 would turn
    far tokens by another angle.
    """
    for parameter in _castable(module, args):
        if not hasattr(parameter, "quant_state"):
            parameter.data = parameter.data.to(torch.bfloat16)


def check_quantized_storage(model: nn.Module, args: Any) -> None:
    """Of a model that is to train.

    Raises:
        UserError: its 4-bit weights are kept as numbers (`bnb_4bit_quant_storage`) which the engine would cast.
    """
    if any(hasattr(parameter, "quant_state") for parameter in _castable(model, args)):
        raise UserError(
            "DeepSpeed in bfloat16 would cast 4-bit weights that are kept as other numbers; set bnb_4bit_quant_storage to "
            "uint8 or bfloat16, or bf16 to false"
        )


def _castable(module: nn.Module, args: Any) -> list[nn.Parameter]:
    """What an engine that trains the module casts to bfloat16; nothing where it computes in float32, or where there is none."""
    if zero_stage(args) is None or not args.bf16:
        return []
    return [parameter for parameter in module.parameters() if parameter.dtype in (torch.float32, torch.float16)]


def deepspeed_engine(accelerator: Any) -> Any:
    """DeepSpeed's engine, once training has begun under it; None before, and elsewhere."""
    return getattr(getattr(accelerator, "deepspeed_engine_wrapped", None), "engine", None)


def shards_weights(engine: Any) -> bool:
    """Whether it has cut the weights themselves apart (ZeRO-3), so that each pass over them is a meeting of all processes."""
    return engine is not None and int(engine.zero_optimization_stage()) == 3


def gather_weights(engine: Any) -> AbstractContextManager[Any]:
    """For the time, every process holds all weights of an engine's model, and reads them by itself."""
    if not shards_weights(engine):
        return nullcontext()
    from deepspeed.runtime.zero.stage3 import unwrap_model_for_generation

    return unwrap_model_for_generation(engine)


@contextmanager
def load_unsharded() -> Iterator[None]:
    """For the time, transformers reads weights as it does without DeepSpeed. Under ZeRO-3 it cuts every model apart as it is
    read, also one that only answers or reward models."""
    from transformers.integrations import deepspeed

    kept = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = kept


def exclude_frozen_weights_(engine: Any) -> None:
    """Of a module that learns adapters, let checkpoints hold what learns, as transformers has it of a `PeftModel` by itself.

    What bitsandbytes keeps beside a weight could not be loaded back either.
    """
    save, load = engine.save_checkpoint, engine.load_checkpoint

    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        return load(*args, **kwargs | {"load_module_strict": False})

    engine.save_checkpoint, engine.load_checkpoint = partial(save, exclude_frozen_parameters=True), load_checkpoint


def fill_bucket_sizes_(accelerator: Any, width: int) -> None:
    """Fill in the sizes that a DeepSpeed configuration leaves to the model's width: a module of several models has none.

    Source: `HfTrainerDeepSpeedConfig.trainer_config_finalize` of transformers.
    """
    config = accelerator.state.deepspeed_plugin.hf_ds_config
    for name, size in AUTOMATIC.items():
        if config.is_auto(f"zero_optimization.{name}"):
            config.fill_only(f"zero_optimization.{name}", size(width))


class DeferredStepEngine(DeepSpeedEngineWrapper):
    """Accelerate's hold on the engine, which takes the step not at the end of a backward pass but when told to."""

    @classmethod
    def of(cls, accelerator: Any) -> "DeferredStepEngine | None":
        """In the place of the accelerator's own, if there is an engine."""
        held = getattr(accelerator, "deepspeed_engine_wrapped", None)
        if held is not None and not isinstance(held, cls):
            held = accelerator.deepspeed_engine_wrapped = cls(held.engine)
        return held

    def backward(self, loss: Any, sync_gradients: bool = True, **kwargs: Any) -> None:
        """sync_gradients: whether this is the last backward pass before the step."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss, **kwargs)

    def step(self) -> None:
        """Clip, move the weights, let go of the gradients, and let the schedule go on."""
        self.engine.step()

    def leave_out(self) -> None:
        """A step that changes no weight and no moment; as elsewhere, the schedule goes on."""
        optimizer = self.engine.optimizer
        if shards_weights(self.engine):
            optimizer._pre_step()
            optimizer._overflow_clean_up(optimizer.loss_scale)
        else:
            optimizer.micro_step_id = -1  # as before the first backward pass
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
    """For the time, of a checkpoint DeepSpeed reads tensors, plain values and its own records, and nothing that runs: by
    itself it unpickles whatever is there.

    Raises:
        UserError: something else is there.
    """
    import torch
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    before = {name: os.environ.pop(name, None) for name in (WITHOUT_CODE, WITH_CODE)}
    os.environ[WITHOUT_CODE] = "1"
    try:
        with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
            yield
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise RankError(
            f"the checkpoint holds a pickle that would run code ({found[1] if found else 'not said which'}); go on from one "
            "that a run of yours has saved"
        ) from None
    finally:
        os.environ.pop(WITHOUT_CODE)
        os.environ.update({name: value for name, value in before.items() if value is not None})
