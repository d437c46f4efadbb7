"""Sequence classifiers as rewards."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from rlhf_recipes.core.errors import RankError, UserError
from rlhf_recipes.core.progress import progress_bar
from rlhf_recipes.core.tensors import batches_by_length, pad
from rlhf_recipes.core.unwrapping import base_model
from rlhf_recipes.data import (
    answer_ends,
    bos_prefix,
    column_template_options,
    decode_prompt,
    encode_completion,
    ensure_chat_template_,
    is_conversation,
    is_ids,
    plain_text,
)
from rlhf_recipes.models import context_length, text_config, vocabulary_size
from rlhf_recipes.scoring.functions import ScoresWithPrefixes
from rlhf_recipes.system import apply_bitsandbytes_workarounds_, tokens_per_forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ModelReward:
    """A sequence classifier as a reward: one label is the score itself, two labels give the log-odds of label 1.

    Args:
        tokenizer: the reward model's. With the policy's vocabulary, prefix and chat template the model reads the policy's
            ids, otherwise text.
        name: the reward's name in logs and messages.
        batch_size: rows in one forward pass.
        prefix_scores: also return the score of every prefix of each row, as `ScoresWithPrefixes`. It costs no further
            pass, and is left out if the model has another vocabulary than the policy or no head named ``score``.

    Raises:
        UserError: more than two labels, an encoder that reads a row at its first token, or too few token embeddings.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        policy_tokenizer: "PreTrainedTokenizerBase",
        name: str = "reward_model",
        batch_size: int = 64,
        prefix_scores: bool = False,
    ) -> None:
        if getattr(model.config, "num_labels", 1) not in (1, 2):
            raise UserError(
                f"reward model {name} has {model.config.num_labels} labels; give a model with one (a score) or two (bad, good)"
            )
        if not hasattr(base_model(model), "score") and getattr(tokenizer, "cls_token_id", None) is not None:
            raise UserError(
                f"reward model {name} is a {type(base_model(model)).__name__}, which reads a row at its first token; give "
                "one on a causal model, which reads it at its last (the reward stage trains one), or wrap it in a function"
            )
        self.model, self.name, self.batch_size = apply_bitsandbytes_workarounds_(model).eval(), name, batch_size
        self.tokenizer, self.policy_tokenizer = tokenizer, policy_tokenizer
        # With the policy's vocabulary and prefix the model reads the policy's ids; otherwise it reads text.
        self.shares_ids = tokenizer is policy_tokenizer or (
            tokenizer.get_vocab() == policy_tokenizer.get_vocab()
            and bos_prefix(tokenizer) == bos_prefix(policy_tokenizer)
        )
        self.vocabulary = vocabulary = vocabulary_size(model.config)
        # A pad token added without a row in the embedding is never looked up: padding is masked.
        ids = [index for index in tokenizer.get_vocab().values() if index != tokenizer.pad_token_id]
        if vocabulary is not None and vocabulary <= max(ids):
            raise UserError(
                f"reward model {name} has {vocabulary} token embeddings, but its tokenizer has the id {max(ids)}; "
                "give the tokenizer that belongs to the reward model (reward_processing_classes)"
            )
        if not self.shares_ids:
            ensure_chat_template_(tokenizer)
        self.shift, self.scale = 0.0, 1.0
        self.progress = False  # whether scoring shows a progress bar
        self.prefix_scores = prefix_scores and self.shares_ids and hasattr(base_model(model), "score")

    def normalize(self) -> None:
        """Scale all later scores to mean 0 and variance 1 over the model's held-out rows (Ziegler et al. 2019, 2.1).

        Reward models of the same preferences may differ tenfold in scale; a KL coefficient is relative to that scale.

        Raises:
            UserError: the model's config has no `score_mean` and `score_std`.
        """
        mean, deviation = (getattr(self.model.config, name, None) for name in ("score_mean", "score_std"))
        if mean is None or not deviation:
            raise UserError(
                f"reward model {self.name} does not know the mean and spread of its scores (config.json has no score_mean "
                "and score_std); train it with a held-out split, or leave normalize_rewards off"
            )
        self.shift, self.scale = float(mean), float(deviation)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        **columns: Sequence[Any],
    ) -> list[float]:
        """Score each completion; with `prefix_scores` the result is a `ScoresWithPrefixes`.

        Raises:
            RankError: a score is not finite; names the sample.
        """
        if self.shares_ids and not self._has_other_template(prompts):
            pairs = zip(prompt_ids, completion_ids, strict=True)
            scores = self.score_ids([self._known_ids([*prompt, *answer]) for prompt, answer in pairs])
        else:
            ends = set(self.policy_tokenizer.all_special_ids) | answer_ends(self.policy_tokenizer)
            finished = [bool(ids) and ids[-1] in ends for ids in completion_ids]
            options = column_template_options(columns, len(prompts))
            rows = zip(prompts, completions, finished, options, strict=True)
            scores = list(self.score_ids([self._ids(*row) for row in rows]))  # their prefixes are none of the policy's
        for score, prompt, completion in zip(scores, prompts, completions, strict=True):
            if not math.isfinite(score):
                raise RankError(
                    f"reward model {self.name} gives {score} for the completion {plain_text(completion)!r} of the prompt "
                    f"{plain_text(prompt)[:200]!r}; check its weights"
                )
        return scores

    def _has_other_template(self, prompts: Sequence[Any]) -> bool:
        """Whether conversations were written for the model by another chat template than the policy's."""
        own, policys = self.tokenizer.chat_template, self.policy_tokenizer.chat_template
        return bool(own) and own != policys and any(is_conversation(prompt) for prompt in prompts)

    def _ids(self, prompt: Any, completion: Any, finished: bool, template: Mapping[str, Any]) -> list[int]:
        """Tokenize prompt and completion as the model was trained on them, with their end if the policy ended the answer."""
        if is_conversation(prompt):
            turns = [{"role": "assistant", "content": plain_text(completion)}]
            before, after = encode_completion(prompt, turns, self.tokenizer, **template)
        else:
            if is_ids(prompt):
                prompt = decode_prompt(prompt, self.policy_tokenizer, skip_special_tokens=True)
            before, after = encode_completion(prompt, plain_text(completion), self.tokenizer)
        cut = not finished and bool(after) and after[-1] in answer_ends(self.tokenizer)
        return [*before, *(after[:-1] if cut else after)]

    def _known_ids(self, ids: list[int]) -> list[int]:
        """Leave out ids without an embedding here: a policy with more of them may sample one, which is no text either."""
        return ids if self.vocabulary is None else [token for token in ids if token < self.vocabulary]

    @torch.no_grad()
    def score_ids(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Score rows of the reward model's token ids; a row longer than the model's context is cut at its start."""
        limit = context_length(self.model.config)
        rows = [row[-limit:] if limit else row for row in rows]
        scores = [0.0] * len(rows)
        parameter = next(self.model.parameters())
        max_tokens = tokens_per_forward(parameter.device, parameter.dtype == torch.bfloat16)
        prefix_scores = [torch.empty(0)] * len(rows)
        with progress_bar(len(rows), f"scores of {self.name}", "row", self.progress) as advance:
            for batch in batches_by_length([len(row) for row in rows], self.batch_size, max_tokens):
                batch_rows = [rows[index] for index in batch]
                if self.prefix_scores:
                    logits, prefix_logits = classify_prefixes(self.model, batch_rows)
                    for index, row, row_logits in zip(batch, batch_rows, prefix_logits, strict=True):
                        prefix_scores[index] = self._scores(row_logits[: len(row)])
                else:
                    logits = classify(self.model, batch_rows)
                for index, value in zip(batch, self._scores(logits).tolist(), strict=True):
                    scores[index] = value
                advance(len(batch))
        return ScoresWithPrefixes(scores, prefix_scores) if self.prefix_scores else scores

    def _scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the score from logits, normalized, on the CPU: (..., labels) -> (...), float64."""
        values = logits[..., 0] if logits.shape[-1] == 1 else logits[..., 1] - logits[..., 0]
        return ((values.double() - self.shift) / self.scale).cpu()


def classify(model: "PreTrainedModel", rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Compute the logits of rows of ids: (batch, labels), float32.

    Rows are padded on the right with the model's pad id. transformers' models read a row at its last token that is not
    the pad id. So if pad and EOS are one token, an EOS at the end of a row is not read: in training as here, alone or
    in a batch.
    """
    if _needs_single_rows(model) and len(rows) > 1:
        return torch.cat([classify(model, [row]) for row in rows])
    output = model(**_padded(model, rows))
    return torch.as_tensor(output.logits).float()


def classify_prefixes(model: Any, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Compute what `classify` does and, for each row, the logits as if it ended at each of its tokens.

    One forward pass gives both, because transformers evaluates the head at every token.

    Returns:
        Logits (batch, labels), and for each row logits (width, labels). The latter are (0, labels) for a model that
        does not evaluate its head at every token.
    """
    outputs: list[torch.Tensor] = []
    hook = base_model(model).score.register_forward_hook(lambda module, inputs, logits: outputs.append(logits.float()))
    try:
        logits = classify(model, rows)
    finally:
        hook.remove()
    prefix_logits = [row_logits for batch in outputs if batch.dim() == 3 for row_logits in batch]
    complete = len(prefix_logits) == len(rows) and all(
        len(row_logits) >= len(row) for row_logits, row in zip(prefix_logits, rows, strict=True)
    )
    return logits, prefix_logits if complete else [logits.new_empty(0, logits.shape[-1])] * len(rows)


def _needs_single_rows(model: Any) -> bool:
    """Whether the model reads one row at a time: it has no pad id, or one beyond its embedding."""
    pad_id = text_config(model.config).pad_token_id
    return pad_id is None or pad_id >= (vocabulary_size(model.config) or math.inf)


def _padded(model: Any, rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    ids, mask = pad(rows, value=text_config(model.config).pad_token_id or 0)
    device = next(model.parameters()).device
    return {"input_ids": ids.to(device), "attention_mask": mask.long().to(device)}
