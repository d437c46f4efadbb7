"""Whose gradients an optimizer step may use - everyone's, the value's alone, or nobody's - and how far each goes."""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_recipes.core.tensors import MaskedMeans, Reduce
from rlhf_recipes.ppo.config import PPOConfig
from rlhf_recipes.ppo.roles.value import PolicyAndValue

logger = logging.getLogger(__name__)

TOLERANCE = 1.5  # a step may lie so far beyond target_kl, as in the PPO authors' later code


class StepGuard:
    """Looks at each optimizer step after its backward pass; the processes always agree.

    - A loss that is not finite, on any process, changes no weight: counted in `skipped` and named in the log.
    - Once the approximate KL of a step is beyond `target_kl`, the update is `over`: neither that step nor any other
      of the update changes a weight.
    - In the first `value_warmup_updates` only the value moves.
    """

    def __init__(self, model: PolicyAndValue, args: PPOConfig) -> None:
        self.model, self.args = model, args
        self.skipped, self.over = 0, False
        self._finite, self._kl = True, MaskedMeans()

    def saw(self, loss: Tensor) -> None:
        """The loss of a micro-batch."""
        self._finite &= bool(torch.isfinite(loss))

    def saw_divergence(self, approximate_kl: Tensor, mask: Tensor) -> None:
        """Of a micro-batch, (batch, tokens)."""
        if self.args.target_kl is not None:
            self._kl.add({"kl": approximate_kl}, mask)

    def decide(self, step: int, reduce: Reduce, device: torch.device) -> bool:
        """Drop the gradients that must not be used; returns whether any may be. step: optimizer steps taken before."""
        broken = reduce(torch.tensor(float(not self._finite), device=device)) > 0
        divergence, self._finite = self._kl.means(reduce).get("kl", 0.0), True
        if broken:
            self.skipped += 1
            logger.warning("optimizer step %d skipped: its loss is not finite", step + 1)
        elif self.args.target_kl is not None and divergence > TOLERANCE * self.args.target_kl:
            self.over = True
        if broken or self.over:
            drop_gradients(self.model.parameters())
        elif step // self.args.steps_per_update < self.args.value_warmup_updates:
            drop_gradients(self.model.policy_parameters())
        return not (broken or self.over)

    def state(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "over": self.over}

    def restore(self, state: dict[str, Any]) -> None:
        self.skipped, self.over = state["skipped"], state["over"]


def drop_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """An optimizer leaves a parameter without a gradient alone, its moments and its weight decay too."""
    for parameter in parameters:
        parameter.grad = None


def split_groups(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], learning_rate: float) -> None:
    """Give some parameters a learning rate of their own; whatever else their group says stays."""
    chosen = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        apart = [parameter for parameter in group["params"] if id(parameter) in chosen]
        if apart:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
            options = {name: value for name, value in group.items() if name not in ("params", "initial_lr")}
            optimizer.add_param_group(options | {"params": apart, "lr": learning_rate})
