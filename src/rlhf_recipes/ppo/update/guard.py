"""Which gradients an optimizer step may use: all, those of the value only, or none."""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_recipes.core.tensors import MaskedMeans, Reduce
from rlhf_recipes.ppo.roles.value import PolicyAndValue

logger = logging.getLogger(__name__)

TOLERANCE = 1.5  # how far a step may exceed target_kl, as in the PPO authors' later code


class StepGuard:
    """Checks each optimizer step after its backward pass; all processes decide alike.

    - A loss that is not finite, in any process, changes no weight. It is counted in `skipped` and logged.
    - Once the approximate KL of a step exceeds `target_kl`, the update is `over`: neither that step nor a later one of the
      update changes a weight.
    - In the first `warmup_steps` optimizer steps only the value is trained.
    """

    def __init__(self, model: PolicyAndValue, target_kl: float | None, warmup_steps: int) -> None:
        self.model, self.target_kl, self.warmup_steps = model, target_kl, warmup_steps
        self.skipped, self.over = 0, False
        self._finite, self._kl = True, MaskedMeans()

    def record_loss(self, loss: Tensor) -> None:
        """Add the loss of a micro-batch."""
        self._finite &= bool(torch.isfinite(loss))

    def record_divergence(self, approximate_kl: Tensor, mask: Tensor) -> None:
        """Add the approximate KL of a micro-batch, (batch, tokens)."""
        if self.target_kl is not None:
            self._kl.add({"kl": approximate_kl}, mask)

    def drop_gradients_(self, step: int, reduce: Reduce, device: torch.device) -> bool:
        """Drop the gradients that must not be used; returns whether any may be used. step: optimizer steps taken before."""
        broken = reduce(torch.tensor(float(not self._finite), device=device)) > 0
        divergence, self._finite = self._kl.means(reduce).get("kl", 0.0), True
        if broken:
            self.skipped += 1
            logger.warning("optimizer step %d skipped: its loss is not finite", step + 1)
        elif self.target_kl is not None and divergence > TOLERANCE * self.target_kl:
            self.over = True
        if broken or self.over:
            drop_gradients_(self.model.parameters())
        elif step < self.warmup_steps:
            drop_gradients_(self.model.policy_parameters())
        return not (broken or self.over)

    def state(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "over": self.over}

    def restore(self, state: dict[str, Any]) -> None:
        self.skipped, self.over = state["skipped"], state["over"]


def drop_gradients_(parameters: Iterable[nn.Parameter]) -> None:
    """Remove the gradients. An optimizer skips a parameter without gradient, its moments and its weight decay included."""
    for parameter in parameters:
        parameter.grad = None


def split_parameter_groups_(
    optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], learning_rate: float
) -> None:
    """Move some parameters into optimizer groups with their own learning rate; the other options of a group stay."""
    chosen = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if id(parameter) in chosen]
        if moved:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
            options = {name: value for name, value in group.items() if name not in ("params", "initial_lr")}
            optimizer.add_param_group(options | {"params": moved, "lr": learning_rate})
