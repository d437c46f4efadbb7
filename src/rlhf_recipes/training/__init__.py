"""What every trainer shares: a trainer whose runs can be resumed, the run around it, its defaults."""

from rlhf_recipes.training.classifier import collate_labelled_texts, encode_labelled_texts, mean_cross_entropy
from rlhf_recipes.training.defaults import TrainingDefaults
from rlhf_recipes.training.pretrain import PretrainTrainer, SampleContinuations, collate_blocks
from rlhf_recipes.training.run import measures, open_run, save_model, select_logged_panels, train, under_way
from rlhf_recipes.training.trainer import SafeTrainer

__all__ = [
    "PretrainTrainer",
    "SafeTrainer",
    "SampleContinuations",
    "TrainingDefaults",
    "collate_blocks",
    "collate_labelled_texts",
    "encode_labelled_texts",
    "mean_cross_entropy",
    "measures",
    "open_run",
    "save_model",
    "select_logged_panels",
    "train",
    "under_way",
]
