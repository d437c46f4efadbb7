"""What every trainer shares: a trainer whose runs can be resumed, the run around it, its defaults."""

from rlhf_recipes.training.arguments import RewardedPromptsArguments
from rlhf_recipes.training.best_model import check_best_metric
from rlhf_recipes.training.classifier import (
    ClassifierTrainer,
    collate_labelled_texts,
    encode_labelled,
    mean_cross_entropy,
)
from rlhf_recipes.training.defaults import NO_TEMPLATE_PATH, FineTuningDefaults, TrainingDefaults, learning_rate_field
from rlhf_recipes.training.demonstrations import encode_demonstrations, load_demonstrations, loss_spans
from rlhf_recipes.training.held_out import GREATEST, LEAST, ROWS, SPREAD, HeldOutMeans, mask_total
from rlhf_recipes.training.options import check_model_options, check_options, check_order_of_pairs
from rlhf_recipes.training.preferences import (
    PAIR,
    encode_dpo_pairs,
    encode_labels,
    encode_pairs,
    load_pairs,
    load_reward_rows,
)
from rlhf_recipes.training.pretrain import PretrainTrainer, SampleContinuations, collate_blocks
from rlhf_recipes.training.reference import SyncedReference, check_synced_reference
from rlhf_recipes.training.rloo import UNSUPPORTED_BY_RLOO, OwnTokenization, SampledBatches, check_sampling
from rlhf_recipes.training.run import Measured, measures_model, prepare_process_, run_training, training_inputs
from rlhf_recipes.training.trainer import SafeTrainer

__all__ = [
    "GREATEST",
    "LEAST",
    "NO_TEMPLATE_PATH",
    "PAIR",
    "ROWS",
    "SPREAD",
    "UNSUPPORTED_BY_RLOO",
    "ClassifierTrainer",
    "FineTuningDefaults",
    "HeldOutMeans",
    "Measured",
    "OwnTokenization",
    "PretrainTrainer",
    "RewardedPromptsArguments",
    "SafeTrainer",
    "SampleContinuations",
    "SampledBatches",
    "SyncedReference",
    "TrainingDefaults",
    "check_best_metric",
    "check_model_options",
    "check_options",
    "check_order_of_pairs",
    "check_sampling",
    "check_synced_reference",
    "collate_blocks",
    "collate_labelled_texts",
    "encode_demonstrations",
    "encode_dpo_pairs",
    "encode_labelled",
    "encode_labels",
    "encode_pairs",
    "learning_rate_field",
    "load_demonstrations",
    "load_pairs",
    "load_reward_rows",
    "loss_spans",
    "mask_total",
    "mean_cross_entropy",
    "measures_model",
    "prepare_process_",
    "run_training",
    "training_inputs",
]
