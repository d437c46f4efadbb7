"""Options of transformers, TRL and peft that this machine, model or installation cannot honour, found before weights load."""

import copy
import importlib.util
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from transformers import Trainer, get_scheduler

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.unsupported import unsupported_options
from rlhf_recipes.training.best_model import check_best_metric

LIBRARIES = ("transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets", "deepspeed", "torch")
ADAPTER_OPTIONS = (
    "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters", "lora_modules_to_save",
    "use_rslora", "use_dora",
)  # fmt: skip


def check_options(training: Any, *others: Any) -> None:
    """Check the options that need a package, a device or another option. No weights are loaded.

    training, others: the stage's arguments.

    Raises:
        UserError: names the option and the way out.
    """
    _refuse_unsupported(training)
    for each in others:
        if hasattr(each, "lora_r"):
            _check_adapter_options(each)
    _check_reports(training)
    _check_kernels(training)
    _check_optimizer(training)
    _check_schedule(training)


def check_model_options(
    training: Any, model_config: Any, config: Any, logged: Sequence[str], useless: Mapping[str, str] | None = None
) -> None:
    """Check the options that depend on the model's architecture, by its configuration, and the best model's metric.

    logged, useless: as in `check_best_metric`.

    Raises:
        UserError: an attention implementation that the model or the machine lacks; a router loss without a router; or as
            `check_best_metric`.
    """
    check_best_metric(training, logged, useless)
    if getattr(training, "router_aux_loss_coef", None) and not hasattr(
        config.get_text_config(), "output_router_logits"
    ):
        raise UserError(
            f"router_aux_loss_coef is {training.router_aux_loss_coef}, but a "
            f"{config.model_type} model has no router; leave it out"
        )
    if model_config.attn_implementation is None:
        return
    from transformers import AutoModelForCausalLM

    option = f"attn_implementation {model_config.attn_implementation}"
    if "flash" in model_config.attn_implementation and training.use_cpu:
        raise UserError(f"{option} needs a GPU; use sdpa, or leave it out")
    with _refusing(option, "use sdpa or eager, or leave it out"), torch.device("meta"):
        AutoModelForCausalLM.from_config(
            config,
            attn_implementation=model_config.attn_implementation,
            trust_remote_code=getattr(training, "trust_remote_code", False),
        )


def check_order_of_pairs(training: Any) -> None:
    """Refuse to sort pairs by length: transformers measures a row's `input_ids`, and a pair has two answers.

    Raises:
        UserError: names the option.
    """
    strategy = getattr(training, "train_sampling_strategy", "random")
    if strategy not in ("random", "sequential"):
        raise UserError(f"train_sampling_strategy {strategy} does not fit pairs; choose random or sequential")


@contextmanager
def library_errors_as_user_errors() -> Iterator[None]:
    """Within this block, what a library refuses becomes one line. Errors of our own code, and crashes, stay as they are.

    Raises:
        UserError: a ValueError, ImportError or NotImplementedError that a library's own `raise` statement raised.
    """
    try:
        yield
    except UserError:
        raise
    except (ValueError, ImportError, NotImplementedError) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        library = next((name for name in LIBRARIES if f"/site-packages/{name}/" in frame.filename), None)
        if library is None or not (frame.line or "").lstrip().startswith("raise "):
            raise
        raise UserError(f"{library} refuses these options: {_one_line(error)}") from error


@contextmanager
def _refusing(option: str, fix: str) -> Iterator[None]:
    """Within this block any error means that the option cannot be honoured.

    Raises:
        UserError: says so, with the error.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{option} cannot be used: {_one_line(error)}; {fix}") from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


def _refuse_unsupported(training: Any) -> None:
    for name, reason in unsupported_options(type(training)).items():
        if name in training.__dict__.get("_unsupported_requested", ()):
            raise UserError(f"{name} {reason}")


def _check_adapter_options(model_config: Any) -> None:
    if model_config.use_peft:
        return
    defaults = {item.name: item.default for item in fields(model_config)}
    for name in ADAPTER_OPTIONS:
        if name in defaults and getattr(model_config, name) != defaults[name]:
            raise UserError(f"{name} has no effect without an adapter; add --use_peft true, or leave it out")


def _check_reports(training: Any) -> None:
    from transformers.integrations import get_reporting_integration_callbacks

    for name in training.report_to or []:
        with _refusing(f"report_to {name}", "install the package, or pass --report_to none"):
            [callback] = get_reporting_integration_callbacks([name])
            callback()


def _check_kernels(training: Any) -> None:
    for option, package in (("use_liger_kernel", "liger_kernel"), ("use_vllm", "vllm")):
        if getattr(training, option, False) and importlib.util.find_spec(package) is None:
            raise UserError(
                f"{option} needs the package {package}, which is not installed; install it, or leave it out"
            )
    if getattr(training, "use_liger_kernel", False) and training.use_cpu:
        raise UserError("use_liger_kernel needs a GPU; leave it out")
    for option in ("use_transformers_continuous_batching", "use_transformers_paged"):
        if getattr(training, option, False) and training.use_cpu:
            raise UserError(f"{option} needs a GPU; leave it out")
    if getattr(training, "activation_offloading", False) and training.use_cpu:
        raise UserError("activation_offloading moves activations from a GPU to the CPU; leave it out on a CPU")


def _check_optimizer(training: Any) -> None:
    """Make the optimizer for a separate weight and take a step of zero."""
    option = f"optim {getattr(training.optim, 'value', training.optim)}"
    if getattr(training, "deepspeed_plugin", None) is not None:
        return  # DeepSpeed makes its own
    weight = torch.nn.Parameter(torch.zeros(64, 64, device="cpu" if training.use_cpu else training.device))
    with _refusing(option, "check --optim_args, or use adamw_torch"):
        kind, options = Trainer.get_optimizer_cls_and_kwargs(training, torch.nn.ParameterList([weight]))
        if training.optim_args:
            plain = copy.copy(training)
            plain.optim_args = None
            if Trainer.get_optimizer_cls_and_kwargs(plain, torch.nn.ParameterList([weight]))[1] == options:
                raise UserError(f"optim_args {training.optim_args} has no effect with {option}; leave it out")
        if "optimizer_dict" in options or "params" in options or "model" in options:
            return  # made from a model's layers
        optimizer = kind([weight], **options)
        weight.grad = torch.zeros_like(weight)
        optimizer.step()


def _check_schedule(training: Any) -> None:
    name = getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=training.learning_rate or 1.0)
    options = dict(training.lr_scheduler_kwargs or {})
    with _refusing(f"lr_scheduler_type {name}", "give what it needs as --lr_scheduler_kwargs, or use linear"):
        get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=10, scheduler_specific_kwargs=options)
