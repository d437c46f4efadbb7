"""The forward and backward passes of one micro-batch, in pieces of episodes of similar length."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_recipes.core.tensors import batches_by_length
from rlhf_recipes.optimizations import CastCache, without_cudnn_attention
from rlhf_recipes.ppo.rollout.rollout import Rollout, trim_padding
from rlhf_recipes.system import DeferredStepEngine, is_sharded


@contextmanager
def without_sync(model: nn.Module, accelerator: Any) -> Iterator[None]:
    """Within this block, backward passes do not synchronise gradients over processes."""
    state, synchronises = accelerator.gradient_state, accelerator.sync_gradients
    state._set_sync_gradients(False)
    try:
        with accelerator.no_sync(model):
            yield
    finally:
        state._set_sync_gradients(synchronises)


class PieceRunner:
    """Splits micro-batches into pieces, so that little of a pass is padding, and keeps the casts of the weights between them.

    Args:
        max_tokens: tokens of a piece; more of them only need more memory.
        width_multiple: the width of a piece is a multiple of this.
        cache_casts: keep autocast's copies of the weights until the optimizer step; False where activations are recomputed,
            which casts the weights again.
    """

    def __init__(
        self, accelerator: Any, device: torch.device, max_tokens: int, width_multiple: int, cache_casts: bool
    ) -> None:
        self.accelerator, self.device = accelerator, device
        self.max_tokens, self.width_multiple = max_tokens, width_multiple
        self.cache_casts = cache_casts
        self._casts = CastCache()

    def run(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        rollout: Rollout | None,
        backward: Callable[[dict[str, Tensor]], Tensor],
    ) -> list[Tensor]:
        """Run `backward` on each piece of a micro-batch; returns the losses.

        inputs: episodes, or nothing in an update that is over. rollout: where a process with fewer pieces than others takes
        an episode to pad with. backward: the forward and backward pass of a piece.
        """
        # A pass over sharded weights, or under DeepSpeed, is a collective operation: all ranks must run equally many.
        collective = is_sharded(model) or DeferredStepEngine.install_(self.accelerator) is not None
        self._set_cache(self.cache_casts and not collective)
        losses = []
        try:
            pieces = self._pieces(inputs)
            if collective:
                pieces = self._padded_to_all_ranks(pieces, rollout)
            for number, piece in enumerate(pieces):  # gradients are synchronised in the last backward pass
                last = number + 1 == len(pieces)
                with without_cudnn_attention(), nullcontext() if last else without_sync(model, self.accelerator):
                    losses.append(backward(piece))
        except BaseException:
            self.release_casts()
            raise
        return losses

    def release_casts(self) -> None:
        """Drop the cached casts: the weights are about to change."""
        self._set_cache(False)

    def _set_cache(self, enabled: bool) -> None:
        if enabled:
            self._casts.begin()
        else:
            self._casts.end()

    def _padded_to_all_ranks(
        self, pieces: list[dict[str, Tensor]], rollout: Rollout | None
    ) -> list[dict[str, Tensor]]:
        """Put pieces without generated tokens before the others, so that all ranks have equally many."""
        counts = self.accelerator.gather(torch.tensor([len(pieces)], device=self.device))
        missing = int(counts.max()) - len(pieces)
        if missing and rollout is not None:
            empty = rollout.select(torch.zeros(1, dtype=torch.long, device=self.device))
            empty["response_mask"] = torch.zeros_like(empty["response_mask"])
            pieces = [trim_padding(empty, self.width_multiple)] * missing + pieces
        return pieces

    def _pieces(self, inputs: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        if not inputs:
            return []
        lengths = inputs["attention_mask"].sum(1).tolist()
        return [
            trim_padding({name: tensor[rows] for name, tensor in inputs.items()}, self.width_multiple)
            for rows in batches_by_length(lengths, len(lengths), self.max_tokens)
        ]
