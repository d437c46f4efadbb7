"""What every trainer shares: a trainer whose runs can be resumed, the run around it, its defaults."""

from rlhf_recipes.training.classifier import collate_labelled_texts, encode_labelled, mean_cross_entropy
from rlhf_recipes.training.defaults import FineTuningDefaults, TrainingDefaults
from rlhf_recipes.training.pretrain import PretrainTrainer, SampleContinuations, collate_blocks
from rlhf_recipes.training.run import Measured, measures_model, prepare_process_, run_training, training_inputs
from rlhf_recipes.training.trainer import SafeTrainer

__all__ = [
    "FineTuningDefaults",
    "Measured",
    "PretrainTrainer",
    "SafeTrainer",
    "SampleContinuations",
    "TrainingDefaults",
    "collate_blocks",
    "collate_labelled_texts",
    "encode_labelled",
    "mean_cross_entropy",
    "measures_model",
    "prepare_process_",
    "run_training",
    "training_inputs",
]
