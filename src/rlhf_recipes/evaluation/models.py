"""Evaluate a language model by its answers: metrics from one call, and the answers they were computed on.

Every model draws the same random numbers for the same prompt. So two models do not differ by luck, and a model
compared with itself ties on every prompt.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.progress import progress_bar
from rlhf_recipes.core.tensors import batches_by_length, log_probs_and_entropies, pad, position_ids
from rlhf_recipes.data import column_prompt_ids, plain_text, readable_prompts
from rlhf_recipes.evaluation.comparison import mean_with_interval, win_rate
from rlhf_recipes.evaluation.divergence import sequence_kl
from rlhf_recipes.evaluation.language_model import perplexity
from rlhf_recipes.evaluation.text import distinct_n, eos_share, length_statistics
from rlhf_recipes.generation import Completions, Sampling, row_seed, sample
from rlhf_recipes.optimizations import supports_preallocated_cache
from rlhf_recipes.scoring import ModelReward, Reward, score
from rlhf_recipes.system import apply_bitsandbytes_workarounds_

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Every metric and its meaning. Metrics without their reward model, reference or texts are left out.
# `<name>_low` and `<name>_high` are the 95 % interval over prompts.
METRICS = {
    "gold_score": "mean gold score",
    "reward_score": "mean score of the reward model",
    "reward_positive": "mean probability of label 1, for a reward model with two labels",
    "kl": "KL(model || reference) in nats per answer, estimated on the answers at the sampling temperature (not at 0)",
    "kl_per_token": "KL per token, by the k3 estimator",
    "perplexity": "perplexity of the texts",
    "bits_per_byte": "bits per byte of the texts",
    "length": "mean tokens of an answer, with the stop token",
    "length_p90": "90th percentile of the tokens of an answer",
    "eos_share": "share of answers that a stop token ended",
    "distinct_1": "share of different words among all words of the answers (Chinese, Japanese, Thai: characters)",
    "distinct_2": "share of different pairs of neighbouring words among all pairs",
    "win_rate_reward": "share of prompts with a higher reward model score than the first model's; ties count half",
    "win_rate_gold": "share of prompts with a higher gold score than the first model's; ties count half",
}
PERPLEXITY_BATCH = 8  # at most: the logits of whole contexts take much memory


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate_model`.

    metrics: numbers by name, see `METRICS`.
    rows: one for each completion, in the order of the prompts: `index` of the prompt, `prompt`, `completion`,
        `tokens`, `stopped`, and where they were measured `reward`, `gold` and `kl`.
    """

    metrics: dict[str, float]
    rows: list[dict[str, Any]]

    def by_prompt(self, column: str) -> list[float]:
        """Return the mean of a numeric column over the completions of each prompt, (prompts,)."""
        values: dict[int, list[float]] = {}
        for row in self.rows:
            values.setdefault(row["index"], []).append(float(row[column]))
        # `fsum` does not depend on the order, so equal scores give equal means and ties stay ties.
        return [math.fsum(prompt_values) / len(prompt_values) for prompt_values in values.values()]


