"""PPO on Trainer's own loop: a rollout is a data source, and the loss is the only other thing that differs."""

import copy
import logging
import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, ProgressCallback, Trainer, TrainerCallback

from rlhf_recipes.arguments import UserError
from rlhf_recipes.generation import Completions, Sampling, row_seed, sample
from rlhf_recipes.ppo.callbacks import UpdateEnd, UpdateLine
from rlhf_recipes.ppo.config import PPOConfig
from rlhf_recipes.ppo.loader import RolloutLoader
from rlhf_recipes.ppo.losses import policy_losses, value_losses
from rlhf_recipes.ppo.prompts import Prompts
from rlhf_recipes.ppo.roles import (
    checked_prompts,
    chosen_stop_ids,
    frozen_reference,
    load_rewards,
    loaded_policy,
    with_adapter,
    without_dropout,
)
from rlhf_recipes.ppo.rollout import RewardShape, Rollout, as_samples, finish_rollout, pack_episodes
from rlhf_recipes.ppo.tally import Tally, UpdateLog
from rlhf_recipes.ppo.value_head import PolicyAndValue, base_model, in_chunks, policy_outputs
from rlhf_recipes.scoring import RewardSource, score
from rlhf_recipes.tensors import Reduce, alone

logger = logging.getLogger(__name__)


