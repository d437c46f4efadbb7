"""Checks on a few tokens that a loaded model behaves as a stage needs: packed rows, left padding, TRL's fused head.

A config cannot tell of an architecture that is not known here. Each check costs two short forward passes.
"""

import inspect
from typing import Any

import torch
from torch import Tensor

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.unwrapping import base_model, trunk_of
from rlhf_recipes.models.architectures import left_padding_error, packing_error, vocabulary_size

ATTENTION_ON_CPU = (None, "eager", "sdpa", "sdpa_with_short_backward")


def check_packing(model: Any, name: str) -> None:
    """Check on a few tokens that a packed row equals its rows; transformers separates them by `position_ids`.

    Raises:
        UserError: it does not.
    """
    if _is_partial(model):
        return
    if "position_ids" not in _parameters(model):
        raise packing_error(name, type(base_model(model)).__name__)
    first, second = torch.arange(2, 9), torch.arange(9, 2, -1)
    packed = {"input_ids": torch.cat([first, second])[None], "position_ids": torch.arange(7).repeat(2)[None]}
    alone = [_states(model, input_ids=row[None]) for row in (first, second)]
    if not _equal(_states(model, **packed), torch.cat(alone, dim=1), base_model(model).dtype):
        raise packing_error(name, type(base_model(model)).__name__)


def check_left_padding(model: Any, name: str, pad_id: int) -> None:
    """Check on a few tokens that padding on the left changes no state of a row. pad_id: what pads it.

    Raises:
        UserError: it does.
    """
    if _is_partial(model):
        return
    row, padding = torch.arange(2, 9), torch.full((3,), pad_id)
    padded = {
        "input_ids": torch.cat([padding, row])[None],
        "attention_mask": torch.tensor([[0] * len(padding) + [1] * len(row)]),
    }
    if "position_ids" in _parameters(model):
        padded["position_ids"] = torch.tensor([[0] * len(padding) + list(range(len(row)))])
    if not _equal(
        _states(model, **padded)[:, len(padding) :], _states(model, input_ids=row[None]), base_model(model).dtype
    ):
        raise left_padding_error(name, type(base_model(model)).__name__)


def _parameters(model: Any) -> Any:
    return inspect.signature(type(trunk_of(model)).forward).parameters


@torch.no_grad()
def _states(model: Any, **inputs: Tensor) -> Tensor:
    """Return the last hidden states, (rows, tokens, hidden_size), in eval mode. Restores the model's mode."""
    base = base_model(model)
    device, mode, attention = next(base.parameters()).device, base.training, base.config._attn_implementation
    size = vocabulary_size(base.config) or 9
    inputs = {key: (value % size if key == "input_ids" else value).to(device) for key, value in inputs.items()}
    for_gpu = device.type == "cpu" and attention not in ATTENTION_ON_CPU
    base.eval()
    try:
        if for_gpu:
            base.set_attn_implementation("eager")
        return torch.as_tensor(trunk_of(base)(**inputs, use_cache=False).last_hidden_state).float()
    finally:
        if for_gpu:
            base.set_attn_implementation(attention)
        base.train(mode)


def _equal(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Return whether the states of every token are equal up to the rounding of the model's precision."""
    error = (actual - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-6)
    return bool(error.max() <= (1e-3 if dtype in (torch.float32, torch.float64) else 0.1))


def check_fused_head(model: Any, name: str, temperature: float = 1.0) -> None:
    """Check on a few tokens that the head that a TRL trainer has put on the model gives the model's log-probabilities.

    TRL applies the head's weights itself, with the soft-capping and scaling that it knows. A model without such a head
    passes.

    temperature: what the trainer divides logits by.

    Raises:
        UserError: TRL does not know what the model does to its logits.
    """
    base = base_model(model)
    if "forward" not in vars(base) or _is_partial(model):
        return
    ids = torch.arange(1, 9, device=next(base.parameters()).device)[None] % (vocabulary_size(base.config) or 9)
    mode = base.training
    base.eval()
    try:
        with torch.no_grad():
            logits = type(base).forward(base, input_ids=ids, use_cache=False).logits[:, :-1]
            own = torch.log_softmax(logits.float() / temperature, dim=-1)
            fused = base(input_ids=ids, labels=ids, fused_lm_head=True)
    finally:
        base.train(mode)
    own = own.gather(-1, ids[:, 1:, None]).squeeze(-1)
    tolerance = 1e-3 if base.dtype in (torch.float32, torch.float64) else 0.1  # nats
    if (fused.log_probs - own).abs().max() > tolerance:
        raise UserError(
            f"TRL does not know how a {type(base).__name__} changes the logits of its head, so {name} would learn from "
            "wrong log-probabilities; use pretrain or ppo, or another model"
        )


def _is_partial(model: Any) -> bool:
    """Return whether this process has not all weights: another holds them, or ZeRO-3 sharded them while loading."""
    return any(weight.device.type == "meta" or "ds_id" in dir(weight) for weight in model.parameters())
