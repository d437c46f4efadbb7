"""PPO on Trainer's own loop: a rollout is a data source, and the loss is the only other thing that differs."""

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, ProgressCallback, TrainerCallback

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.unwrapping import base_model
from rlhf_recipes.generation import Completions, row_seed, sample
from rlhf_recipes.models import has_adapter
from rlhf_recipes.optimizations import cached_casts, fuse_kernels_
from rlhf_recipes.ppo.config import PPOConfig
from rlhf_recipes.ppo.evaluate import evaluate_prompts, show_completions
from rlhf_recipes.ppo.logging.callbacks import Answers, SampleTable, UpdateBoundaries, UpdateProgress
from rlhf_recipes.ppo.logging.hints import Hints
from rlhf_recipes.ppo.logging.metrics import Clock, UpdateMetrics
from rlhf_recipes.ppo.manual import checked_episodes, take_update
from rlhf_recipes.ppo.parallelism import check_parallelism, settle
from rlhf_recipes.ppo.roles.adapter import build_trainable_policy
from rlhf_recipes.ppo.roles.build import (
    build_policy_and_value,
    build_reference,
    build_sampling,
    check_prompts,
    disable_dropout_,
    evaluation_prompts,
    load_policy,
    load_rewards,
    unweighted_reward_names,
)
from rlhf_recipes.ppo.roles.value import TokenOutputs
from rlhf_recipes.ppo.rollout.collect import RolloutCollector
from rlhf_recipes.ppo.rollout.rollout import Rollout, as_samples
from rlhf_recipes.ppo.step import MinimizingTrainer
from rlhf_recipes.ppo.update.guard import StepGuard
from rlhf_recipes.ppo.update.minibatches import RolloutLoader
from rlhf_recipes.ppo.update.objective import objective
from rlhf_recipes.scoring import RewardSource, Scores, score_with_each
from rlhf_recipes.system import choose_precision, configure_cpu_runtime_, is_sharded, unsharded_weights


