"""The options of PPO, with the names and defaults of TRL's last PPOConfig."""

from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import TrainingArguments

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.training import TrainingDefaults, learning_rate_field

LOADER_OPTIONS = (
    "dataloader_num_workers", "dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_in_order",
    "dataloader_multiprocessing_context", "dataloader_drop_last",
)  # fmt: skip
SAMPLING = ("top_k", "top_p", "min_p", "min_new_tokens")  # the keys of generation_kwargs


@dataclass
class PPOConfig(TrainingDefaults, TrainingArguments):
    """Arguments of `PPOTrainer`.

    An update collects ``per_device_train_batch_size x gradient_accumulation_steps x processes`` episodes, and takes
    ``num_ppo_epochs x num_mini_batches`` optimizer steps on them. ``global_step``, and with it ``max_steps``,
    ``logging_steps``, ``save_steps`` and ``eval_steps``, counts optimizer steps.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "generation_kwargs"]

    best_metric = "eval_objective/scores"
    usual_learning_rate = 3e-6
    unsupported = {
        "dataset_num_proc": "is for scripts that tokenize themselves; prompts are tokenized as they are used",
        "sft_model_path": "is for scripts that load the model themselves; use --model_name_or_path",
        "reward_model_path": "is for scripts that load the model themselves; use --reward",
        "ds3_gather_for_generation": "has no effect: weights are always gathered for rollouts",
        "label_smoothing_factor": "has no effect: PPO has no labels",
        "train_sampling_strategy": "has no effect: each update takes the next prompts of a shuffled epoch",
        "remove_unused_columns": "has no effect: reward functions receive every column",
        "debug": "does not fit PPO, whose masks are not numbers; leave it out",
        "neftune_noise_alpha": "does not fit PPO: the noise would change the probabilities that are compared",
    } | dict.fromkeys(LOADER_OPTIONS, "has no effect: rollouts are made in the training process")

    learning_rate: float | None = learning_rate_field(3e-6)
    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over the episodes of each update."})
    num_mini_batches: int = field(default=1, metadata={"help": "Optimizer steps in one pass."})
    total_episodes: int | None = field(
        default=None,
        metadata={"help": "Number of episodes, rounded up to complete updates; unset: num_train_epochs."},
    )
    response_length: int = field(default=53, metadata={"help": "Longest answer in tokens."})
    stop_token: Literal["eos"] | None = field(
        default=None,
        metadata={"help": "'eos': stop at the tokenizer's EOS. Unset: at every EOS of the generation config."},
    )
    stop_token_id: int | None = field(default=None, metadata={"help": "Stop at this token id instead."})
    temperature: float = field(default=0.7, metadata={"help": "Sampling temperature, of log-probabilities too."})
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Subtract this from the score of an answer that no stop token ended."}
    )
    kl_coef: float = field(
        default=0.05, metadata={"help": "Weight of the per-token KL penalty to the reference model."}
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
        metadata={"help": "Weight of each reward, 1 if unset; a reward of weight 0 is logged only."},
    )
    normalize_rewards: bool = field(
        default=False,
        metadata={"help": "Shift and scale each reward model's scores to mean 0 and variance 1 on its held-out rows."},
    )
    reward_clip_range: list[float] | None = field(
        default=None, metadata={"help": "Lower and upper bound of an answer's score, after any scaling."}
    )
    use_score_scaling: bool = field(
        default=False, metadata={"help": "Divide scores by their running standard deviation."}
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
        metadata={"help": "Adapt kl_coef so that the KL to the reference approaches this many nats per answer."},
    )
    adaptive_kl_horizon: int = field(
        default=10_000,
        metadata={"help": "Episodes in which a KL of twice the target raises kl_coef by about a fifth."},
    )
    value_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the value; unset: learning_rate."}
    )
    value_warmup_updates: int = field(
        default=0, metadata={"help": "Number of first updates that train the value only; the policy stays frozen."}
    )
    value_adapter: bool = field(
        default=True,
        metadata={
            "help": "Where the policy has an adapter and there is no value model: give the value its own adapter on the same "
            "base. False: a head on the policy's adapter."
        },
    )
    value_prior: bool = field(
        default=True,
        metadata={
            "help": "Add a baseline to the value head: a line fitted by least squares to the reward models' scores of prefixes. "
            "Costs nothing; no effect without a reward model that reads the policy's token ids."
        },
    )
    num_layers_unfrozen: int | None = field(
        default=None,
        metadata={
            "help": "Train only this many upper layers of the policy. The frozen layers run once per update, for policy, "
            "reference and value together. Unset: all layers are trained."
        },
    )
    save_value_model: bool = field(
        default=True, metadata={"help": "Save the value beside the policy, in value_model/."}
    )
    generation_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Sampling options: top_k, top_p, min_p, min_new_tokens. JSON on the command line."},
    )
    log_completions: bool = field(
        default=True, metadata={"help": "Append the answers of each update to completions.jsonl in output_dir."}
    )
    hints: bool = field(
        default=True, metadata={"help": "Log one line with advice when a metric leaves its healthy range."}
    )
    local_rollout_forward_batch_size: int = field(
        default=64, metadata={"help": "Rows per forward pass without gradient."}
    )
    num_sample_generations: int = field(
        default=10, metadata={"help": "Number of times that sample answers are logged in a run."}
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Accepted for scripts that tokenize themselves; not used here."}
    )
    sft_model_path: str | None = field(
        default=None, metadata={"help": "The supervised model, for scripts that load it."}
    )
    reward_model_path: str | None = field(
        default=None, metadata={"help": "The reward model, for scripts that load it."}
    )
    model_adapter_name: str | None = field(default=None, metadata={"help": "Name of the adapter that is trained."})
    ref_adapter_name: str | None = field(default=None, metadata={"help": "Name of the adapter that is the reference."})
    ds3_gather_for_generation: bool = field(default=True, metadata={"help": "Accepted for TRL's scripts; no effect."})
    # A rollout cannot be skipped like a batch of rows; the loader continues from global_step itself.
    ignore_data_skip: bool = field(
        default=True, metadata={"help": "Must stay on: rollouts resume by the step counter."}
    )
    logging_first_step: bool = field(
        default=False, metadata={"help": "Log the first step; the first update is always logged."}
    )
    save_total_limit: int | None = field(default=None, metadata={"help": "Checkpoints kept; unset: all."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Off, so that columns reach the reward functions."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choices()
        self._check_ranges()

    def _check_choices(self) -> None:
        for name, choices in {"kl_estimator": ("k1", "k3"), "stop_token": ("eos", None)}.items():
            if getattr(self, name) not in choices:
                raise UserError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(map(str, choices))}")
        if self.stop_token is not None and self.stop_token_id is not None:
            raise UserError("stop_token and stop_token_id are alternatives; set one of them")

    def _check_ranges(self) -> None:
        if self.fp16:
            raise UserError("fp16 is on; PPOTrainer may drop gradients that the fp16 loss scaler expects: use bf16")
        if not self.ignore_data_skip:
            raise UserError("ignore_data_skip is false; rollouts cannot be skipped like rows: leave it true")
        for name in ("num_ppo_epochs", "num_mini_batches", "response_length", "local_rollout_forward_batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.temperature <= 0:
            raise UserError(f"temperature is {self.temperature}; it must be above 0, since PPO trains on samples")
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
                raise UserError(f"{name} is {getattr(self, name)}; it must be above 0, or unset")
        if self.reward_clip_range is not None and (
            len(self.reward_clip_range) != 2 or self.reward_clip_range[0] >= self.reward_clip_range[1]
        ):
            raise UserError(f"reward_clip_range is {self.reward_clip_range}; give the lower and the upper bound")
        if self.value_warmup_updates < 0:
            raise UserError(f"value_warmup_updates is {self.value_warmup_updates}; it must be at least 0")
        if self.use_score_norm and not self.use_score_scaling:
            raise UserError("use_score_norm needs use_score_scaling; set both or none")
        unknown = set(self.generation_kwargs or {}) - set(SAMPLING)
        if unknown:
            raise UserError(
                f"generation_kwargs has unknown keys ({', '.join(sorted(unknown))}); it accepts {', '.join(SAMPLING)}: for "
                "more, subclass PPOTrainer and override generate"
            )

    @property
    def episodes_per_process(self) -> int:
        """The number of episodes that one process collects for an update."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def episodes_per_update(self) -> int:
        """The number of episodes of all processes in one update."""
        return self.episodes_per_process * self.world_size

    @property
    def steps_per_update(self) -> int:
        """The number of optimizer steps on the episodes of one update."""
        return self.num_ppo_epochs * self.num_mini_batches
