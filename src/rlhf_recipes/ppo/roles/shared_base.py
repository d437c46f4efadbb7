"""A reward model that was trained as an adapter on the policy's base, and uses that base without a second copy."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.unwrapping import base_model, trunk_of
from rlhf_recipes.models import add_adapter_from, has_adapter, is_adapter, load_config, use_adapter


def shares_base(reward_model: str, policy: Any) -> bool:
    """Return whether a reward model's folder is an adapter on the base of the policy's adapter."""
    if not is_adapter(reward_model) or not has_adapter(policy):
        return False
    from peft import PeftConfig

    bases = [
        str(PeftConfig.from_pretrained(reward_model).base_model_name_or_path),
        str(base_model(policy).name_or_path),
    ]
    same = len({os.path.realpath(base) if os.path.isdir(base) else base for base in bases}) == 1
    return same and _base_is_unchanged(policy, Path(bases[0]) / "model.safetensors")


def _base_is_unchanged(policy: Any, path: Path) -> bool:
    """Return whether the layers under the policy's adapter still equal the file, so that nothing was merged into them.

    True where it cannot be checked: there is no such file, or the weights are quantized.
    """
    if not path.is_file():
        return True
    current = base_model(policy).state_dict()
    with safe_open(path, framework="pt") as saved:
        for name in saved.keys():  # noqa: SIM118  not a mapping
            head, _, leaf = name.rpartition(".")
            weight = current.get(f"{head}.base_layer.{leaf}")
            if weight is None or not weight.is_floating_point():
                continue
            original = saved.get_tensor(name).to(weight.dtype)
            if weight.shape == original.shape and not torch.equal(weight.cpu(), original):
                return False
    return True


class SharedBaseRewardModel(nn.Module):
    """A sequence classifier made of the policy's base, its own adapter on that base, and its head.

    The module owns the head only; base and adapter belong to the policy.

    Raises:
        UserError: the weights in the folder do not fit the base.
    """

    def __init__(self, policy: Any, folder: str, adapter: str) -> None:
        super().__init__()
        self.config = load_config(folder, "reward model")
        self.config._name_or_path = folder
        other_weights = add_adapter_from(policy, folder, adapter)
        heads = [value for key, value in other_weights.items() if key.endswith("score.weight")]
        if len(heads) != 1 or len(other_weights) != 1:
            names = ", ".join(other_weights) or "no head"
            raise UserError(
                f"reward model {folder} has more weights than an adapter and a head ({names}); merge the adapter into its "
                "base, and save that as a model"
            )
        self.score = nn.Linear(heads[0].shape[1], heads[0].shape[0], bias=False)
        self.score.weight = nn.Parameter(heads[0].clone(), requires_grad=False)
        self.__dict__["_shared"] = (policy, adapter)  # not a submodule, since the policy saves and moves it

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        """Return logits (batch, labels), read at the last token of each row that is not the pad id, as transformers does."""
        policy, adapter = self.__dict__["_shared"]
        with use_adapter(policy, adapter):
            states = trunk_of(policy)(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False
            ).last_hidden_state
        logits = self.score(states.to(self.score.weight.dtype))
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = (places * (input_ids != self.config.pad_token_id)).argmax(dim=-1)
        return SimpleNamespace(logits=logits[torch.arange(len(logits), device=logits.device), last])
