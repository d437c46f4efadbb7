"""PPO on the loop of `transformers.Trainer`: a rollout is a data source, and the loss is overridden."""

import copy
import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object
from accelerate.utils.deepspeed import DummyScheduler
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, ProgressCallback, TrainerCallback
from transformers.integrations.deepspeed import deepspeed_init

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.progress import Advance, progress_bar
from rlhf_recipes.core.unwrapping import base_model
from rlhf_recipes.generation import Completions, row_seed, sample
from rlhf_recipes.models import disable_dropout_, has_adapter, hidden_size_of, token_count
from rlhf_recipes.optimizations import cached_casts, fuse_kernels_
from rlhf_recipes.ppo.config import PPOConfig
from rlhf_recipes.ppo.evaluate import HeldOutEvaluator, prompts_by_set
from rlhf_recipes.ppo.logging.callbacks import CompletionsFile, SampleTable, UpdateBoundaries, UpdateProgress
from rlhf_recipes.ppo.logging.hints import Hints
from rlhf_recipes.ppo.logging.metrics import UpdateMetrics
from rlhf_recipes.ppo.manual import accumulate, check_episodes, schedule_steps
from rlhf_recipes.ppo.parallelism import check_parallelism, prepare_distributed_
from rlhf_recipes.ppo.resume import (
    load_named_optimizer,
    load_rollout,
    needs_named_optimizer,
    process_share,
    save_rollout,
    save_sharded_optimizer,
    write_short_card,
)
from rlhf_recipes.ppo.roles.adapter import build_trainable_policy
from rlhf_recipes.ppo.roles.build import (
    build_policy_and_value,
    build_reference,
    build_sampling,
    load_policy,
)
from rlhf_recipes.ppo.roles.checks import check_prompts, evaluation_prompts
from rlhf_recipes.ppo.roles.rewards import load_rewards, unweighted_reward_names
from rlhf_recipes.ppo.roles.value import TokenOutputs
from rlhf_recipes.ppo.rollout.collect import RolloutCollector
from rlhf_recipes.ppo.rollout.rollout import Rollout, as_samples
from rlhf_recipes.ppo.rollout.timer import PhaseTimer
from rlhf_recipes.ppo.step import PieceRunner
from rlhf_recipes.ppo.update.guard import StepGuard, split_parameter_groups_
from rlhf_recipes.ppo.update.minibatches import RolloutLoader
from rlhf_recipes.ppo.update.objective import LossOptions, objective
from rlhf_recipes.scoring import RewardSource, Scores, score_with_each
from rlhf_recipes.system import (
    DeferredStepEngine,
    choose_precision,
    configure_cpu_runtime_,
    deepspeed_engine,
    exclude_frozen_weights_,
    full_state_dict,
    is_sharded,
    restore_ties_,
)
from rlhf_recipes.training import SafeTrainer


