"""The knobs of PPO, under the names and with the defaults that TRL's last PPOConfig had."""

from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import TrainingArguments

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.training import TrainingDefaults

SAMPLING = ("top_k", "top_p", "min_p", "min_new_tokens")  # what generation_kwargs may say


@dataclass
class PPOConfig(TrainingDefaults, TrainingArguments):
    """Arguments of `PPOTrainer`.

    An update collects ``per_device_train_batch_size x gradient_accumulation_steps x processes`` episodes, and takes
    ``num_ppo_epochs x num_mini_batches`` optimizer steps on them. ``global_step``, and with it ``max_steps``,
    ``logging_steps``, ``save_steps`` and ``eval_steps``, counts optimizer steps.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "generation_kwargs"]

    learning_rate: float = field(default=3e-6, metadata={"help": "Initial learning rate."})
    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over the episodes of each update."})
    num_mini_batches: int = field(default=1, metadata={"help": "Optimizer steps in one pass."})
    total_episodes: int | None = field(
        default=None,
        metadata={"help": "Train on so many episodes, rounded up to whole updates; unset: num_train_epochs."},
    )
    response_length: int = field(default=53, metadata={"help": "Longest answer in tokens."})
    stop_token: Literal["eos"] | None = field(
        default=None,
        metadata={"help": "'eos': stop at the tokenizer's EOS. Unset: at every EOS of the generation config."},
    )
    stop_token_id: int | None = field(default=None, metadata={"help": "Stop at this token id instead."})
    temperature: float = field(
        default=0.7, metadata={"help": "Sampling temperature; log-probabilities are taken at it too."}
    )
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Subtract this from the score of an answer that no stop token ended."}
    )
    kl_coef: float = field(
        default=0.05, metadata={"help": "Weight of the per-token KL penalty towards the reference."}
    )
    kl_estimator: Literal["k1", "k3"] = field(default="k1", metadata={"help": "Estimator of that KL (Schulman 2020)."})
    cliprange: float = field(default=0.2, metadata={"help": "Clip range of the probability ratio."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    cliprange_value: float = field(default=0.2, metadata={"help": "Clip range of the value."})
    gamma: float = field(default=1.0, metadata={"help": "Discount factor."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of generalised advantage estimation."})
    whiten_rewards: bool = field(default=False, metadata={"help": "Scale token rewards to unit variance."})
    reward_weights: list[float] | None = field(
        default=None,
        metadata={"help": "Weight of each reward, 1 if unset; a reward of weight 0 is logged and not learnt from."},
    )
    normalize_rewards: bool = field(
        default=False,
        metadata={
            "help": "Shift and scale each reward model's scores to mean 0 and variance 1 over its own held-out rows."
        },
    )
    reward_clip_range: list[float] | None = field(
        default=None, metadata={"help": "Two numbers: an answer's score is held between them, after any scaling."}
    )
    use_score_scaling: bool = field(
        default=False, metadata={"help": "Divide scores by their running standard deviation over the whole run."}
    )
    use_score_norm: bool = field(
        default=False, metadata={"help": "With use_score_scaling: subtract their running mean as well."}
    )
    entropy_coef: float = field(default=0.0, metadata={"help": "Weight of an entropy bonus in the loss."})
    target_kl: float | None = field(
        default=None,
        metadata={
            "help": "End an update at the optimizer step whose approximate KL to the rollout's policy is above 1.5 "
            "times this."
        },
    )
    adaptive_kl_target: float | None = field(
        default=None,
        metadata={"help": "Steer kl_coef so that the KL to the reference comes to so many nats an answer."},
    )
    adaptive_kl_horizon: int = field(
        default=10_000, metadata={"help": "Episodes in which a KL twice its target about raises kl_coef by a fifth."}
    )
    value_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the value; unset: learning_rate."}
    )
    value_warmup_updates: int = field(
        default=0, metadata={"help": "First updates in which the value learns and the policy stands still."}
    )
    value_adapter: bool = field(
        default=True,
        metadata={
            "help": "With an adapter policy and no value model: give the value an adapter of its own on the same base. "
            "False: a head on the policy's."
        },
    )
    value_prior: bool = field(
        default=True,
        metadata={
            "help": "Where a value head is learnt: start it from what the reward models read of the unfinished answer, as far as "
            "that tells the score. Costs nothing; no effect without a reward model that reads the policy's ids."
        },
    )
    num_layers_unfrozen: int | None = field(
        default=None,
        metadata={
            "help": "Let only so many of the policy's upper layers learn. Those below run once an update, for policy, "
            "reference and value together. Unset: all layers learn."
        },
    )
    save_value_model: bool = field(
        default=True, metadata={"help": "Leave the value beside the policy, in value_model/."}
    )
    generation_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "How answers are sampled: top_k, top_p, min_p, min_new_tokens. JSON on the command line."},
    )
    log_completions: bool = field(
        default=True, metadata={"help": "Append the answers of each update to completions.jsonl in output_dir."}
    )
    hints: bool = field(
        default=True, metadata={"help": "Say in one line what may be wrong when a metric leaves its healthy range."}
    )
    local_rollout_forward_batch_size: int = field(
        default=64, metadata={"help": "Rows per forward pass without gradient."}
    )
    num_sample_generations: int = field(
        default=10, metadata={"help": "How many times in a run sample answers are logged."}
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "For scripts that tokenize by themselves; here one process does."}
    )
    sft_model_path: str | None = field(
        default=None, metadata={"help": "The supervised model, for scripts that load it."}
    )
    reward_model_path: str | None = field(
        default=None, metadata={"help": "The reward model, for scripts that load it."}
    )
    model_adapter_name: str | None = field(default=None, metadata={"help": "Name of the adapter that is trained."})
    ref_adapter_name: str | None = field(default=None, metadata={"help": "Name of the adapter that is the reference."})
    ds3_gather_for_generation: bool = field(
        default=True, metadata={"help": "Taken for scripts of TRL's; without effect."}
    )
    # A rollout cannot be skipped like a batch of rows; the loader goes on from global_step by itself.
    ignore_data_skip: bool = field(
        default=True, metadata={"help": "Leave it on: rollouts resume by the step counter."}
    )
    logging_first_step: bool = field(
        default=False, metadata={"help": "Log the first step; the first update is anyway."}
    )
    save_total_limit: int | None = field(default=None, metadata={"help": "Checkpoints kept; unset: all."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Columns reach the reward functions."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choices()
        self._check_ranges()

    def _check_choices(self) -> None:
        for name, choices in {"kl_estimator": ("k1", "k3"), "stop_token": ("eos", None)}.items():
            if getattr(self, name) not in choices:
                raise UserError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(map(str, choices))}")
        if self.stop_token is not None and self.stop_token_id is not None:
            raise UserError("stop_token and stop_token_id say the same thing; set one of them")

    def _check_ranges(self) -> None:
        if self.fp16:
            raise UserError("fp16 is on; PPOTrainer drops gradients where its loss scaler expects some: take bf16")
        if not self.ignore_data_skip:
            raise UserError("ignore_data_skip is false; rollouts cannot be skipped like rows: leave it on")
        for name in ("num_ppo_epochs", "num_mini_batches", "response_length", "local_rollout_forward_batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.temperature <= 0:
            raise UserError(
                f"temperature is {self.temperature}; it must be above 0, since PPO learns from what it samples"
            )
        episodes = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if episodes % self.num_mini_batches:
            raise UserError(
                f"per_device_train_batch_size x gradient_accumulation_steps = {episodes} episodes do not divide into "
                f"num_mini_batches = {self.num_mini_batches}; change one of the three"
            )
        if self.total_episodes is not None and self.total_episodes < 1:
            raise UserError(f"total_episodes is {self.total_episodes}; it must be at least 1")
        for name in ("target_kl", "adaptive_kl_target", "value_learning_rate"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be above 0, or left out")
        if self.reward_clip_range is not None and (
            len(self.reward_clip_range) != 2 or self.reward_clip_range[0] >= self.reward_clip_range[1]
        ):
            raise UserError(f"reward_clip_range is {self.reward_clip_range}; give the lower and the upper bound")
        if self.value_warmup_updates < 0:
            raise UserError(f"value_warmup_updates is {self.value_warmup_updates}; it must be at least 0")
        if self.use_score_norm and not self.use_score_scaling:
            raise UserError("use_score_norm needs use_score_scaling; set both, or neither")
        unknown = set(self.generation_kwargs or {}) - set(SAMPLING)
        if unknown:
            raise UserError(
                f"generation_kwargs does not know {', '.join(sorted(unknown))}; it knows {', '.join(SAMPLING)}: for "
                "more, subclass PPOTrainer and override generate"
            )

    @property
    def episodes_per_process(self) -> int:
        """Episodes that one process collects for an update."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def episodes_per_update(self) -> int:
        """Episodes of all processes in one update."""
        return self.episodes_per_process * self.world_size

    @property
    def steps_per_update(self) -> int:
        """Optimizer steps on the episodes of one update."""
        return self.num_ppo_epochs * self.num_mini_batches