def evaluate_model(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Any],
    *,
    sampling: Sampling,
    seed: int = 0,
    completions_per_prompt: int = 1,
    columns: Mapping[str, Sequence[Any]] | None = None,
    reward_model: Reward | None = None,
    gold: Reward | None = None,
    reference: "PreTrainedModel | None" = None,
    texts: Sequence[str] | None = None,
    batch_size: int = 64,
    progress: bool = False,
    max_prompt_tokens: int | None = None,
) -> Evaluation:
    """Sample answers to `prompts` (text, messages or ids) and measure them; measure the model's perplexity on `texts`.

    Args:
        completions_per_prompt: answers to each prompt.
        columns: the other columns of the prompts, one value for each prompt, for `gold` and `reward_model`; `tools` and
            `chat_template_kwargs` go to the chat template, too.
        reward_model, gold: rewards that score the answers.
        reference: a model with the same token ids, for the KL.
        batch_size: rows in one forward pass.
        max_prompt_tokens: read this many last tokens of a longer prompt; None: all.

    Raises:
        UserError: no prompts.
    """
    if not prompts:
        raise UserError("no prompts to answer; give at least one")
    repeated = [index for index in range(len(prompts)) for _ in range(completions_per_prompt)]
    encoded = column_prompt_ids(prompts, columns or {}, tokenizer, max_prompt_tokens)
    ids, given = ([each[index] for index in repeated] for each in (encoded, prompts))
    answers = _sample_answers(model, ids, sampling, seed, batch_size, progress)
    values = (repeated, answers.texts(tokenizer, ids), answers.ids, answers.stopped)
    shown = readable_prompts(prompts, tokenizer)
    rows: list[dict[str, Any]] = [
        {"index": index, "prompt": shown[index], "completion": text, "tokens": len(answer), "stopped": stopped}
        for index, text, answer, stopped in zip(*values, strict=True)
    ]
    aligned = {name: [values[index] for index in repeated] for name, values in (columns or {}).items()}
    metrics = _text_metrics(rows)
    for scorer in (reward_model, gold):
        if isinstance(scorer, ModelReward):
            scorer.progress = progress
    if reward_model is not None:
        _add_scores_(rows, "reward", reward_model, given, ids, answers.ids, aligned)
        metrics |= _reward_model_metrics(rows, reward_model)
    if gold is not None:
        _add_scores_(rows, "gold", gold, given, ids, answers.ids, aligned)
        metrics |= _gold_metrics(Evaluation({}, rows))
    if reference is not None and sampling.temperature > 0:
        metrics |= _add_divergence_(rows, model, reference, ids, answers.ids, sampling, batch_size, progress)
    if texts:
        measured = perplexity(model, tokenizer, texts, batch_size=min(batch_size, PERPLEXITY_BATCH), progress=progress)
        metrics |= {key: measured[key] for key in ("perplexity", "bits_per_byte")}
    return Evaluation(metrics, rows)


def compare(evaluation: Evaluation, baseline: Evaluation) -> dict[str, float]:
    """Compute `win_rate_reward` and `win_rate_gold` over `baseline` where both were scored, each with `_low` and `_high`.

    A prompt is won by the higher mean score over its completions. So the interval counts prompts: completions of one
    prompt are not independent.
    """
    metrics: dict[str, float] = {}
    for name in ("reward", "gold"):
        if all(name in scored.rows[0] for scored in (evaluation, baseline)):
            result = win_rate(evaluation.by_prompt(name), baseline.by_prompt(name))
            metrics |= {f"win_rate_{name}": result["win_rate"]}
            metrics |= {f"win_rate_{name}_{end}": result[end] for end in ("low", "high")}
    return metrics


@torch.no_grad()
def completion_log_probs(
    model: "PreTrainedModel",
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    temperature: float = 1.0,
    vocabulary: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the log-probabilities of completions in one batch; the model should be in eval mode.

    prompts, completions: rows of token ids. vocabulary: as in `Sampling`; other ids have no probability.

    Returns:
        float32 log-probabilities and the mask of real tokens, both (batch, longest completion), on the CPU.
    """
    device = next(apply_bitsandbytes_workarounds_(model).parameters()).device
    if not supports_preallocated_cache(model):
        return _right_padded_log_probs(model, prompts, completions, temperature, vocabulary)
    padded_prompts, prompt_mask = pad(prompts, value=0, side="left")
    padded_completions, completion_mask = pad(completions, value=0)
    width = padded_completions.shape[1]
    mask = torch.cat([prompt_mask, completion_mask], dim=1)
    # All prompts end in the same column, so the last logits predict the completions.
    logits = model(
        input_ids=torch.cat([padded_prompts, padded_completions], dim=1).to(device),
        attention_mask=mask.long().to(device),
        position_ids=position_ids(mask).to(device),
        use_cache=False,
        logits_to_keep=width + 1,
    ).logits[:, -width - 1 : -1, :vocabulary]
    return log_probs_and_entropies(logits, padded_completions.to(device), temperature)[0].cpu(), completion_mask


def _right_padded_log_probs(
    model: Any, prompts: Any, completions: Any, temperature: float, vocabulary: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what `completion_log_probs` does for a model with a state, which may read padding on the left."""
    device = next(model.parameters()).device
    ids, _ = pad([[*prompt, *answer] for prompt, answer in zip(prompts, completions, strict=True)], value=0)
    answers, mask = pad(completions, value=0)
    logits = model(input_ids=ids.to(device), use_cache=False).logits[..., :vocabulary]
    first = torch.tensor([len(prompt) - 1 for prompt in prompts])[:, None]
    columns = (first + torch.arange(answers.shape[1])).clamp(max=ids.shape[1] - 1).to(device)
    logits = logits[torch.arange(len(ids), device=device)[:, None], columns]
    return log_probs_and_entropies(logits, answers.to(device), temperature)[0].cpu(), mask


def _sample_answers(
    model: "PreTrainedModel", ids: list[list[int]], sampling: Sampling, seed: int, batch_size: int, progress: bool
) -> Completions:
    """Sample an answer to each row of prompt ids, with a progress bar."""
    seeds = [row_seed(seed, index) for index in range(len(ids))]
    with progress_bar(len(ids) * sampling.max_new_tokens, "answers", "token", progress) as advance:
        return sample(model, ids, sampling, seeds, batch_size, advance)


def _batches(rows: Sequence[Sequence[int]], batch_size: int, label: str, progress: bool) -> Iterator[list[int]]:
    """Yield indices of rows in batches of similar length, with a progress bar."""
    with progress_bar(len(rows), label, "row", progress) as advance:
        for batch in batches_by_length([len(row) for row in rows], batch_size):
            yield batch
            advance(len(batch))


def _text_metrics(rows: list[dict[str, Any]]) -> dict[str, float]:
    texts = [row["completion"] for row in rows]
    lengths = length_statistics([row["tokens"] for row in rows])
    return {
        "length": lengths["mean"],
        "length_p90": lengths["p90"],
        "eos_share": eos_share([row["stopped"] for row in rows]),
        "distinct_1": distinct_n(texts, 1),
        "distinct_2": distinct_n(texts, 2),
    }


def _add_scores_(
    rows: list[dict[str, Any]],
    name: str,
    reward: Reward,
    prompts: Sequence[Any],
    ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]],
) -> None:
    """Add the reward of each row's completion to the row, under `name`. Rewards of tokens are added up."""
    scores = score(
        reward,
        prompts,
        [plain_text(row["completion"]) for row in rows],
        prompt_ids=ids,
        completion_ids=completion_ids,
        columns=columns,
    )
    for row, value in zip(rows, scores, strict=True):
        row[name] = math.fsum(value) if isinstance(value, list) else value


