"""Tests of every logged metric against a recomputation in float64, and of the memory of a run."""

import copy
import gc
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

Make = Callable[..., Any]
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_mini_batches": 2},
    "empty micro-batches": {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_mini_batches": 4, "num_ppo_epochs": 2,
        "whiten_rewards": True, "missing_eos_penalty": 0.7, "gamma": 0.9, "vf_coef": 0.5,
    },
    "k3": {"kl_estimator": "k3", "kl_coef": 0.5, "cliprange": 0.05, "cliprange_value": 0.02, "temperature": 1.3},
    "value model": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "lam": 0.8},
}  # fmt: skip
MODEL_OUTPUTS = ("log_probs", "reference_log_probs", "values")
COMPUTED = ("kl", "rewards", "advantages", "returns")
TIMES = ("time/generate", "time/score", "time/forward", "time/rollout", "time/update", "eps", "time/tokens_per_second")


@pytest.fixture(scope="module", params=list(CASES))
def run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, trainers_in: Make, recorder: type,
    make_policy: Make, make_reward_model: Make,
) -> Any:  # fmt: skip
    """Return a recorded run of two updates; in the second one the policy differs from the reference."""
    value_model = make_reward_model(4, initializer_range=0.1) if request.param == "value model" else None
    options = {"num_ppo_epochs": 3, "learning_rate": 3e-3, "vf_coef": 0.3} | CASES[request.param]
    make_trainer = trainers_in(tmp_path_factory.mktemp("metrics"))
    trainer = make_trainer(
        make_policy(initializer_range=0.1), trainer_class=recorder, value_model=value_model, **options
    )
    if value_model is None:
        generator = torch.Generator().manual_seed(9)
        trainer.model.value_model.score.weight.data.normal_(0, 0.2, generator=generator)
    trainer.train()
    return trainer


def expected_episodes(float64_ppo: ModuleType, trainer: Any, update: int) -> dict[tuple[int, ...], Any]:
    """Recompute the episodes of an update, by their ids, from answers, scores and models only."""
    args, reference_model = trainer.args, trainer.generated[0][0]
    model, queries, completions = trainer.generated[update]
    (scores,) = trainer.scored[update].values()
    episodes = {}
    for query, answer, stopped, score in zip(queries, completions.ids, completions.stopped, scores, strict=True):
        policy = float64_ppo.forward(model, query, answer, args.temperature)
        reference = float64_ppo.forward(reference_model, query, answer, args.temperature)
        episode = float64_ppo.Episode(policy.log_probs, reference.log_probs, policy.values, score, stopped)
        episodes[(*query, *answer)] = episode
    names = ("kl_coef", "kl_estimator", "gamma", "lam", "whiten_rewards", "missing_eos_penalty")
    float64_ppo.complete_(list(episodes.values()), **{name: getattr(args, name) for name in names})
    return episodes


def expected_rollout_metrics(
    float64_ppo: ModuleType, trainer: Any, update: int, episodes: list[Any]
) -> dict[str, float]:
    args = trainer.args
    kl = np.array([episode.kl.sum() for episode in episodes])
    score = np.array([episode.score for episode in episodes])
    returns = float64_ppo.flat(episode.returns for episode in episodes)
    errors = returns - float64_ppo.flat(episode.values for episode in episodes)
    return {
        "objective/kl": kl.mean(),
        "objective/entropy": np.mean([-episode.log_probs.sum() for episode in episodes]),
        "objective/non_score_reward": -args.kl_coef * kl.mean(),
        "objective/rlhf_reward": (score - args.kl_coef * kl).mean(),
        "objective/scores": score.mean(),
        "objective/kl_coef": args.kl_coef,
        "rewards/low_share": np.mean(trainer.scored[update]["low_share"]),
        "completions/mean_length": np.mean([len(episode.kl) for episode in episodes]),
        "completions/eos_share": np.mean([episode.stopped for episode in episodes]),
        "val/num_eos_tokens": sum(episode.stopped for episode in episodes),
        "val/explained_variance": 1 - (errors**2).mean() / returns.var(),
        "val/skipped_steps": 0.0,
        "episode": 8.0 * (update + 1),
        "lr": args.learning_rate,
    }


