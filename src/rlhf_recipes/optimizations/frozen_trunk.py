"""A causal language model split in two: frozen lower layers and trainable upper layers, on the same weights.

The output of frozen layers is computed once per token and shared by the policy, its reference and every epoch
(Havrilla et al. 2023, "trlX", section 3). The run chooses which layers are frozen (`num_layers_unfrozen`); to compute
them once instead of every time changes nothing beyond rounding.
"""

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.unwrapping import base_model, trunk_of

# Names in transformers' trunks of the list of layers, the final norm, and trained positions.
LAYERS = ("h", "layers")
NORMS = ("ln_f", "norm", "final_layer_norm", "final_layernorm")
TRAINED_POSITIONS = "wpe"
# Other parts a trunk may have: they run only before its first layer, or do not change the states.
OTHER_PARTS = (
    "wte",
    "drop",
    "embed_tokens",
    "embed_in",
    "emb_dropout",
    "embed_dropout",
    "rotary_emb",
    TRAINED_POSITIONS,
)


class UpperLayers(nn.Module):
    """The last `count` layers, the final norm and the head of a model, sharing its weights.

    Its input is the output of `lower_layers`.
    """

    def __init__(self, model: Any, count: int) -> None:
        super().__init__()
        trunk = trunk_of(model)
        layers, _ = _layer_names(trunk)
        replaced: dict[str, nn.Module] = {layers: nn.ModuleList(list(getattr(trunk, layers))[-count:])}
        if TRAINED_POSITIONS in dict(trunk.named_children()):
            replaced[TRAINED_POSITIONS] = _ZeroPositions()  # the lower layers' input already contains them
        self.trunk = _view(trunk, replaced)
        self.head = base_model(model).get_output_embeddings()

    def forward(self, lower_states: Tensor) -> Tensor:
        """Return the states that the head reads: (batch, tokens, hidden_size) -> (batch, tokens, hidden_size)."""
        return torch.as_tensor(self.trunk(inputs_embeds=lower_states, use_cache=False).last_hidden_state)

    def frozen_copy(self) -> "UpperLayers":
        """Return a copy with the current weights, frozen, in eval mode. Weights that are frozen here are shared."""
        shared = {id(weight): weight for weight in self.parameters() if not weight.requires_grad}
        return copy.deepcopy(self, shared).requires_grad_(False).eval()


def lower_layers(model: Any, count: int) -> Any:
    """Return the trunk without its last `count` layers and without its final norm, sharing the model's weights."""
    trunk = trunk_of(model)
    layers, norm = _layer_names(trunk)
    return _view(trunk, {layers: nn.ModuleList(list(getattr(trunk, layers))[:-count]), norm: nn.Identity()})


def check_layer_count(count: int, total: int) -> None:
    """Check that `count` upper layers of `total` leave at least one layer on either side.

    Raises:
        UserError: they do not.
    """
    if not 0 < count < total:
        raise UserError(f"num_layers_unfrozen is {count}; the policy has {total} layers: take 1 to {total - 1}")


def check_layer_names(model: Any) -> None:
    """Check that a model can be split into lower and upper layers, as far as its modules tell; it may be without weights.

    Raises:
        UserError: it cannot.
    """
    _layer_names(trunk_of(model))
    if len(set(getattr(model.config.get_text_config(), "layer_types", None) or ["one"])) > 1:
        raise _unknown_split(model)


def _unknown_split(model: Any) -> UserError:
    return UserError(f"num_layers_unfrozen does not know how to split a {type(model).__name__}; leave it out")


@torch.no_grad()
def freeze_lower_layers_(model: Any, count: int) -> None:
    """Freeze all but the last `count` layers of the model and its final norm; an untied head stays trainable too.

    Raises:
        UserError: the architecture cannot be split, `count` leaves no layer on one side, or the lower layers have an
            adapter.
    """
    trunk = trunk_of(model)
    layers, norm = _layer_names(trunk)
    total = len(getattr(trunk, layers))
    check_layer_count(count, total)
    upper_modules = (*getattr(trunk, layers)[-count:], getattr(trunk, norm))
    upper = {id(weight) for module in upper_modules for weight in module.parameters()}
    lower = {name: weight for name, weight in trunk.named_parameters() if id(weight) not in upper}
    adapted = [name for name in lower if ".lora_" in name or "modules_to_save" in name]
    if adapted:
        raise UserError(
            f"the adapter has weights below the last {count} layers ({adapted[0]}), which num_layers_unfrozen "
            "freezes; give LoRA layers_to_transform, or leave one of the two out"
        )
    for weight in lower.values():
        weight.requires_grad_(False)
    _check_split(base_model(model), count)


def _check_split(base: Any, count: int) -> None:
    """Check on a few tokens that the upper layers on top of the lower ones compute what the whole model does."""
    trunk, device = trunk_of(base), next(base.parameters()).device
    was_training = base.training
    base.eval()
    ids = torch.arange(1, 9, device=device)[None] % base.config.get_text_config().vocab_size
    expected = trunk(input_ids=ids, use_cache=False).last_hidden_state
    lower = lower_layers(base, count)(input_ids=ids, use_cache=False).last_hidden_state
    equal = torch.allclose(UpperLayers(base, count)(lower), expected, atol=1e-3, rtol=1e-3)
    base.train(was_training)
    check_layer_names(base)
    if not equal:
        raise _unknown_split(base)


def _layer_names(trunk: nn.Module) -> tuple[str, str]:
    """Return the trunk's names of its list of layers and of its final norm."""
    children = dict(trunk.named_children())
    layers, norm = (next((name for name in names if name in children), None) for names in (LAYERS, NORMS))
    if layers is None or norm is None or set(children) - {layers, norm, *OTHER_PARTS}:
        raise UserError(f"num_layers_unfrozen does not know the layers of a {type(trunk).__name__}; leave it out")
    return layers, norm


def _view(module: Any, replaced: dict[str, nn.Module]) -> Any:
    """Return a shallow copy of the module with some of its children replaced; the other children are shared.

    The copy has no hooks: DeepSpeed's hooks know their module by a number.
    """
    view = copy.copy(module)
    view._forward_pre_hooks, view._forward_hooks = OrderedDict(), OrderedDict()
    view._modules = {**module._modules, **replaced}
    return view


class _ZeroPositions(nn.Module):
    """Stands in for a position embedding that the input already contains."""

    def forward(self, position_ids: Tensor) -> Tensor:
        return torch.zeros((), device=position_ids.device)
