"""What the log says of the disk that checkpoints take, and of a checkpoint that holds the model only."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from rlhf_recipes.training.disk import checkpoint_bytes, log_disk_use, warn_of_lost_state


def test_a_checkpoint_holds_weights_and_two_moments() -> None:
    model = nn.Linear(10, 20, bias=False).to(torch.bfloat16)
    assert checkpoint_bytes(model, with_optimizer=False) == 400
    assert checkpoint_bytes(model, with_optimizer=True) == 400 + 8 * 200
    adapter = nn.ModuleDict({"base": nn.Linear(50, 50), "lora_A": nn.Linear(50, 2, bias=False)})
    adapter["base"].requires_grad_(False)
    assert checkpoint_bytes(adapter, with_optimizer=True) == 12 * 100


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 3),
        ({"save_total_limit": None}, 10),
        ({"save_strategy": "epoch"}, 2),
        ({"save_strategy": "best"}, 1),
        ({"save_strategy": "no"}, None),
    ],
)
def test_the_log_says_how_many_checkpoints_there_will_be(
    changes: dict[str, Any], count: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    training = {"save_strategy": "steps", "save_only_model": False, "save_total_limit": 2, "output_dir": str(tmp_path)}
    state = SimpleNamespace(max_steps=100, save_steps=10, num_train_epochs=2)
    with caplog.at_level(logging.WARNING):
        log_disk_use(nn.Linear(3000, 1000), SimpleNamespace(**training | changes), state)
    assert [f": {count} of about 0.03 GiB each" in record.getMessage() for record in caplog.records] == (
        [] if count is None else [True]
    )


def test_resuming_from_weights_alone_says_what_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    warn_of_lost_state(None)
    warn_of_lost_state(str(tmp_path))
    (tmp_path / "optimizer.pt").touch()
    warn_of_lost_state(str(tmp_path))
    assert len(caplog.records) == 1 and "holds no optimizer (save_only_model)" in caplog.text
