"""Measuring before the first step leaves random numbers, the model's mode and its autocast as they were."""

import random

import numpy as np
import torch
from torch import nn

from rlhf_recipes.training.hooks import unchanged_by_measuring


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), torch.rand(()).item()


def test_measuring_draws_no_random_number_of_the_training() -> None:
    model = nn.Linear(1, 1)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    expected = [draws(), draws()]
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    found = [draws()]
    with unchanged_by_measuring(model):
        draws()
    assert [*found, draws()] == expected


def test_measuring_keeps_mode_and_forward() -> None:
    model = nn.Linear(1, 1).train()
    wrapped = model.forward
    vars(model).update(forward=wrapped, _original_forward=wrapped)
    with unchanged_by_measuring(model):
        model.eval()
        del vars(model)["_original_forward"]
        vars(model)["forward"] = None
    assert model.training and vars(model)["_original_forward"] is wrapped is vars(model)["forward"]