def expected_step_metrics(
    float64_ppo: ModuleType, trainer: Any, steps: list[Any], episodes: dict[tuple[int, ...], Any]
) -> tuple[dict[str, float], dict[int, float]]:
    """Return the means over every token of every pass, and the loss of each optimizer step."""
    args = trainer.args
    rows: list[tuple[float, ...]] = []
    losses_of_steps: dict[int, list[float]] = {}
    for step in steps:
        for ids, mask in zip(step.inputs["input_ids"], step.inputs["attention_mask"], strict=True):
            tokens = tuple(ids[mask.bool()].tolist())
            episode = episodes[tokens]
            length = len(episode.kl)
            now = float64_ppo.forward(
                step.model, tokens[: len(tokens) - length], tokens[len(tokens) - length :], args.temperature
            )
            for token in range(length):
                old, advantage = episode.log_probs[token], episode.advantages[token]
                policy, policy_clipped = float64_ppo.policy_loss(now.log_probs[token], old, advantage, args.cliprange)
                values = now.values[token], episode.values[token], episode.returns[token]
                value, value_clipped = float64_ppo.value_loss(*values, args.cliprange_value)
                log_ratio = now.log_probs[token] - old
                ratio = math.exp(log_ratio)
                rows.append(
                    (log_ratio**2 / 2, policy_clipped, now.entropies[token], policy, value, value_clipped, ratio)
                )
                losses_of_steps.setdefault(step.optimizer_step, []).append(policy + args.vf_coef * value)
    table = np.array(rows)
    names = (
        "policy/approxkl_avg policy/clipfrac_avg policy/entropy_avg loss/policy_avg loss/value_avg val/clipfrac_avg"
    )
    means = dict(zip([*names.split(), "val/ratio"], table.mean(0), strict=True))
    losses = {1 + number: sum(step_losses) / len(step_losses) for number, step_losses in losses_of_steps.items()}
    return means | {"val/ratio_var": table[:, -1].var()}, losses


