"""One optimizer step of PPO: which tokens it counts, in what pieces it is worked out, whose gradients it uses."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_recipes.core.tensors import batches_by_length
from rlhf_recipes.optimizations import CastCache, without_cudnn_attention
from rlhf_recipes.ppo.resume import ResumableTrainer
from rlhf_recipes.ppo.rollout.rollout import trim_padding
from rlhf_recipes.ppo.update.guard import split_groups
from rlhf_recipes.system import DeferredStepEngine, is_sharded


class MinimizingTrainer(ResumableTrainer):
    """Trainer's own optimizer step, on the minibatches of a rollout."""

    _casts: CastCache | None = None

    def create_optimizer(self, model: Any = None) -> Any:
        """Trainer's, with a learning rate of its own for the value where one is asked for."""
        given = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if not given and self.args.value_learning_rate is not None:
            split_groups(optimizer, self.model.value_parameters(), self.args.value_learning_rate)
        return optimizer

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The micro-batches of one optimizer step, and the number of generated tokens in them, of all processes."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        tokens = sum(int(batch["response_mask"].sum()) for batch in batches if batch)
        return batches, self.reduce(torch.tensor(float(tokens), device=device)).clamp(min=1) if batches else None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Trainer's step, a few episodes of like length at a time, after which `StepGuard` says whose gradients count."""
        loss = torch.zeros((), device=self.args.device)
        engine = DeferredStepEngine.install_(self.accelerator)
        meets = is_sharded(model) or engine is not None  # in each piece, all processes
        self._keep_casts(not meets)
        try:
            pieces = self._pieces(inputs)
            if meets:
                pieces = self._as_many_everywhere(pieces)
            for number, piece in enumerate(pieces):  # the last one's backward pass makes the processes' gradients one
                with (
                    without_cudnn_attention(),
                    self._more_to_come(model) if number + 1 < len(pieces) else nullcontext(),
                ):
                    one = super().training_step(model, piece, num_items_in_batch)
                self.guard.saw(one)
                loss = loss + one
        except BaseException:
            self._keep_casts(False)
            raise
        if self.accelerator.sync_gradients:
            self._keep_casts(False)
            used, before = False, self.guard.skipped
            if inputs:  # else: a minibatch of an update that is over
                used = self.guard.decide(self.state.global_step, self.reduce, loss.device)
            if engine is not None:
                engine.step() if used else engine.skip_step()
            if self.guard.skipped > before:
                self.require_finite_weights()  # of weights that are not, every loss to come would be skipped
        return loss

    @contextmanager
    def _more_to_come(self, model: nn.Module) -> Iterator[None]:
        """Around a piece that is not the last of its micro-batch: the processes' gradients need not be one yet."""
        state, last = self.accelerator.gradient_state, self.accelerator.sync_gradients
        state._set_sync_gradients(False)
        try:
            with self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(last)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Rollouts are where they are learnt from, in float32; Trainer would bring them into the precision of DeepSpeed's
        weights."""
        return inputs

    def _as_many_everywhere(self, pieces: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Each pass over sharded weights is a meeting: who has fewer pieces comes with ones in which no token counts."""
        counts = self.accelerator.gather(torch.tensor([len(pieces)], device=self.args.device))
        missing = int(counts.max()) - len(pieces)
        if missing and self.underway is not None:
            one = self.underway.select(torch.zeros(1, dtype=torch.long, device=self.args.device))
            one["response_mask"] = torch.zeros_like(one["response_mask"])
            pieces = [trim_padding(one, self.experience.multiple)] * missing + pieces
        return pieces

    def _pieces(self, inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        if not inputs:
            return []
        lengths = inputs["attention_mask"].sum(1).tolist()
        batches = batches_by_length(lengths, len(lengths), self.experience.at_once)
        multiple = self.experience.multiple
        return [trim_padding({name: tensor[rows] for name, tensor in inputs.items()}, multiple) for rows in batches]

    def _keep_casts(self, on: bool) -> None:
        """Weights stay as they are until the optimizer moves them. Activations that are computed again need theirs anew."""
        self._casts = self._casts or CastCache()
        if on and not self.args.activation_checkpointing:
            self._casts.begin()
        else:
            self._casts.end()
