"""Fixtures of the PPO tests: a trainer that runs in a second, one that records its steps, and PPO in float64."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

STOP_IDS = list(range(200, 256))  # many, so that an untrained model stops at various lengths
WORDS = ["a", "to be", "or not", "that", "is the question here", "whether", "it is nobler", "in"]


def low_share(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Return the share of an answer's tokens with an id below 128: a policy can learn it in a few steps."""
    return [sum(token < 128 for token in ids) / max(1, len(ids)) for ids in completion_ids]


def prompt_rows(count: int) -> list[dict[str, Any]]:
    """Return prompts of different lengths."""
    return [{"prompt": f"{WORDS[index % len(WORDS)]}{index}"} for index in range(count)]


@pytest.fixture(scope="session")
def float64_ppo() -> ModuleType:
    """Return the module that recomputes PPO in float64."""
    from programs import ppo_float64

    return ppo_float64


@pytest.fixture(scope="session")
def make_policy(make_model: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function (seed=0, **config) that makes a policy that stops at `STOP_IDS`."""

    def make(seed: int = 0, **config: Any) -> Any:
        model = make_model(seed, **config)
        model.generation_config.eos_token_id = STOP_IDS
        return model

    return make


@pytest.fixture(scope="session")
def trainers_in(make_policy: Callable[..., Any], tokenizer: Any) -> Callable[[Path], Callable[..., Any]]:
    """Return a function (folder) that returns `make_trainer` for trainers that write to `folder`/out."""
    from rlhf_recipes.ppo.config import PPOConfig
    from rlhf_recipes.ppo.trainer import PPOTrainer

    config_fields = {item.name for item in fields(PPOConfig)}
    defaults = {
        "per_device_train_batch_size": 8,
        "response_length": 6,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "num_train_epochs": 1,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }

    def make(
        folder: Path,
        model: Any = None,
        reward_funcs: Any = low_share,
        rows: Any = 16,
        trainer_class: Any = PPOTrainer,
        **options: Any,
    ) -> Any:
        config = defaults | {name: value for name, value in options.items() if name in config_fields}
        arguments = {"processing_class": tokenizer}
        arguments |= {name: value for name, value in options.items() if name not in config_fields}
        model = make_policy() if model is None else model
        rows = prompt_rows(rows) if isinstance(rows, int) else rows
        args = PPOConfig(output_dir=str(folder / "out"), **config)
        return trainer_class(model, reward_funcs, args, rows, **arguments)

    return lambda folder: partial(make, folder)


@pytest.fixture
def make_trainer(trainers_in: Callable[[Path], Callable[..., Any]], tmp_path: Path) -> Callable[..., Any]:
    """Return a function (model, reward_funcs, rows, trainer_class=PPOTrainer, **options) that makes a trainer.

    options: any field of PPOConfig or argument of PPOTrainer.
    """
    return trainers_in(tmp_path)


@dataclass
class Step:
    """One call of `compute_loss`: the model before it in float64, its inputs and its results."""

    model: Any
    inputs: dict[str, Any]
    outputs: Any
    loss: float
    tokens: Any
    optimizer_step: int


@pytest.fixture(scope="session")
def recorder() -> type:
    """Return a PPOTrainer that records its calls: `generate` in `generated`, `score` in `scored`, `compute_loss` in `steps`."""
    from rlhf_recipes.ppo.trainer import PPOTrainer

    class Recorder(PPOTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.generated: list[tuple[Any, Any, Any]] = []  # policy and value in float64, prompt ids, completions
            self.scored: list[dict[str, list[float]]] = []
            self.steps: list[Step] = []
            super().__init__(*args, **kwargs)

        def generate(self, queries: Any, seeds: Any) -> Any:
            completions = super().generate(queries, seeds)
            self.generated.append((copy.deepcopy(self.model).double().eval(), queries, completions))
            return completions

        def score(self, rows: Any, completions: Any) -> Any:
            self.scored.append(super().score(rows, completions))
            return self.scored[-1]

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            before = copy.deepcopy(self.model).double().eval()
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            detached = type(outputs)(*(tensor.detach().clone() for tensor in outputs))
            step = Step(before, inputs, detached, loss.item(), num_items_in_batch, self.state.global_step)
            self.steps.append(step)
            return (loss, outputs) if return_outputs else loss

    return Recorder


@pytest.fixture
def weights_of() -> Callable[..., dict[str, Any]]:
    """Return a function that copies the weights of a module."""
    return lambda module: {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


@pytest.fixture
def max_difference() -> Callable[..., float]:
    """Return a function that gives the largest absolute difference of two state dicts with the same keys."""

    def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
        assert one.keys() == other.keys() and len(one) > 0
        return max((one[name] - other[name]).abs().max().item() for name in one)

    return difference