class PPOTrainer(Trainer):
    """Reinforce a causal language model against rewards, with `transformers.Trainer`'s loop, flags and callbacks.

    Args:
        model: the policy, or the folder or Hub id of one.
        reward_funcs: what scores an answer, or a list whose scores are added up by `args.reward_weights`: a sequence
            classifier, the path of one, a function ``f(prompts, completions, **columns) -> list[float]``, or its name
            as ``package.module:function``. `reward_model` is the older name of the same argument.
        train_dataset: rows with a `prompt` (text, messages or ids) or `input_ids`; other columns reach the functions.
        processing_class: the policy's tokenizer.
        ref_model: what the KL penalty holds the policy near; by default a frozen copy of the policy as it arrived, or
            the policy without its adapter where it has one.
        value_model: a sequence classifier with one label; None puts a value head on the policy's own trunk.
        reward_processing_classes: the judges' tokenizers, where they are not the policy's.
        peft_config: train an adapter on the policy instead of all its weights.

    Raises:
        UserError: anything about data, tokenizer, judge or arithmetic that can be known before training.
        TypeError: a value model or reward of a kind that cannot serve.
    """

    args: PPOConfig
    control: Any

    def __init__(
        self,
        model: nn.Module | str,
        reward_funcs: RewardSource | Sequence[RewardSource] | None = None,
        args: PPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        ref_model: nn.Module | None = None,
        value_model: nn.Module | None = None,
        reward_model: RewardSource | Sequence[RewardSource] | None = None,
        reward_processing_classes: Any = None,
        data_collator: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        quantization_config: Any = None,
    ) -> None:
        args = args or PPOConfig(output_dir="ppo")
        model, processing_class = loaded_policy(model, processing_class, quantization_config)
        config = base_model(model).config
        self.prompts, self.eval_prompts = checked_prompts(config, processing_class, train_dataset, eval_dataset, args)
        reference = frozen_reference(model, ref_model, peft_config)
        policy = with_adapter(model, peft_config)
        super().__init__(
            model=PolicyAndValue(policy, value_model),
            args=args,
            data_collator=data_collator or list,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.add_callback(UpdateEnd(lambda: self.updates.end(self._reduce)))
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(UpdateLine)
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the tokens of the whole minibatch
        self.reference = None if reference is None else reference.to(args.device)
        for module in (self.model, self.reference):
            without_dropout(module)
        sources = reward_funcs if reward_funcs is not None else reward_model
        self.rewards = load_rewards(sources, processing_class, reward_processing_classes, args)
        stops = chosen_stop_ids(model, processing_class, args)
        self.sampling = Sampling(args.response_length, args.temperature, stop_ids=stops)
        self.updates = UpdateLog(args.episodes_per_update)
        self._not_finite, self._skipped_steps = False, 0
        self.last_samples: list[dict[str, Any]] = []

    # What a subclass may replace.

    def generate(self, queries: Sequence[Sequence[int]], seeds: Sequence[int]) -> Completions:
        """Answer rows of prompt ids with the current policy; seeds: one a row."""
        with self.accelerator.autocast():
            return sample(self.model.policy, queries, self.sampling, seeds, self.args.local_rollout_forward_batch_size)

    def score(self, rows: Mapping[str, Any], completions: Completions) -> dict[str, list[float]]:
        """Score answers by each reward. rows: what `Prompts.rows` gives."""
        texts = completions.texts(self.processing_class)
        asked = {"prompt_ids": rows["prompt_ids"], "completion_ids": completions.ids, "columns": rows["columns"]}
        return {reward.name: score(reward, rows["prompts"], texts, **asked) for reward in self.rewards}

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The PPO loss of one micro-batch: its share of the mean over the tokens of the minibatch."""
        args, mask = self.args, inputs["response_mask"]
        outputs = model(inputs["input_ids"], inputs["attention_mask"], mask, temperature=args.temperature)
        policy = policy_losses(outputs.log_probs, inputs["log_probs"], inputs["advantages"], args.cliprange)
        value = value_losses(outputs.values, inputs["values"], inputs["returns"], args.cliprange_value)
        losses = torch.where(mask, policy.losses + args.vf_coef * value.losses, torch.zeros_like(policy.losses))
        tokens = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss = losses.sum() / tokens * args.world_size  # data parallelism averages what is to be added up
        log_ratio = outputs.log_probs.detach() - inputs["log_probs"]
        ratio = log_ratio.exp()
        metrics = {
            "policy/approxkl_avg": 0.5 * log_ratio**2,
            "policy/clipfrac_avg": policy.clipped,
            "policy/entropy_avg": outputs.entropies,
            "loss/policy_avg": policy.losses,
            "loss/value_avg": value.losses,
            "val/clipfrac_avg": value.clipped,
            "val/ratio": ratio,
            "val/ratio_var": ratio**2,  # less the squared mean, once that is known
        }
        self.updates.steps.add(metrics, mask)
        return (loss, outputs) if return_outputs else loss

    # The rollout as a data source.

    def get_train_dataloader(self) -> Any:
        args = self.args
        return RolloutLoader(
            len(self.prompts),
            self._collect,
            episodes=args.episodes_per_update,
            epochs=args.num_ppo_epochs,
            mini_batches=args.num_mini_batches,
            micro_size=args.per_device_train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            seed=args.seed,
            steps_done=lambda: self.state.global_step,
        )

    def set_initial_training_values(self, args: PPOConfig, dataloader: Any) -> Any:
        """Trainer's own arithmetic; `total_episodes`, where given, stands for max_steps."""
        if args.total_episodes is not None and args.max_steps <= 0:
            updates = math.ceil(args.total_episodes / args.episodes_per_update)
            args = copy.copy(args)
            args.max_steps = updates * args.steps_per_update
        return super().set_initial_training_values(args, dataloader)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The micro-batches of one optimizer step, and the number of generated tokens in them, of all processes."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        tokens = sum(int(batch["response_mask"].sum()) for batch in batches if batch)
        return batches, self._reduce(torch.tensor(float(tokens), device=device)).clamp(min=1) if batches else None

    def _collect(self, rows: list[int], first_episode: int) -> Rollout:
        """Collect this process's share of an update; `rows` are the prompts of all processes."""
        started, share = time.perf_counter(), self.args.episodes_per_process
        offset = self.args.process_index * share
        asked = self.prompts.rows(rows[offset : offset + share])
        seeds = [row_seed(self.args.seed, first_episode + offset + index) for index in range(share)]
        rollout, scores, completions = self._play(asked, seeds, self._reduce)
        metrics = self._means(rollout, scores)
        metrics["val/num_eos_tokens"] = round(metrics["completions/eos_share"] * self.args.episodes_per_update)
        metrics["val/explained_variance"] = rollout.explained_variance(self._reduce)
        metrics["episode"] = float(first_episode + self.args.episodes_per_update)
        metrics["time/rollout"] = time.perf_counter() - started
        self.updates.begin(metrics)
        self.last_samples = as_samples(asked["prompts"], completions.texts(self.processing_class), scores)
        return rollout

    def _play(
        self, asked: Mapping[str, Any], seeds: Sequence[int], reduce: Reduce
    ) -> tuple[Rollout, dict[str, list[float]], Completions]:
        completions = self.generate(asked["prompt_ids"], seeds)
        scores = self.score(asked, completions)
        weights = self.args.reward_weights or [1.0] * len(self.rewards)
        total = [sum(w * s for w, s in zip(weights, each, strict=True)) for each in zip(*scores.values(), strict=True)]
        return self._rollout(asked["prompt_ids"], completions, total, reduce), scores, completions

    def _rollout(
        self, queries: Sequence[Sequence[int]], completions: Completions, scores: Sequence[float], reduce: Reduce
    ) -> Rollout:
        args, device = self.args, self.args.device
        packed = pack_episodes(queries, completions.ids, self.processing_class.pad_token_id or 0)
        input_ids, attention_mask, mask = (tensor.to(device) for tensor in packed)
        log_probs, _, values = self._token_outputs(self.model, input_ids, attention_mask, mask)
        _, reference_log_probs, _ = self._reference_outputs(input_ids, attention_mask, mask)
        stopped = torch.tensor(completions.stopped, device=device)
        totals = torch.tensor(scores, device=device, dtype=torch.float32)
        packed = (input_ids, attention_mask, mask)
        return finish_rollout(
            packed, stopped, totals, log_probs, reference_log_probs, values, RewardShape.of(args), reduce
        )

    def _reference_outputs(self, *episodes: Tensor) -> Any:
        if self.reference is not None:
            return self._token_outputs(partial(policy_outputs, self.reference), *episodes)
        with self.model.policy.disable_adapter():
            return self._token_outputs(partial(policy_outputs, self.model.policy), *episodes)

    def _token_outputs(self, module: Any, *episodes: Tensor) -> Any:
        """In eval mode and in the precision that trains."""
        self.model.eval()
        with self.accelerator.autocast():
            return in_chunks(module, episodes, self.args.local_rollout_forward_batch_size, self.args.temperature)

    # One optimizer step.

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Trainer's step. One whose loss is not finite, on any process, changes no weight; it is counted and named."""
        if not inputs:  # a minibatch that needs fewer micro-batches than Trainer counts
            return torch.zeros((), device=self.args.device)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._not_finite |= not bool(torch.isfinite(loss))
        if self.accelerator.sync_gradients:
            if self._reduce(torch.tensor(float(self._not_finite), device=loss.device)) > 0:
                self._skipped_steps += 1
                logger.warning("optimizer step %d skipped: its loss is not finite", self.state.global_step + 1)
                model.zero_grad(set_to_none=True)  # an optimizer leaves parameters without a gradient alone
            self._not_finite = False
        return loss

    # What is logged.

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log, with the mean of each metric over the updates that ended since the last one."""
        updates = self.updates.drain() if "loss" in logs else {}
        if updates:
            logs |= updates | {"lr": logs["learning_rate"], "val/skipped_steps": float(self._skipped_steps)}
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Answer each held-out prompt once; returns means of score, KL, length and EOS share over all processes."""
        prompts = self.eval_prompts
        if eval_dataset is not None:
            config = base_model(self.model.policy).config
            prompts = Prompts(eval_dataset, self.processing_class, config, self.args.response_length, "eval_dataset")
        if prompts is None or len(prompts) < self.args.world_size:
            raise UserError("there are too few held-out prompts to evaluate on; pass eval_dataset")
        indices = range(self.args.process_index, len(prompts), self.args.world_size)
        rollout, scores, _ = self._play(
            prompts.rows(indices), [row_seed(self.args.seed + 1, row) for row in indices], alone
        )
        means = self._means(rollout, scores)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _means(self, rollout: Rollout, scores: Mapping[str, list[float]]) -> dict[str, float]:
        tally, device = Tally(), rollout.scores.device
        rewards = {f"rewards/{name}": torch.tensor(values, device=device) for name, values in scores.items()}
        tally.add(rollout.episode_metrics(self.args.kl_coef) | rewards, torch.ones_like(rollout.stopped))
        return tally.means(self._reduce)

    def _reduce(self, tensor: Tensor) -> Tensor:
        return tensor if self.args.world_size == 1 else self.accelerator.reduce(tensor, reduction="sum")

    # Saving and loading: the policy's folder is an ordinary model folder, the value lies beside it.

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = output_dir or str(self.args.output_dir)
        self.model.save_pretrained(folder, state_dict)
        self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.model.load_pretrained(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self.model.load_pretrained(self.state.best_model_checkpoint)