class PPOTrainer(MinimizingTrainer):
    """Reinforce a causal language model against rewards, with `transformers.Trainer`'s loop, flags and callbacks.

    Args:
        model: the policy, or the folder or Hub id of one.
        reward_funcs: what scores an answer, or a list whose scores are added up by `args.reward_weights`: a sequence
            classifier, the path of one, a function ``f(prompts, completions, **columns) -> list[float]`` (plain or
            async, of answers or of tokens), or its name as ``package.module:function``. `reward_model` is the older
            name of the same argument.
        train_dataset: rows with a `prompt` (text, messages or ids) or `input_ids`; other columns reach the functions.
        processing_class: the policy's tokenizer.
        ref_model: what the KL penalty holds the policy near; by default the policy as it arrived: a frozen copy, its
            base where the adapter is new, or a frozen twin of the adapter that it arrived with.
        value_model: a sequence classifier with one label; None puts a value head on the policy's own trunk, with an
            adapter of its own where the policy has one (`args.value_adapter`).
        reward_processing_classes: the reward models' tokenizers, where they are not the policy's.
        peft_config: train an adapter on the policy instead of all its weights.
        quantization_config, reward_quantization_config: read the policy, or the reward models, in 8 or 4 bits where a name is given.

    Raises:
        UserError: anything about data, tokenizer, reward model or arithmetic that can be known before training.
        TypeError: a value model or reward of a kind that cannot serve.
    """

    control: Any
    prompts: Any
    _met = False

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
        reward_quantization_config: Any = None,
    ) -> None:
        args = args or PPOConfig(output_dir="ppo")
        check_parallelism(args, getattr(args.distributed_state, "distributed_type", None))
        model, processing_class = load_policy(model, processing_class, quantization_config, args.trust_remote_code)
        config = base_model(fuse_kernels_(model, args.device)).config
        hidden_size = config.get_text_config().hidden_size
        args = choose_precision(args, hidden_size)
        configure_cpu_runtime_(args, hidden_size)
        sources = reward_funcs if reward_funcs is not None else reward_model
        plays = train_dataset is not None or sources is not None  # neither: the caller plays, and calls step()
        data = (train_dataset, eval_dataset)
        self.prompts, self.eval_prompts = check_prompts(config, processing_class, *data, args, plays)
        arrived = peft_config is None and has_adapter(model)
        both = build_policy_and_value(build_trainable_policy(model, peft_config, args), value_model, args)
        reference = build_reference(both, arrived, ref_model, args)
        reward_models = (sources, processing_class, reward_processing_classes)
        self.rewards = load_rewards(both.policy, *reward_models, args, plays, reward_quantization_config)
        super().__init__(
            model=both,
            args=args,
            data_collator=data_collator or list,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        settle(self, config.get_text_config().hidden_size)
        self.add_callback(UpdateBoundaries(self.begin, self._end_update))
        self.add_callback(SampleTable(lambda: self.last_samples, lambda: self.callback_handler.callbacks))
        if args.hints:
            self.add_callback(Hints(lambda: unweighted_reward_names(self.rewards, args.reward_weights)))
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(UpdateProgress)
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the tokens of the whole minibatch
        disable_dropout_(self.model)
        self.sampling = build_sampling(model, processing_class, args)
        self.experience = RolloutCollector(self.model, reference, self.accelerator, args, self.rewards)
        self.guard, self.clock = StepGuard(self.model, args), Clock()
        self.updates = UpdateMetrics(args.episodes_per_update)
        self.answers = Answers(Path(str(args.output_dir)) / "completions.jsonl") if args.log_completions else None
        self.last_samples: list[dict[str, Any]] = []
        self.underway: Rollout | None = None  # the rollout of the update that is being learnt from

    # What a subclass may replace.

    def generate(self, queries: Sequence[Sequence[int]], seeds: Sequence[int]) -> Completions:
        """Answer rows of prompt ids with the current policy; seeds: one a row."""
        with cached_casts(self.model.policy), self.accelerator.autocast():
            return sample(self.model.policy, queries, self.sampling, seeds, self.args.local_rollout_forward_batch_size)

    def score(self, rows: Mapping[str, Any], completions: Completions) -> dict[str, Scores]:
        """Score answers by each reward: a number an answer, or a list of one a token. rows: what `Prompts.rows` gives."""
        texts = completions.texts(self.processing_class)
        asked = {"prompt_ids": rows["prompt_ids"], "completion_ids": completions.ids, "columns": rows["columns"]}
        return score_with_each(self.rewards, rows["prompts"], texts, **asked)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The PPO loss of one micro-batch: its share of the mean over the tokens of the minibatch."""
        args, mask = self.args, inputs["response_mask"]
        lower = {"lower_states": inputs["lower_states"]} if "lower_states" in inputs else {}
        shape = {"temperature": args.temperature, "entropy_gradient": args.entropy_coef != 0}
        outputs: TokenOutputs = model(inputs["input_ids"], inputs["attention_mask"], mask, **shape, **lower)
        if "prior" in inputs:
            outputs = outputs._replace(values=outputs.values + inputs["prior"])
        loss, metrics = objective(outputs, inputs, args, num_items_in_batch)
        self.updates.steps.add(metrics, mask & torch.isfinite(loss.detach()))
        self.guard.saw_divergence(metrics["policy/approxkl_avg"], mask)
        return (loss, outputs) if return_outputs else loss

    def step(
        self, queries: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], scores: Scores
    ) -> dict[str, float]:
        """One training update on episodes that the caller played: for a loop of one's own, as TRL had up to 0.11.

        queries, responses: this process's token ids, lists or tensors, a response's stop token included; scores: what
        each earned. There must be `args.episodes_per_process` of them. Returns the metrics of the update.

        Raises:
            UserError: another number of episodes.
        """
        ids = checked_episodes(queries, responses, scores, self.args.episodes_per_process)
        stopped = [bool(row) and row[-1] in self.sampling.stop_ids for row in ids[1]]
        given = {"step": [value if isinstance(value, list) else float(value) for value in scores]}
        number = self.state.global_step // self.args.steps_per_update
        rollout = self._begin_update(number, ids[0], Completions(ids[1], stopped), given, None)
        take_update(self, rollout, number)
        self._end_update()
        return self.updates.drain()

    # The rollout as a data source.

    def get_train_dataloader(self) -> Any:
        if self.prompts is None or not self.rewards:
            raise UserError("train() needs train_dataset and reward_funcs; without them there is step() alone")
        return self.rollouts()

    def rollouts(self) -> RolloutLoader:
        """The loader that collects rollouts as training goes on."""
        return RolloutLoader.of(
            self.args,
            len(self.prompts or ()),
            self._collect,
            steps_done=lambda: self.state.global_step,
            ended=lambda: self.guard.over,
        )

    def set_initial_training_values(self, args: PPOConfig, dataloader: Any) -> Any:
        """Trainer's own arithmetic; `total_episodes`, where given, stands for max_steps."""
        if args.total_episodes is not None and args.max_steps <= 0:
            updates = math.ceil(args.total_episodes / args.episodes_per_update)
            args = copy.copy(args)
            args.max_steps = updates * args.steps_per_update
        return super().set_initial_training_values(args, dataloader)

    def _collect(self, rows: list[int], first_episode: int) -> Rollout:
        """Collect this process's share of an update; `rows` are the prompts of all processes."""
        if self.underway is not None:  # out of a checkpoint in the middle of an update
            return self.underway
        args, share, number = self.args, self.args.episodes_per_process, first_episode // self.args.episodes_per_update
        offset = args.process_index * share
        asked = self.prompts.rows(rows[offset : offset + share])
        seeds = [row_seed(args.seed, first_episode + offset + index) for index in range(share)]
        completions, scores = self.answer(asked, seeds)
        rollout = self._begin_update(number, asked["prompt_ids"], completions, scores, args.reward_weights)
        texts = completions.texts(self.processing_class)
        self.last_samples = as_samples(asked["prompts"], texts, scores, completions)
        if self.answers is not None:
            everyone = gather_object(self.last_samples) if args.world_size > 1 else self.last_samples
            if args.should_save:
                self.answers.add(number, everyone)
        return rollout

    def answer(self, asked: Mapping[str, Any], seeds: Sequence[int]) -> tuple[Completions, dict[str, Scores]]:
        """Generate and score. asked: what `Prompts.rows` gives; seeds: one a row."""
        self.meet()
        self.experience.prior.forget()
        with unsharded_weights(self.model, self.accelerator):
            with self.clock.time("generate"):
                completions = self.generate(asked["prompt_ids"], seeds)
            with self.clock.time("score"):
                return completions, self.score(asked, completions)

    @torch.no_grad()
    def meet(self) -> None:
        """Sharded weights want the whole module to be run before any part of it: once, on an episode of two tokens."""
        if self._met or not is_sharded(self.model):
            return
        self._met = True
        ids = torch.zeros(1, 2, dtype=torch.long, device=self.args.device)
        self.model(ids, torch.ones_like(ids), torch.ones(1, 1, dtype=torch.bool, device=self.args.device))

    def _begin_update(self, number: int, queries: Any, completions: Completions, scores: Any, weights: Any) -> Rollout:
        with self.clock.time("forward"):
            rollout = self.experience.rollout(queries, completions, scores, weights, self.reduce)
        metrics = self.experience.metrics(rollout, scores, self.reduce)
        metrics["val/num_eos_tokens"] = round(metrics["completions/eos_share"] * self.args.episodes_per_update)
        metrics["val/explained_variance"] = rollout.explained_variance(self.reduce)
        metrics["episode"] = float((number + 1) * self.args.episodes_per_update)
        seconds = self.clock.read()
        self.updates.begin(metrics | seconds | {"time/rollout": sum(seconds.values())})
        self.underway, self.guard.over = rollout, False
        return rollout

    def _end_update(self) -> None:
        ended = self.updates.end(self.reduce)
        if self.state.global_step % self.args.steps_per_update == 0:  # and not stopped in its middle
            self.experience.kl_coef.update(ended["objective/kl"], self.args.episodes_per_update)
            self.underway = None

    # What is logged.

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log, with the mean of each metric over the updates that ended since the last one."""
        updates = self.updates.drain() if "loss" in logs else {}
        if updates:
            logs |= updates | {"lr": logs["learning_rate"], "val/skipped_steps": float(self.guard.skipped)}
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Answer each held-out prompt once; returns means of score, KL, length and EOS share over all processes.

        Of several held-out sets, given as a dict, each has its name in the metrics: ``eval_<name>_objective/scores``.
        """
        prompts, config = self.eval_prompts, base_model(self.model.policy).config
        if eval_dataset is not None:
            prompts = evaluation_prompts(config, self.processing_class, eval_dataset, self.args)
        sets = prompts if isinstance(prompts, dict) else {"": prompts}
        metrics: dict[str, float] = {}
        for name, each in sets.items():
            metrics |= evaluate_prompts(self, each, f"{metric_key_prefix}_{name}" if name else metric_key_prefix)
        return metrics

    def generate_completions(self, sampling: bool = False) -> list[dict[str, Any]]:
        """Answer the held-out prompts, show some and return all; `sampling`: a few prompts are enough. TRL's name."""
        return show_completions(self, 8 if sampling else None)

    def reduce(self, tensor: Tensor) -> Tensor:
        """Sum over all processes."""
        return tensor if self.args.world_size == 1 else self.accelerator.reduce(tensor, reduction="sum")