def _reward_model_metrics(rows: list[dict[str, Any]], reward_model: Reward) -> dict[str, float]:
    scores = torch.tensor([row["reward"] for row in rows], dtype=torch.float64)
    metrics = {"reward_score": scores.mean().item()}
    if isinstance(reward_model, ModelReward) and reward_model.model.config.num_labels == 2:
        # The score of two labels is the log-odds of label 1, so its probability is the sigmoid.
        metrics["reward_positive"] = torch.sigmoid(scores).mean().item()
    return metrics


def _gold_metrics(evaluation: Evaluation) -> dict[str, float]:
    interval = mean_with_interval(evaluation.by_prompt("gold"))
    return {"gold_score": interval["mean"], "gold_score_low": interval["low"], "gold_score_high": interval["high"]}


def _add_divergence_(
    rows: list[dict[str, Any]],
    model: "PreTrainedModel",
    reference: "PreTrainedModel",
    ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    sampling: Sampling,
    batch_size: int,
    progress: bool,
) -> dict[str, float]:
    """Add each row's log ratio to the row, as `kl`, and return the metrics `kl` and `kl_per_token`."""
    modes = [(module, module.training) for module in (model, reference)]
    options = (sampling.temperature, sampling.vocabulary)
    nats, per_token, tokens = 0.0, 0.0, 0
    try:
        for module, _ in modes:
            module.eval()
        texts = [[*prompt, *answer] for prompt, answer in zip(ids, completion_ids, strict=True)]
        for batch in _batches(texts, batch_size, "KL", progress):
            prompts, answers = [ids[row] for row in batch], [completion_ids[row] for row in batch]
            log_probs, mask = completion_log_probs(model, prompts, answers, *options)
            reference_log_probs, _ = completion_log_probs(reference, prompts, answers, *options)
            estimates, count = sequence_kl(log_probs, reference_log_probs, mask), int(mask.sum())
            nats += estimates["kl"] * len(batch)
            per_token += estimates["kl_per_token_k3"] * count
            tokens += count
            ratios = torch.where(mask, log_probs - reference_log_probs, 0.0).sum(dim=1)
            for row, ratio in zip(batch, ratios.tolist(), strict=True):
                rows[row]["kl"] = ratio
    finally:
        for module, was_training in modes:
            module.train(was_training)
    return {"kl": nats / len(rows), "kl_per_token": per_token / tokens}
