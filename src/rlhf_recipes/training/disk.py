"""How much disk the checkpoints of a run take, and what a checkpoint without optimizer loses."""

import logging
import math
import shutil
from pathlib import Path
from typing import Any

GIB = 2.0**30
LOGGED_FROM = 10 * 2**20  # bytes

logger = logging.getLogger(__name__)


def checkpoint_bytes(model: Any, with_optimizer: bool) -> int:
    """Return about how many bytes a checkpoint takes: the saved weights and, in float32, Adam's two moments.

    Of a model with an adapter only the trained weights are saved.
    """
    named = dict(model.named_parameters())
    trained = [each for each in named.values() if each.requires_grad]
    saved = trained if any("lora_" in name for name in named) else list(named.values())
    weights = sum(each.numel() * each.element_size() for each in saved)
    return weights + (8 * sum(each.numel() for each in trained) if with_optimizer else 0)


def log_disk_use(model: Any, training: Any, state: Any) -> None:
    """Log how much disk the checkpoints of a run will take, and how much is free.

    A checkpoint is complete before an older one is deleted, so there may be one more than `save_total_limit`.

    Args:
        state: Trainer's, which knows the number of steps.
    """
    strategy = getattr(training.save_strategy, "value", training.save_strategy)
    if strategy == "no":
        return
    size, limit = checkpoint_bytes(model, not training.save_only_model), training.save_total_limit
    saves = {"steps": state.max_steps / max(1, state.save_steps), "epoch": state.num_train_epochs}.get(strategy, 1)
    count = max(1, math.ceil(saves) if not limit else min(math.ceil(saves), limit + 1))
    if size * count < LOGGED_FROM:
        return
    free = shutil.disk_usage(training.output_dir).free
    logger.warning(
        "checkpoints take up to %.1f GiB in %s: %d of about %.2f GiB each; %.1f GiB are free%s",
        size * count / GIB, training.output_dir, count, size / GIB, free / GIB,
        "" if size * count < free else ": lower --save_total_limit, or pass --save_only_model true",
    )  # fmt: skip


def warn_of_lost_state(checkpoint: str | None) -> None:
    """Warn if a run resumes from a checkpoint that holds the model only."""
    if checkpoint is None:
        return
    if not any(path for pattern in ("optimizer*", "global_step*") for path in Path(checkpoint).glob(pattern)):
        logger.warning(
            "%s holds no optimizer (save_only_model): the optimizer's state, the learning rate's schedule and the random "
            "numbers start again, so the run goes on from these weights but differs from one that was not interrupted",
            checkpoint,
        )