def test_every_metric_matches_float64(run: Any, float64_ppo: ModuleType) -> None:
    """Recomputed from prompts, answers, scores and weights; no other result of the trainer is used."""
    per_update = run.args.steps_per_update
    entries = {entry["step"]: entry for entry in run.state.log_history if "loss" in entry}
    assert set(entries) == set(range(1, 2 * per_update + 1))
    for update in range(2):
        episodes = expected_episodes(float64_ppo, run, update)
        steps = [step for step in run.steps if step.optimizer_step // per_update == update]
        expected, losses = expected_step_metrics(float64_ppo, run, steps, episodes)
        expected |= expected_rollout_metrics(float64_ppo, run, update, list(episodes.values()))
        entry = entries[(update + 1) * per_update]
        logged = {name for name in entry if "/" in name or name in ("eps", "episode", "lr")}
        assert logged - set(TIMES) == set(expected)
        assert {name: entry[name] for name in expected} == pytest.approx(expected, rel=2e-4, abs=2e-5)
        assert all(entry[name] > 0 for name in TIMES)
        for number, loss in losses.items():
            assert entries[number]["loss"] == pytest.approx(loss, abs=2e-5)
        # The case is not trivial: KL of the second update and variance of the ratio are above 0.
        assert abs(expected["objective/kl"]) > 1e-4 or update == 0
        assert expected["val/ratio_var"] > 1e-4


def test_one_update_matches_float64_to_six_digits(run: Any, float64_ppo: ModuleType) -> None:
    """Rewards, advantages and loss, recomputed from the same float32 log-probabilities and values."""
    args, per_update = run.args, run.args.steps_per_update
    steps = [step for step in run.steps if step.optimizer_step // per_update == 1]
    (scores,) = run.scored[1].values()
    _, queries, completions = run.generated[1]
    keys = [(*query, *answer) for query, answer in zip(queries, completions.ids, strict=True)]
    score_of = dict(zip(keys, scores, strict=True))
    episodes, results = {}, {}
    for step in steps:
        for row, (ids, mask) in enumerate(zip(step.inputs["input_ids"], step.inputs["attention_mask"], strict=True)):
            key, length = tuple(ids[mask.bool()].tolist()), int(step.inputs["response_mask"][row].sum())
            outputs = {name: step.inputs[name][row, :length].double().numpy() for name in MODEL_OUTPUTS}
            episodes[key] = float64_ppo.Episode(*outputs.values(), score_of[key], bool(step.inputs["stopped"][row]))
            results[key] = {name: step.inputs[name][row, :length].double().numpy() for name in COMPUTED}
    names = ("kl_coef", "kl_estimator", "gamma", "lam", "whiten_rewards", "missing_eos_penalty")
    float64_ppo.complete_(list(episodes.values()), **{name: getattr(args, name) for name in names})
    for key, episode in episodes.items():
        for name in COMPUTED:
            np.testing.assert_allclose(results[key][name], getattr(episode, name), rtol=1e-6, atol=1e-6, err_msg=name)
    for number in {step.optimizer_step for step in steps}:
        parts = [step for step in steps if step.optimizer_step == number]
        losses = [loss for step in parts for loss in token_losses(float64_ppo, args, step)]
        assert sum(step.loss for step in parts) == pytest.approx(sum(losses) / len(losses), abs=1e-6)
        assert {int(step.tokens) for step in parts} == {len(losses)}


def test_gradients_match_finite_differences(run: Any, float64_ppo: ModuleType) -> None:
    """Recompute the loss in float64, clipped tokens included, with one number of each weight changed."""
    per_update, draw = run.args.steps_per_update, np.random.default_rng(0)
    number = 2 * per_update - 1  # the last step of the second update
    parts = [step for step in run.steps if step.optimizer_step == number]
    model = copy.deepcopy(parts[0].model)

    def loss() -> float:
        losses = [
            token_loss for step in parts for token_loss in losses_of_model(float64_ppo, run.args, model, step.inputs)
        ]
        return sum(losses) / len(losses)

    trained = copy.deepcopy(model).float()
    for step in parts:
        run.compute_loss(trained, step.inputs, num_items_in_batch=step.tokens).backward()
    gradients = dict(trained.named_parameters())
    for name, weight in model.named_parameters():
        flat = weight.data.view(-1)
        index = int(draw.integers(len(flat)))
        initial, losses = flat[index].item(), []
        for moved in (initial + 1e-5, initial - 1e-5):
            flat[index] = moved
            losses.append(loss())
        flat[index] = initial
        gradient = gradients[name].grad.view(-1)[index].item()
        assert gradient == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-4, abs=1e-6), name


def losses_of_model(float64_ppo: ModuleType, args: Any, model: Any, inputs: Any) -> list[float]:
    """Return the loss of each generated token of a micro-batch, in float64 from a forward pass of `model`."""
    losses = []
    for row, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
        tokens, length = ids[mask.bool()].tolist(), int(inputs["response_mask"][row].sum())
        now = float64_ppo.forward(
            model, tokens[: len(tokens) - length], tokens[len(tokens) - length :], args.temperature
        )
        old = {name: inputs[name][row].double().tolist() for name in ("log_probs", "advantages", "values", "returns")}
        for token in range(length):
            policy = now.log_probs[token], old["log_probs"][token], old["advantages"][token]
            value = now.values[token], old["values"][token], old["returns"][token]
            losses.append(
                float64_ppo.policy_loss(*policy, args.cliprange)[0]
                + args.vf_coef * float64_ppo.value_loss(*value, args.cliprange_value)[0]
            )
    return losses


def token_losses(float64_ppo: ModuleType, args: Any, step: Any) -> list[float]:
    """Return the loss of each generated token of a recorded micro-batch, in float64 from the recorded outputs."""
    mask = step.inputs["response_mask"]

    def masked(tensor: Any) -> list[float]:
        return tensor[mask].double().tolist()

    policy = zip(
        masked(step.outputs.log_probs),
        *(masked(step.inputs[name]) for name in ("log_probs", "advantages")),
        strict=True,
    )
    value = zip(
        masked(step.outputs.values), *(masked(step.inputs[name]) for name in ("values", "returns")), strict=True
    )
    return [
        float64_ppo.policy_loss(*policy_numbers, args.cliprange)[0]
        + args.vf_coef * float64_ppo.value_loss(*value_numbers, args.cliprange_value)[0]
        for policy_numbers, value_numbers in zip(policy, value, strict=True)
    ]


def test_padding_changes_no_metric(make_trainer: Make, recorder: type) -> None:
    """The same run with wider padding in every micro-batch logs the same numbers."""

    class Padded(recorder):  # type: ignore[misc, valid-type]
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            extra = {name: 3 if tensor.dim() == 2 else 0 for name, tensor in inputs.items()}
            wide = {name: torch.nn.functional.pad(tensor, (0, extra[name])) for name, tensor in inputs.items()}
            return super().compute_loss(model, wide, *args, **kwargs)

    logs = []
    for trainer_class in (recorder, Padded):
        trainer = make_trainer(trainer_class=trainer_class, num_ppo_epochs=2, num_mini_batches=2)
        trainer.train()
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    for plain, padded in zip(*logs, strict=True):
        expected = {name: value for name, value in plain.items() if name not in TIMES}
        assert {name: padded[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)


# Memory.

VOCABULARY, HIDDEN = 262, 36


class LargestLogits(TorchDispatchMode):
    """Record the most rows of any tensor whose last axis is the vocabulary, except the output matrix itself."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.dim() > 1 and tensor.shape[-1] == VOCABULARY:
                rows = tensor.numel() // VOCABULARY
                self.rows = max(self.rows, 0 if rows == HIDDEN else rows)
        return result


def test_logits_exist_for_one_chunk_of_generated_tokens_at_most(
    make_trainer: Make, make_policy: Make, recorder: type
) -> None:
    model = make_policy(n_embd=HIDDEN)
    trainer = make_trainer(
        model, trainer_class=recorder, local_rollout_forward_batch_size=4, per_device_train_batch_size=4, response_length=10,
        gradient_accumulation_steps=4, num_ppo_epochs=1,
    )  # fmt: skip
    with LargestLogits() as largest:
        trainer.train()
    _, queries, answers = trainer.generated[0]
    lengths = sorted((len(query) + len(ids), len(ids)) for query, ids in zip(queries, answers.ids, strict=True))
    chunks = [sum(length for _, length in lengths[start : start + 4]) for start in range(0, 16, 4)]
    trained = [int(step.inputs["response_mask"].sum()) for step in trainer.steps]
    bound = -(-max(*chunks, *trained) // 16) * 16  # padded to a multiple of 16
    assert 16 < largest.rows <= bound < 4 * 10, "a padded chunk would have 40 rows, and more with the prompts"


class LiveTensors(TrainerCallback):
    """Count the live tensors and their bytes after some optimizer steps."""

    def __init__(self, steps: tuple[int, ...]) -> None:
        self.steps, self.counts, self.bytes, self.wide = steps, [], [], 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            gc.collect()
            alive = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
            self.counts.append(len(alive))
            self.bytes.append(sum(tensor.numel() * tensor.element_size() for tensor in alive))
            self.wide += sum(tensor.dim() > 1 and tensor.shape[-1] == VOCABULARY for tensor in alive)


def test_memory_is_flat_over_fifty_updates(make_trainer: Make) -> None:
    live = LiveTensors((5, 30, 60))
    trainer = make_trainer(
        callbacks=[live], per_device_train_batch_size=4, num_ppo_epochs=1, rows=8, max_steps=60, response_length=3,
        logging_steps=100,
    )  # fmt: skip
    trainer.train()
    assert len(set(live.counts)) == 1 and live.counts[0] > 50
    assert max(live.bytes) - min(live.bytes) < 4096, "rollouts differ in length by a few tokens"
    assert live.wide == 0, "no tensor over the vocabulary is kept"
