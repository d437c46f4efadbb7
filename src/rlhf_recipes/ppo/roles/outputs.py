"""What a policy gives for generated tokens: hidden states, log-probabilities and entropies."""

from typing import Any

import torch
from torch import Tensor, nn

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.tensors import log_probs_and_entropies
from rlhf_recipes.core.unwrapping import base_model, trunk_of
from rlhf_recipes.models import transform_logits
from rlhf_recipes.optimizations import SHORT_ATTENTION, UpperLayers, hidden_states_at, pad_to_tile


def response_states(
    model: Any, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor, lower_states: Tensor | None = None
) -> Tensor:
    """Return the hidden state that each generated token was sampled from, (generated tokens, hidden_size).

    It is the state of the position before the token. Other positions are dropped here, so that logits are never computed for
    prompts or padding. `UpperLayers` read lower_states, any other model reads input_ids.
    """
    columns = answer_columns(attention_mask, response_mask, first=-1)
    if isinstance(model, UpperLayers) and lower_states is not None:
        return hidden_states_at(model.trunk, columns, attention_mask, inputs_embeds=lower_states)
    return hidden_states_at(trunk_of(model), columns, attention_mask, input_ids=input_ids)


def answer_columns(attention_mask: Tensor, response_mask: Tensor, first: int = 0) -> Tensor:
    """Return True at the columns of each row's answer, shifted by `first`. (batch, width) bool."""
    ends = attention_mask.sum(1, keepdim=True) + first
    columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)[None, :]
    return (columns < ends) & (columns >= ends - response_mask.sum(1, keepdim=True))


def policy_outputs(
    policy: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    response_mask: Tensor,
    temperature: float = 1.0,
    entropy_gradient: bool = False,
    lower_states: Tensor | None = None,
    vocabulary: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return states (generated tokens, hidden_size), log-probabilities and entropies (batch, tokens) of these tokens.

    vocabulary: ids from here on are never sampled, so they have no probability; None: all have.
    """
    hidden = response_states(policy, input_ids, attention_mask, response_mask, lower_states)
    chosen = input_ids[answer_columns(attention_mask, response_mask)]
    logits = logits_from_states(policy, pad_to_tile(hidden))[:, :vocabulary]
    both = log_probs_and_entropies(logits, pad_to_tile(chosen), temperature)
    log_probs, entropies = (each[: len(chosen)] for each in both)
    entropies = entropies if entropy_gradient else entropies.detach()
    return hidden, scatter(log_probs, response_mask), scatter(entropies, response_mask)


def logits_from_states(policy: Any, states: Tensor) -> Tensor:
    """Return the policy's logits for its last hidden states: (n, hidden_size) -> (n, vocabulary)."""
    if isinstance(policy, UpperLayers):
        return transform_logits(policy.trunk.config, policy.head(states))
    base = base_model(policy)
    return transform_logits(base.config, base.get_output_embeddings()(states))


def scatter(values: Tensor, mask: Tensor) -> Tensor:
    """Put one value per True position into a tensor of the mask's shape; zero elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def hidden_size(model: nn.Module) -> int:
    """Return the width of the states that the head reads, which may differ from the width of the layers."""
    return int(base_model(model).get_output_embeddings().weight.shape[-1])


@torch.no_grad()
def check_head(policy: nn.Module) -> None:
    """Check that `logits_from_states` gives the policy's logits, which log-probabilities rely on.

    Raises:
        UserError: the model changes its logits in a way that `transform_logits` does not know.
    """
    base = base_model(policy)
    device, mode, attention = next(base.parameters()).device, base.training, base.config._attn_implementation
    if device.type == "meta":
        return  # another process holds the weights, and checks them
    ids = torch.arange(1, 9, device=device)[None] % base.config.get_text_config().vocab_size
    unsupported = device.type == "cpu" and attention not in (
        None,
        "eager",
        "sdpa",
        SHORT_ATTENTION,
    )  # made for a GPU, not there yet
    base.eval()
    try:
        if unsupported:
            base.set_attn_implementation("eager")
        logits = base(input_ids=ids, use_cache=False).logits
        expected = logits_from_states(base, trunk_of(base)(input_ids=ids, use_cache=False).last_hidden_state)
    finally:
        if unsupported:
            base.set_attn_implementation(attention)
        base.train(mode)
    if logits.shape != expected.shape or (logits - expected).abs().max() > 1e-3 * logits.abs().max():
        raise UserError(
            f"a {type(base).__name__} changes the logits of its head in a way that PPOTrainer does not know; use another model"
        )
