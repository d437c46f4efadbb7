"""A causal language model in two: the lower layers, which stay as they are, and the upper ones, which may learn.

What stands still is worked out once and read by everyone who stands on it (Havrilla et al. 2023, "trlX", section 3).
"""

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.unwrapping import base_model, trunk_of

LAYERS = ("h", "layers")
NORMS = ("ln_f", "norm", "final_layer_norm", "final_layernorm")
LEARNT_POSITIONS = "wpe"
# What else a trunk may have: what comes before its first layer and is not asked again, or does not touch the states.
HARMLESS = ("wte", "drop", "embed_tokens", "embed_in", "emb_dropout", "rotary_emb", LEARNT_POSITIONS)


class UpperLayers(nn.Module):
    """The last layers and the head of a model, on the weights of that model: it reads what the layers below leave."""

    def __init__(self, model: Any, count: int) -> None:
        super().__init__()
        trunk = trunk_of(model)
        layers, _ = _names(trunk)
        put: dict[str, nn.Module] = {layers: nn.ModuleList(list(getattr(trunk, layers))[-count:])}
        if LEARNT_POSITIONS in dict(trunk.named_children()):
            put[LEARNT_POSITIONS] = _Nothing()  # the layers below have added them
        self.trunk = _view(trunk, put)
        self.head = base_model(model).get_output_embeddings()

    def forward(self, lower_states: Tensor) -> Tensor:
        """(batch, tokens, hidden_size) -> (batch, tokens, hidden_size): the states that the head reads."""
        return torch.as_tensor(self.trunk(inputs_embeds=lower_states, use_cache=False).last_hidden_state)

    def frozen_copy(self) -> "UpperLayers":
        """One that stays as this is now; what cannot move here anyway is shared."""
        still = {id(each): each for each in self.parameters() if not each.requires_grad}
        return copy.deepcopy(self, still).requires_grad_(False).eval()


def lower_layers(model: Any, count: int) -> Any:
    """All but the last `count` layers, without the final norm, on the weights of the model. input_ids -> states."""
    trunk = trunk_of(model)
    layers, norm = _names(trunk)
    return _view(trunk, {layers: nn.ModuleList(list(getattr(trunk, layers))[:-count]), norm: nn.Identity()})


def check_layer_count(count: int, total: int) -> None:
    """Raises UserError, if nothing is above or nothing below."""
    if not 0 < count < total:
        raise UserError(f"num_layers_unfrozen is {count}; the policy has {total} layers: take 1 to {total - 1}")


@torch.no_grad()
def freeze_lower_layers_(model: Any, count: int) -> None:
    """Let only the last `count` layers, the final norm, and a head that is not tied to the embedding learn.

    Raises:
        UserError: a model that cannot be cut in two, too few layers, or an adapter on the lower ones.
    """
    trunk = trunk_of(model)
    layers, norm = _names(trunk)
    total = len(getattr(trunk, layers))
    check_layer_count(count, total)
    upper = {
        id(each) for part in (*getattr(trunk, layers)[-count:], getattr(trunk, norm)) for each in part.parameters()
    }
    lower = {name: each for name, each in trunk.named_parameters() if id(each) not in upper}
    adapted = [name for name in lower if ".lora_" in name or "modules_to_save" in name]
    if adapted:
        raise UserError(
            f"the adapter has weights below the last {count} layers ({adapted[0]}), which num_layers_unfrozen keeps "
            "still; give LoRA layers_to_transform, or leave one of the two out"
        )
    for each in lower.values():
        each.requires_grad_(False)
    _check(base_model(model), count)


def _check(base: Any, count: int) -> None:
    """Whether the two parts, one on the other, are the whole."""
    trunk, device = trunk_of(base), next(base.parameters()).device
    mode = base.training
    base.eval()
    ids = torch.arange(1, 9, device=device)[None] % base.config.vocab_size
    whole = trunk(input_ids=ids, use_cache=False).last_hidden_state
    lower = lower_layers(base, count)(input_ids=ids, use_cache=False).last_hidden_state
    same = torch.allclose(UpperLayers(base, count)(lower), whole, atol=1e-3, rtol=1e-3)
    base.train(mode)
    if not same or len(set(getattr(base.config, "layer_types", None) or ["one"])) > 1:
        raise UserError(f"num_layers_unfrozen does not know how to cut a {type(base).__name__} in two; leave it out")


def _names(trunk: nn.Module) -> tuple[str, str]:
    children = dict(trunk.named_children())
    found = [next((name for name in names if name in children), None) for names in (LAYERS, NORMS)]
    if found[0] is None or found[1] is None or set(children) - {*found, *HARMLESS}:
        raise UserError(f"num_layers_unfrozen does not know the layers of a {type(trunk).__name__}; leave it out")
    return found[0], found[1]


def _view(module: Any, put: dict[str, nn.Module]) -> Any:
    """The module with some of its parts exchanged; the others are shared with it, their weights and hooks too. The module's
    own hooks stay its own: DeepSpeed's know it by a number."""
    view = copy.copy(module)
    view._forward_pre_hooks, view._forward_hooks = OrderedDict(), OrderedDict()
    view._modules = {**module._modules, **put}
    return view


class _Nothing(nn.Module):
    def forward(self, position_ids: Tensor) -> Tensor:
        return torch.zeros((), device=position_ids.device)
