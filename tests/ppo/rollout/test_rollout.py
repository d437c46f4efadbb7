"""Tests of one update's rollout: packing, and rewards, advantages and metrics against NumPy in float64."""

from dataclasses import fields, replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_recipes.ppo.rollout.rollout import (
    RewardOptions,
    Rollout,
    finish_rollout,
    in_batches,
    pad_episodes,
    trim_padding,
)

LENGTHS = [4, 1, 3, 2, 4]
STOPPED = [True, True, False, True, False]
PLAIN = RewardOptions(0.05, "k1", 1.0, 0.95, whiten_rewards=False, missing_eos_penalty=None)
SHAPES = {
    "plain": PLAIN,
    "discounted": replace(PLAIN, gamma=0.9, lam=0.5, kl_coef=0.3),
    "k3": replace(PLAIN, kl_estimator="k3", kl_coef=0.5),
    "whitened": replace(PLAIN, whiten_rewards=True),
    "penalised": replace(PLAIN, missing_eos_penalty=1.5, whiten_rewards=True, gamma=0.8),
}


def random_inputs(width: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return log_probs, reference_log_probs, values (batch, tokens) and scores (batch,) in float32."""
    generator = torch.Generator().manual_seed(0)
    log_probs, noise, values = torch.randn(3, len(LENGTHS), 4, generator=generator)
    tensors = [torch.zeros(len(LENGTHS), width) for _ in range(3)]
    for tensor, source in zip(tensors, (log_probs - 3, log_probs - 3 + 0.3 * noise, values), strict=True):
        tensor[:, :4] = source
    return (*tensors, torch.randn(len(LENGTHS), generator=generator) * 2)


def make_rollout(shape: RewardOptions, *, extra_padding: int = 0, pad_id: int = 0) -> Rollout:
    """Return a rollout with `extra_padding` more positions in each row and each answer than needed."""
    queries = [[7] * (1 + row) for row in range(len(LENGTHS))]
    answers = [list(range(10, 10 + length)) for length in LENGTHS]
    packed = pad_episodes(queries, answers, pad_id)
    fill = {"input_ids": pad_id}
    packed = {
        name: torch.nn.functional.pad(tensor, (0, extra_padding), value=fill.get(name, 0))
        for name, tensor in packed.items()
    }
    *tokens, scores = random_inputs(4 + extra_padding)
    tokens = [tensor * packed["response_mask"] for tensor in tokens]  # the model, too, returns zeros after the answer
    return finish_rollout(packed, torch.tensor(STOPPED), scores, *tokens, shape)


def episodes_of(float64_ppo: ModuleType, shape: RewardOptions) -> list[Any]:
    log_probs, reference_log_probs, values, scores = (tensor.double().numpy() for tensor in random_inputs())
    episodes = [
        float64_ppo.Episode(
            log_probs[row, :length], reference_log_probs[row, :length], values[row, :length], scores[row], STOPPED[row]
        )
        for row, length in enumerate(LENGTHS)
    ]
    float64_ppo.complete_(episodes, **{item.name: getattr(shape, item.name) for item in fields(shape)})
    return episodes


def test_pad_episodes_by_hand() -> None:
    packed = pad_episodes([[1, 2, 3], [4]], [[5], [6, 7]], pad_id=9)
    assert packed["input_ids"].tolist() == [[1, 2, 3, 5] + [9] * 12, [4, 6, 7] + [9] * 13], "a multiple of 16"
    assert packed["attention_mask"].tolist() == [[1] * 4 + [0] * 12, [1] * 3 + [0] * 13]
    assert packed["response_mask"].tolist() == [[True, False], [True, True]]
    trimmed = trim_padding(packed)
    assert trimmed["input_ids"].tolist() == [[1, 2, 3, 5], [4, 6, 7, 9]]
    assert {name: tensor.shape for name, tensor in trim_padding(packed, 3).items()} == {
        "input_ids": (2, 6), "attention_mask": (2, 6), "response_mask": (2, 2),
    }  # fmt: skip


def test_pad_id_inside_prompt_and_answer_is_a_real_token() -> None:
    packed = trim_padding(pad_episodes([[9, 1], [9]], [[9, 9], [3]], pad_id=9))
    assert packed["input_ids"].tolist() == [[9, 1, 9, 9], [9, 3, 9, 9]]
    assert packed["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert packed["response_mask"].tolist() == [[True, True], [True, False]]


def test_in_batches_returns_rows_in_their_original_order() -> None:
    """Each row is read once, in a batch as wide as its longest row; padding stays zero."""
    packed = pad_episodes([[3], [5, 5, 5, 5], [7, 7]], [[1, 1, 1], [2], [4, 4]])
    widths = []

    def read(input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
        widths.append(input_ids.shape[1])
        return response_mask * input_ids[:, :1], (input_ids * attention_mask)[..., None].float()

    values, states = in_batches(read, packed, [[0, 2], [1]])
    assert widths == [4, 5]
    assert values.tolist() == [[3, 3, 3], [5, 0, 0], [7, 7, 0]]
    assert torch.equal(states[..., 0], (packed["input_ids"] * packed["attention_mask"]).float())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_rollout_matches_float64(shape: RewardOptions, float64_ppo: ModuleType) -> None:
    rollout = make_rollout(shape)
    for row, (episode, length) in enumerate(zip(episodes_of(float64_ppo, shape), LENGTHS, strict=True)):
        assert rollout.scores[row].item() == pytest.approx(episode.score, abs=1e-6)
        for name in ("kl", "rewards", "advantages", "returns"):
            found = getattr(rollout, name)[row]
            np.testing.assert_allclose(found[:length], getattr(episode, name), rtol=0, atol=2e-6, err_msg=name)
            if name in ("kl", "advantages"):
                assert not found[length:].any(), f"{name} of padding"


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_rollout_does_not_depend_on_padding_width_or_pad_id(shape: RewardOptions) -> None:
    narrow, wide = make_rollout(shape), make_rollout(shape, extra_padding=5, pad_id=12)
    for name in ("kl", "rewards", "advantages", "returns", "scores"):
        found = getattr(wide, name)
        found = found if found.dim() == 1 else found[:, :4]
        torch.testing.assert_close(found, getattr(narrow, name), rtol=0, atol=1e-6)
    assert wide.explained_variance() == pytest.approx(narrow.explained_variance(), abs=1e-6)
    for name, value in narrow.episode_metrics(0.05).items():
        torch.testing.assert_close(wide.episode_metrics(0.05)[name], value)


def test_episode_metrics_match_float64(float64_ppo: ModuleType) -> None:
    shape = SHAPES["penalised"]
    metrics = make_rollout(shape).episode_metrics(shape.kl_coef)
    for row, episode in enumerate(episodes_of(float64_ppo, shape)):
        expected = {
            "objective/kl": episode.kl.sum(),
            "objective/entropy": -episode.log_probs.sum(),
            "objective/non_score_reward": -0.05 * episode.kl.sum(),
            "objective/rlhf_reward": episode.score - 0.05 * episode.kl.sum(),
            "objective/scores": episode.score,
            "completions/mean_length": LENGTHS[row],
            "completions/eos_share": float(STOPPED[row]),
        }
        assert {name: values[row].item() for name, values in metrics.items()} == pytest.approx(expected, abs=1e-5)


def test_explained_variance_matches_float64(float64_ppo: ModuleType) -> None:
    episodes = episodes_of(float64_ppo, PLAIN)
    returns = float64_ppo.flat(episode.returns for episode in episodes)
    errors = returns - float64_ppo.flat(episode.values for episode in episodes)
    rollout = make_rollout(PLAIN)
    assert rollout.explained_variance() == pytest.approx(1 - (errors**2).mean() / returns.var(), abs=1e-5)
    assert replace(rollout, values=rollout.returns).explained_variance() == pytest.approx(1.0)


def test_select_takes_the_same_rows_of_every_tensor() -> None:
    rollout = make_rollout(PLAIN)
    selected = rollout.select(torch.tensor([3, 0]))
    assert set(selected) == {item.name for item in fields(Rollout)} - {"lower_states", "baseline"}, (
        "this rollout has neither"
    )
    for name, value in selected.items():
        assert torch.equal(value, torch.stack([getattr(rollout, name)[3], getattr(rollout, name)[0]]))


@pytest.mark.parametrize("lengths", [[0, 0], [1, 0], [1], [0, 1, 3]])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_rollouts_of_empty_and_one_token_answers_are_finite(shape: RewardOptions, lengths: list[int]) -> None:
    packed = pad_episodes([[1, 2]] * len(lengths), [[5] * length for length in lengths], 0)
    tokens = torch.randn(3, len(lengths), max(lengths), generator=torch.Generator().manual_seed(0))
    stopped = torch.tensor([length > 0 for length in lengths])
    rollout = finish_rollout(packed, stopped, torch.ones(len(lengths)), *tokens, shape)
    for name in ("kl", "rewards", "advantages", "returns", "scores"):
        assert bool(torch.isfinite(getattr(rollout, name)).all()), name
    assert np.isfinite(rollout.explained_variance())
