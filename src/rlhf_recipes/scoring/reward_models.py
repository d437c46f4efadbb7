"""Sequence classifiers as rewards."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from rlhf_recipes.core.errors import RankError, UserError
from rlhf_recipes.core.tensors import batches_by_length, pad
from rlhf_recipes.core.unwrapping import base_model
from rlhf_recipes.data import ensure_chat_template_, is_conversation, plain_text, prompt_text, text_ids
from rlhf_recipes.models import context_length
from rlhf_recipes.scoring.functions import ScoresWithPrefixes
from rlhf_recipes.system import apply_bitsandbytes_workarounds_, tokens_per_forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ModelReward:
    """A sequence classifier as a reward: one label is the score itself, two labels give the log-odds of label 1.

    prefix_scores: also return the score of every prefix of each row, as `ScoresWithPrefixes`. It costs no further pass, and
        is left out where the model reads other token ids than the policy or has no head named ``score``.
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
                f"reward model {name} has {model.config.num_labels} labels; a reward model has one (a score) or two (bad, good)"
            )
        if not hasattr(base_model(model), "score") and getattr(tokenizer, "cls_token_id", None) is not None:
            raise UserError(
                f"reward model {name} is a {type(base_model(model)).__name__}, which reads a row at its first token; give one on a "
                "causal model, which reads it at its last (as the reward stage leaves it), or wrap it in a function"
            )
        self.model, self.name, self.batch_size = apply_bitsandbytes_workarounds_(model).eval(), name, batch_size
        self.tokenizer, self.policy_tokenizer = tokenizer, policy_tokenizer
        # The same vocabulary reads the policy's ids as they are; another one reads the text.
        self.shares_ids = tokenizer is policy_tokenizer or tokenizer.get_vocab() == policy_tokenizer.get_vocab()
        vocabulary = getattr(model.config, "vocab_size", None)
        # A pad token that was added without a row in the embedding is never looked up: padding is masked.
        ids = [index for index in tokenizer.get_vocab().values() if index != tokenizer.pad_token_id]
        if vocabulary is not None and vocabulary <= max(ids):
            raise UserError(
                f"reward model {name} has {vocabulary} token embeddings, but its tokenizer has the id {max(ids)}; "
                "give the reward model its own tokenizer (reward_processing_classes)"
            )
        if not self.shares_ids:
            ensure_chat_template_(tokenizer)
        self.shift, self.scale = 0.0, 1.0
        self.prefix_scores = prefix_scores and self.shares_ids and hasattr(base_model(model), "score")

    def normalize(self) -> None:
        """From now on give scores of mean 0 and variance 1 over the reward model's held-out rows (Ziegler et al. 2019, 2.1).

        Two reward models of one thing may differ tenfold in scale; a KL coefficient only means something against a known one.
        """
        mean, deviation = (getattr(self.model.config, name, None) for name in ("score_mean", "score_std"))
        if mean is None or not deviation:
            raise UserError(
                f"reward model {self.name} does not know the mean and spread of its scores (score_mean, score_std in config.json); "
                "train it with a held-out split, or leave normalize_rewards off"
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
        if self.shares_ids:
            scores = self.score_ids([[*p, *c] for p, c in zip(prompt_ids, completion_ids, strict=True)])
        else:
            ended = [bool(ids) and ids[-1] == self.policy_tokenizer.eos_token_id for ids in completion_ids]
            texts = [self._text(*row) for row in zip(prompts, completions, ended, strict=True)]
            rows = zip(texts, prompts, strict=True)
            scores = self.score_ids([self._ids(text, is_conversation(prompt)) for text, prompt in rows])
        for score, prompt, completion in zip(scores, prompts, completions, strict=True):
            if not math.isfinite(score):
                raise RankError(
                    f"reward model {self.name} gives {score} for the completion {plain_text(completion)!r} of the prompt "
                    f"{plain_text(prompt)[:200]!r}; look at its weights"
                )
        return scores

    def _text(self, prompt: Any, completion: Any, ended: bool) -> str:
        """Prompt and completion as the reward model learnt to read them, its own EOS last if the policy's stood there."""
        if is_conversation(prompt):
            messages = [*prompt, {"role": "assistant", "content": plain_text(completion)}]
            text = str(self.tokenizer.apply_chat_template(messages, tokenize=False))
        else:
            if isinstance(prompt, (list, tuple)):  # token ids
                prompt = self.policy_tokenizer.decode(prompt, skip_special_tokens=True)
            text = prompt_text(prompt, self.tokenizer) + plain_text(completion) + self.tokenizer.eos_token
        unended, _, after = text.rpartition(self.tokenizer.eos_token)
        return unended if not ended and not after.strip() else text  # some templates break the line after their EOS

    def _ids(self, text: str, of_template: bool) -> list[int]:
        """A template writes BOS itself."""
        if of_template:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return text_ids(text, self.tokenizer)

    @torch.no_grad()
    def score_ids(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Score rows of the reward model's token ids; a row longer than its context keeps its end."""
        limit = context_length(self.model.config)
        rows = [row[-limit:] if limit else row for row in rows]
        scores = [0.0] * len(rows)
        weight = next(self.model.parameters())
        max_tokens = tokens_per_forward(weight.device, weight.dtype == torch.bfloat16)
        prefix_scores = [torch.empty(0)] * len(rows)
        for batch in batches_by_length([len(row) for row in rows], self.batch_size, max_tokens):
            batch_rows = [rows[index] for index in batch]
            if self.prefix_scores:
                logits, prefix_logits = classify_prefixes(self.model, batch_rows)
                for index, row, row_logits in zip(batch, batch_rows, prefix_logits, strict=True):
                    prefix_scores[index] = self._values(row_logits[: len(row)])
            else:
                logits = classify(self.model, batch_rows)
            for index, value in zip(batch, self._values(logits).tolist(), strict=True):
                scores[index] = value
        return ScoresWithPrefixes(scores, prefix_scores) if self.prefix_scores else scores

    def _values(self, logits: torch.Tensor) -> torch.Tensor:
        """(..., labels) -> (...): the one label, or the log-odds of the second, normalised."""
        values = logits[..., 0] if logits.shape[-1] == 1 else logits[..., 1] - logits[..., 0]
        return ((values.double() - self.shift) / self.scale).cpu()


def classify(model: "PreTrainedModel", rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Logits (batch, labels) in float32 of rows of ids, padded on the right with the model's own pad id.

    The models of transformers read a row at its last token that is not the pad id. So where pad and EOS are one token,
    an EOS at the end of a row is not looked at: in training as here, alone or in a batch.
    """
    if _one_by_one(model) and len(rows) > 1:
        return torch.cat([classify(model, [row]) for row in rows])
    output = model(**_padded(model, rows))
    return torch.as_tensor(output.logits).float()


def classify_prefixes(model: Any, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What `classify` gives, and of each row the logits (width, labels) as if it ended at each of its tokens.

    One pass gives both, where the model's head is asked at every token, as transformers does; else there is nothing of
    the second.
    """
    found: list[torch.Tensor] = []
    hook = base_model(model).score.register_forward_hook(lambda module, given, logits: found.append(logits.float()))
    try:
        logits = classify(model, rows)
    finally:
        hook.remove()
    everywhere = [row for batch in found if batch.dim() == 3 for row in batch]
    whole = len(everywhere) == len(rows) and all(
        len(each) >= len(row) for each, row in zip(everywhere, rows, strict=True)
    )
    return logits, everywhere if whole else [logits.new_empty(0, logits.shape[-1])] * len(rows)


def _one_by_one(model: Any) -> bool:
    """Without a pad id, or with one beyond its embedding, such a model takes one row at a time."""
    pad_id = model.config.pad_token_id
    return pad_id is None or pad_id >= getattr(model.config, "vocab_size", math.inf)


def _padded(model: Any, rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    ids, mask = pad(rows, value=model.config.pad_token_id or 0)
    device = next(model.parameters()).device
    return {"input_ids": ids.to(device), "attention_mask": mask.long().to(device)}