class PPOTrainer(SafeTrainer):
    """Reinforce a causal language model against rewards, with the loop, flags and callbacks of `transformers.Trainer`.

    Args:
        model: the policy, or its folder or Hub id.
        reward_funcs: a reward, or a list of rewards whose scores are summed with `args.reward_weights`. A reward is a sequence
            classifier, the folder or Hub id of one, a function ``f(prompts, completions, **columns) -> list[float]`` (plain or
            async; one number per answer, or one per token), or its name as ``package.module:function``. `reward_model` is the
            older name of this argument.
        train_dataset: rows with a `prompt` (text, messages or ids) or `input_ids`; reward functions get the other columns.
        processing_class: the policy's tokenizer.
        ref_model: the reference model of the KL penalty. By default it is the policy before training: a frozen copy of it. With
            a new adapter it is the base; with an existing adapter, the base with a frozen copy of that adapter.
        value_model: a sequence classifier with one label. None puts a value head on the policy's transformer, with its own
            adapter where the policy has one (`args.value_adapter`).
        reward_processing_classes: the tokenizers of the reward models, where they are not the policy's.
        peft_config: train an adapter on the policy instead of all its weights.
        quantization_config, reward_quantization_config: quantize the policy, or the reward models, that are given by name.

    Raises:
        UserError: a problem with data, tokenizer, rewards or options that can be known before training.
        TypeError: a value model or reward of an unsupported type.
    """

    args: PPOConfig
    control: Any
    lr_scheduler: Any
    prompts: Any
    current_rollout: Rollout | None = None  # of the update that is being trained on
    stop_at_nonfinite_loss = False  # `StepGuard` skips such a step
    advance: Advance | None = None  # moves the progress bar of the held-out answers

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
        hidden_size = hidden_size_of(config := base_model(fuse_kernels_(model, args.device)).config)
        args = choose_precision(args, hidden_size)
        configure_cpu_runtime_(args, hidden_size)
        rewards = reward_funcs if reward_funcs is not None else reward_model
        can_train = train_dataset is not None or rewards is not None  # else only step() can be called
        data = (train_dataset, eval_dataset)
        self.prompts, self.eval_prompts = check_prompts(config, processing_class, *data, args, can_train)
        came_with_adapter = peft_config is None and has_adapter(model)
        policy = build_trainable_policy(model, peft_config, args)
        policy_and_value = build_policy_and_value(policy, value_model, args, token_count(processing_class))
        reference = build_reference(policy_and_value, came_with_adapter, ref_model, args)
        tokenizers, quantization = (processing_class, reward_processing_classes), reward_quantization_config
        self.rewards = load_rewards(policy_and_value, rewards, *tokenizers, args, can_train, quantization)
        super().__init__(
            model=policy_and_value,
            args=args,
            data_collator=data_collator or list,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        prepare_distributed_(self.model, self.accelerator, args, hidden_size)
        disable_dropout_(self.model)
        self.sampling = build_sampling(model, processing_class, args)
        self.collector = RolloutCollector(self.model, reference, self.accelerator, args, PhaseTimer())
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the tokens of the whole minibatch
        sizes = (self.collector.max_tokens, self.collector.width_multiple)
        self.piece_runner = PieceRunner(self.accelerator, args.device, *sizes, not args.activation_checkpointing)
        self.guard = StepGuard(self.model, args.target_kl, args.value_warmup_updates * args.steps_per_update)
        self.loss_options = LossOptions(args.cliprange, args.cliprange_value, args.vf_coef, args.entropy_coef)
        self.update_metrics = UpdateMetrics(args.episodes_per_update)
        self.completions_file = CompletionsFile.in_folder(args.output_dir) if args.log_completions else None
        self.last_samples: list[dict[str, Any]] = []
        self._add_callbacks()

    def _add_callbacks(self) -> None:
        self.add_callback(UpdateBoundaries(self._begin_training, self._end_update))
        self.add_callback(SampleTable(lambda: self.last_samples, lambda: self.callback_handler.callbacks))
        if self.args.hints:
            self.add_callback(Hints(lambda: unweighted_reward_names(self.rewards, self.args.reward_weights)))
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(UpdateProgress)

    # What a subclass may override.

    def generate(self, queries: Sequence[Sequence[int]], seeds: Sequence[int]) -> Completions:
        """Sample answers to rows of prompt ids from the current policy; seeds: one a row."""
        with cached_casts(self.model.policy), self.accelerator.autocast():
            options = (self.sampling, seeds, self.args.local_rollout_forward_batch_size, self.advance)
            return sample(self.model.policy, queries, *options)

    def score(self, rows: Mapping[str, Any], completions: Completions) -> dict[str, Scores]:
        """Score answers with each reward: a number per answer, or a list with one per token. rows: from `Prompts.rows`."""
        texts = completions.texts(self.processing_class, rows["prompt_ids"])
        ids = {"prompt_ids": rows["prompt_ids"], "completion_ids": completions.ids}
        return score_with_each(self.rewards, rows["prompts"], texts, **ids, columns=rows["columns"])

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the PPO loss of one micro-batch: its share of the mean over the tokens of the minibatch."""
        mask = inputs["response_mask"]
        lower = {"lower_states": inputs["lower_states"]} if "lower_states" in inputs else {}
        options = {"temperature": self.args.temperature, "entropy_gradient": self.args.entropy_coef != 0}
        outputs: TokenOutputs = model(inputs["input_ids"], inputs["attention_mask"], mask, **options, **lower)
        if "baseline" in inputs:
            outputs = outputs._replace(values=outputs.values + inputs["baseline"])
        loss, metrics = objective(*outputs, inputs, self.loss_options, num_items_in_batch, self.args.world_size)
        self.update_metrics.steps.add(metrics, mask & torch.isfinite(loss.detach()))
        self.guard.record_divergence(metrics["policy/approxkl_avg"], mask)
        return (loss, outputs) if return_outputs else loss

    # The rollout as a data source.

    def get_train_dataloader(self) -> Any:
        if self.prompts is None or not self.rewards:
            raise UserError("train() needs train_dataset and reward_funcs; without them only step() can be called")
        return self.rollout_loader()

    def rollout_loader(self) -> RolloutLoader:
        """Return the loader that collects rollouts while training goes on."""
        return RolloutLoader.of(
            self.args,
            len(self.prompts or ()),
            self._collect,
            steps_done=lambda: self.state.global_step,
            ended=lambda: self.guard.over,
        )

    def set_initial_training_values(self, args: PPOConfig, dataloader: Any) -> Any:
        """Compute the length of the run as `Trainer` does; without max_steps, total_episodes sets it."""
        if args.total_episodes is not None and args.max_steps <= 0:
            updates = math.ceil(args.total_episodes / args.episodes_per_update)
            args = copy.copy(args)
            args.max_steps = updates * args.steps_per_update
        return super().set_initial_training_values(args, dataloader)

    def _collect(self, rows: list[int], first_episode: int) -> Rollout:
        """Collect this process's share of an update; `rows` are the prompts of all processes."""
        if self.current_rollout is not None:  # from a checkpoint in the middle of an update
            return self.current_rollout
        args, count = self.args, self.args.episodes_per_process
        update = first_episode // args.episodes_per_update
        offset = args.process_index * count
        prompts = self.prompts.rows(rows[offset : offset + count])
        seeds = [row_seed(args.seed, first_episode + offset + index) for index in range(count)]
        completions, scores = self.collector.answer(prompts, seeds, self.generate, self.score)
        rollout = self._begin_update(update, prompts["prompt_ids"], completions, scores, args.reward_weights)
        self.last_samples = as_samples(prompts, scores, completions, self.processing_class)
        if self.completions_file is not None:
            samples = gather_object(self.last_samples) if args.world_size > 1 else self.last_samples
            if args.should_save:
                self.completions_file.add(update, samples)
        return rollout

    # One update.

    def _begin_training(self) -> None:
        self.current_rollout = None
        if self.completions_file is not None and self.args.should_save:
            self.completions_file.begin(math.ceil(self.state.global_step / self.args.steps_per_update))

    def _begin_update(self, number: int, queries: Any, completions: Completions, scores: Any, weights: Any) -> Rollout:
        with self.collector.timer.time("forward"):
            rollout = self.collector.build_rollout(queries, completions, scores, weights, self.reduce)
        metrics = self.collector.metrics(rollout, scores, self.reduce)
        metrics["val/num_eos_tokens"] = round(metrics["completions/eos_share"] * self.args.episodes_per_update)
        metrics["val/explained_variance"] = rollout.explained_variance(self.reduce)
        metrics["episode"] = float((number + 1) * self.args.episodes_per_update)
        seconds = self.collector.timer.read()
        self.update_metrics.begin(metrics | seconds | {"time/rollout": sum(seconds.values())})
        self.current_rollout, self.guard.over = rollout, False
        return rollout

    def _end_update(self) -> None:
        metrics = self.update_metrics.end(self.reduce)
        if self.state.global_step % self.args.steps_per_update == 0:  # and not stopped in the middle of an update
            self.collector.kl_coef.update(metrics["objective/kl"], self.args.episodes_per_update)
            self.current_rollout = None

    # One optimizer step.

    def create_optimizer(self, model: Any = None) -> Any:
        """Create the optimizer as `Trainer` does; with `value_learning_rate` the value gets its own parameter group."""
        given_by_caller = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if not given_by_caller and self.args.value_learning_rate is not None:
            split_parameter_groups_(optimizer, self.model.value_parameters(), self.args.value_learning_rate)
        return optimizer

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Create the schedule; under DeepSpeed with an adapter, also exclude frozen weights from checkpoints.

        It is the last call of `Trainer` before the engine loads a checkpoint.
        """
        engine = deepspeed_engine(self.accelerator)
        if engine is not None and has_adapter(self.model.policy):
            exclude_frozen_weights_(engine)
        return super().create_scheduler(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """Return the micro-batches of one optimizer step, and the number of their generated tokens over all processes."""
        batches = list(islice(epoch_iterator, num_batches))
        if not batches:
            return [], None
        tokens = sum(int(batch["response_mask"].sum()) for batch in batches if batch)
        return batches, self.reduce(torch.tensor(float(tokens), device=device)).clamp(min=1)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Run a micro-batch piece by piece; after the last micro-batch of a step, `StepGuard` drops unusable gradients."""
        step = partial(super().training_step, model, num_items_in_batch=num_items_in_batch)
        losses = self.piece_runner.run(model, inputs, self.current_rollout, step)
        total = torch.zeros((), device=self.args.device)
        for loss in losses:
            self.guard.record_loss(loss)
            total = total + loss
        if self.accelerator.sync_gradients:
            self.piece_runner.release_casts()
            self._guard_step(has_episodes=bool(inputs))
        return total

    def _guard_step(self, has_episodes: bool) -> None:
        """Drop gradients that must not be used. has_episodes: False in an update that is over."""
        used, skipped = False, self.guard.skipped
        if has_episodes:
            used = self.guard.drop_gradients_(self.state.global_step, self.reduce, self.args.device)
        engine = DeferredStepEngine.install_(self.accelerator)
        if engine is not None:
            engine.step() if used else engine.skip_step()
        if self.guard.skipped > skipped:
            self.require_finite_weights()  # otherwise every later step would be skipped too

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the inputs: they are on the device, in float32. `Trainer` would cast them to DeepSpeed's precision."""
        return inputs

    # One update on the caller's episodes.

    def step(
        self, queries: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], scores: Scores
    ) -> dict[str, float]:
        """Train one update on episodes of the caller, for a loop of one's own, as TRL had up to 0.11.

        Args:
            queries, responses: this process's token ids, lists or tensors, `args.episodes_per_process` of them. A response
                includes its stop token.
            scores: a number for each response, or one per token.

        Returns:
            The metrics of the update.

        Raises:
            UserError: another number of episodes.
        """
        query_ids, response_ids = check_episodes(queries, responses, scores, self.args.episodes_per_process)
        stopped = [bool(row) and row[-1] in self.sampling.stop_ids for row in response_ids]
        named = {"step": [value if isinstance(value, list) else float(value) for value in scores]}
        number = self.state.global_step // self.args.steps_per_update
        rollout = self._begin_update(number, query_ids, Completions(response_ids, stopped), named, None)
        if not isinstance(self.optimizer, AcceleratedOptimizer) or self.lr_scheduler is None:
            self._prepare_for_steps()
        model, args = self.model_wrapped, self.args
        model.train()
        for batches in self.rollout_loader().optimizer_steps(rollout, number):
            _, tokens = self.get_batch_samples(iter(batches), len(batches), args.device)
            accumulate(model, self.accelerator, batches, partial(self.training_step, num_items_in_batch=tokens))
            if args.max_grad_norm > 0:
                self.accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            self.optimizer.step()
            self.lr_scheduler.step()
            model.zero_grad()
            self.state.global_step += 1
        self._end_update()
        return self.update_metrics.drain()

    def _prepare_for_steps(self) -> None:
        """Make optimizer, schedule and wrapper for a loop of `step`.

        Raises:
            UserError: the schedule needs to know the number of steps, and no option says it.
        """
        args, steps = self.args, schedule_steps(self.args, self.lr_scheduler is not None)
        if args.activation_checkpointing:
            options = dict(args.activation_checkpointing_kwargs or {})
            self.model.activation_checkpointing_enable(activation_checkpointing_kwargs=options or None)
        self.model.to(args.device)
        if self.is_deepspeed_enabled:
            self.optimizer, self.lr_scheduler = deepspeed_init(self, num_training_steps=steps)
        else:
            self.create_optimizer()
        if isinstance(self.lr_scheduler, DummyScheduler):  # DeepSpeed's configuration defines optimizer and schedule
            prepared = self.accelerator.prepare(self.model, self.optimizer, self.lr_scheduler)
            self.model_wrapped, self.optimizer, self.lr_scheduler = prepared
        else:
            self.model_wrapped, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.create_scheduler(num_training_steps=steps)  # if there is none yet
        if self.is_deepspeed_enabled:
            self.deepspeed = self.model_wrapped  # which Trainer saves
        torch.manual_seed(args.seed)

    # Logging and evaluation.

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as `Trainer` does, with the mean of each metric over the updates that ended since the last line."""
        updates = self.update_metrics.drain() if "loss" in logs else {}
        if updates:
            logs |= updates | {"lr": logs["learning_rate"], "val/skipped_steps": float(self.guard.skipped)}
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Answer each held-out prompt once; return means of score, KL, length and EOS share over all processes.

        Several sets are given as a dict; metrics then have the name of the set: ``eval_<name>_objective/scores``.
        """
        prompts = self.eval_prompts
        if eval_dataset is not None:
            config = base_model(self.model.policy).config
            prompts = evaluation_prompts(config, self.processing_class, eval_dataset, self.args)
        evaluator = HeldOutEvaluator(self.collector, self.generate, self.score, self.args)
        metrics, shown = dict[str, float](), self.is_world_process_zero() and not self.args.disable_tqdm
        for name, each in prompts_by_set(prompts).items():
            prefix = f"{metric_key_prefix}_{name}" if name else metric_key_prefix
            tokens = len(each or ()) // self.args.world_size * self.args.response_length
            with progress_bar(tokens, "held-out answers", "token", shown) as self.advance:
                means = {f"{prefix}_{key}": value for key, value in evaluator.metrics(each, self.reduce).items()}
            self.advance = None
            self.log(dict(means))
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, means)
            metrics |= means
        return metrics

    def generate_completions(self, sampling: bool = False) -> list[dict[str, Any]]:
        """Answer the held-out prompts, print some and return all. sampling: answer the first eight only (TRL's name)."""
        evaluator = HeldOutEvaluator(self.collector, self.generate, self.score, self.args)
        sets = list(prompts_by_set(self.eval_prompts).values())
        samples = evaluator.samples(sets, self.processing_class, 8 if sampling else None)
        if self.is_world_process_zero():
            print("\n".join(f"{row['prompt']} -> {row['completion']}" for row in samples[:8]))
        return samples

    # What a checkpoint holds.

    def progress(self) -> dict[str, Any]:
        return super().progress() | {
            "updates": self.update_metrics.state(),
            "collector": self.collector.state(),
            "guard": self.guard.state(),
            "samples": self.last_samples,
        }

    def save_progress(self, folder: Path) -> None:
        super().save_progress(folder)
        if self.current_rollout is not None:
            save_rollout(self.current_rollout, folder, self.args.process_index)

    def load_progress(self, folder: Path) -> list[dict[str, Any]]:
        saved = super().load_progress(folder)
        if not saved or "updates" not in saved[0]:
            return saved  # a checkpoint with weights only
        process, world_size = self.args.process_index, self.args.world_size
        same_world_size = len(saved) == world_size
        updates = [saved[process]["updates"]] if same_world_size else [each["updates"] for each in saved]
        self.update_metrics.restore(updates, self.args.device, include_sums=same_world_size or process == 0)
        self.collector.restore(saved[0]["collector"])  # the same in every process
        self.guard.restore(saved[0]["guard"])
        self.last_samples = process_share([row for each in saved for row in each["samples"]], process, world_size)
        self.current_rollout = load_rollout(folder, process, world_size, same_world_size, self.args.device)
        return saved

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if state_dict is not None:
            state_dict = restore_ties_(self.model, state_dict)
        elif is_sharded(self.model):
            state_dict = full_state_dict(self.model)
        if not self.args.should_save:  # Trainer calls this in every process
            return
        folder = Path(output_dir or str(self.args.output_dir))
        in_checkpoint = folder.name.startswith("checkpoint-")
        self.model.save_pretrained(folder, state_dict, value=self.args.save_value_model or in_checkpoint)
        self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.model.load_pretrained(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self.model.load_pretrained(self.state.best_model_checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if is_sharded(self.model):
            optimizer, writes = self.optimizer.optimizer, self.args.should_save
            save_sharded_optimizer(self.model, optimizer, self.lr_scheduler, Path(output_dir), writes)
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and needs_named_optimizer(self.model, checkpoint):
            load_named_optimizer(self.model, self.optimizer.optimizer, self.lr_scheduler, Path(checkpoint))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)

    def create_model_card(self, *args: Any, dataset_name: str | None = None, **kwargs: Any) -> None:
        if self.args.should_save:
            base = base_model(self.model.policy).name_or_path
            write_short_card(Path(str(self.args.output_dir)), base, dataset_name)
