"""Policy and value as one module, so that they share an optimizer, a wrapper and a backward pass."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf_recipes.core.unwrapping import base_model
from rlhf_recipes.models import (
    ADAPTER_WEIGHTS,
    adapter_parameters,
    has_adapter,
    load_adapter_state,
    save_adapter,
    use_adapter,
)
from rlhf_recipes.optimizations import (
    UpperLayers,
    freeze_lower_layers_,
    hidden_states_of,
    lower_layers,
)
from rlhf_recipes.ppo.roles.outputs import hidden_size, policy_outputs, response_states, scatter
from rlhf_recipes.system import full_state_dict, is_sharded, load_full_state_dict


class TokenOutputs(NamedTuple):
    """Each (batch, tokens) in float32, at the generated tokens only; zero where the mask is False."""

    log_probs: Tensor
    entropies: Tensor
    values: Tensor


class ValueHead(nn.Module):
    """A linear head that reads the value of a state from the last hidden state. It is initialised to zero."""

    FILE = "value_head.safetensors"

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.score = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: (..., hidden_size) -> (...)."""
        return head_in_own_precision(self.score, hidden)

    def save_pretrained(self, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        state = {key: value.contiguous() for key, value in (state_dict or self.state_dict()).items()}
        save_file(state, Path(folder) / self.FILE)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "ValueHead":
        state = load_file(Path(folder) / cls.FILE)
        head = cls(state["score.weight"].shape[1])
        head.load_state_dict(state)
        return head


class PolicyAndValue(nn.Module):
    """A causal language model and its value: a head on the policy's transformer, or a separate model.

    Args:
        value_model: a sequence classifier with one label; None makes a `ValueHead`.
        value_adapter: the name of the value's own adapter on the policy's base; None reads the policy's hidden states.
        upper_layers: train only this many upper layers; the output of the frozen layers can be reused for many passes.
        vocabulary: ids from here on are no tokens and have no probability; None: all are.

    Raises:
        TypeError: value_model is not a sequence classifier with one label.
        UserError: the policy cannot be split at this layer.
    """

    def __init__(
        self,
        policy: nn.Module,
        value_model: nn.Module | None = None,
        value_adapter: str | None = None,
        upper_layers: int | None = None,
        vocabulary: int | None = None,
    ) -> None:
        super().__init__()
        self.policy: Any = policy
        self.policy_adapter: str | None = getattr(self.policy, "active_adapter", None)
        self.value_adapter, self.vocabulary = value_adapter, vocabulary
        self.value_model: Any = (
            check_value_model(value_model) if value_model is not None else ValueHead(hidden_size(policy))
        )
        lower, upper = None, policy
        if upper_layers is not None:
            freeze_lower_layers_(policy, upper_layers)
            lower, upper = lower_layers(policy, upper_layers), UpperLayers(policy, upper_layers)
        self._no_split_modules = base_model(policy)._no_split_modules  # FSDP reads it
        # Views of the policy's modules; not registered here, since the policy saves and moves them.
        self.__dict__.update(lower=lower, upper=upper)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        response_mask: Tensor,
        temperature: float = 1.0,
        entropy_gradient: bool = False,
        lower_states: Tensor | None = None,
    ) -> TokenOutputs:
        """Return log-probabilities, entropies and values of the generated tokens, (batch, tokens) each.

        Args:
            input_ids, attention_mask: (batch, width); each row is a query, its answer, and padding.
            response_mask: (batch, tokens), True on generated tokens.
            entropy_gradient: whether the entropies carry a gradient.
            lower_states: (batch, width, hidden_size) from `lower_outputs`; None runs all layers.
        """
        episodes = (input_ids, attention_mask, response_mask)
        policy = self.policy if lower_states is None else self.upper
        hidden, log_probs, entropies = policy_outputs(
            policy, *episodes, temperature, entropy_gradient, lower_states, self.vocabulary
        )
        if isinstance(self.value_model, ValueHead):
            if self.value_adapter is not None:
                with use_adapter(self.policy, self.value_adapter):
                    hidden = response_states(policy, *episodes, lower_states)
            values = self.value_model(hidden)
        else:
            states = response_states(self.value_model, *episodes)
            values = head_in_own_precision(self.value_model.score, states)
        return TokenOutputs(log_probs, entropies, scatter(values, response_mask))

    def lower_outputs(self, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor) -> tuple[Tensor]:
        """Return the hidden states after the frozen lower layers, (batch, width, hidden_size), in a tuple."""
        return (hidden_states_of(self.lower, attention_mask, input_ids=input_ids),)

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: Any = None, **options: Any) -> None:
        """Recompute activations in the backward pass; `Trainer` calls it for ``gradient_checkpointing``."""
        for module in (self.policy, self.value_model):
            if hasattr(module, "activation_checkpointing_enable"):
                module.activation_checkpointing_enable(activation_checkpointing_kwargs, **options)
            elif not isinstance(module, ValueHead):
                module.gradient_checkpointing_enable(activation_checkpointing_kwargs, **options)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **options: Any) -> None:
        """Call `activation_checkpointing_enable`: this is its name before transformers 5.23."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def policy_parameters(self) -> list[nn.Parameter]:
        """Return the trainable parameters of the policy."""
        value = {id(parameter) for parameter in self.value_parameters()}
        return [each for each in self.parameters() if each.requires_grad and id(each) not in value]

    def value_parameters(self) -> list[nn.Parameter]:
        """Return the trainable parameters of the value only: its head or model, and its adapter."""
        own = [] if self.value_adapter is None else adapter_parameters(self.policy, self.value_adapter)
        return [each for each in [*self.value_model.parameters(), *own] if each.requires_grad]

    def save_pretrained(
        self, folder: str | Path, state_dict: dict[str, Tensor] | None = None, value: bool = True
    ) -> None:
        """Save the policy in `folder`, as any causal language model or adapter, and the value in ``value_model/``."""
        policy = _select_prefix(state_dict, "policy.")
        if self.policy_adapter is None:
            self.policy.save_pretrained(folder, state_dict=policy)
        else:
            save_adapter(self.policy, self.policy_adapter, folder, policy)
            base_model(self.policy).generation_config.save_pretrained(folder)
        if value:
            value_folder = Path(folder) / "value_model"
            self.value_model.save_pretrained(value_folder, state_dict=_select_prefix(state_dict, "value_model."))
            if self.value_adapter is not None:
                save_adapter(self.policy, self.value_adapter, value_folder, policy)

    def load_pretrained(self, folder: str | Path) -> None:
        """Load the weights that `save_pretrained` left, in place. All ranks must call it where weights are sharded."""
        value_folder = Path(folder) / "value_model"
        if is_sharded(self):
            state = _saved_state("policy.", self.policy, Path(folder), self.policy_adapter)
            if self.value_adapter is not None:
                state |= _saved_state("policy.", self.policy, value_folder, self.value_adapter)
            state |= _saved_state("value_model.", self.value_model, value_folder, None)
            load_full_state_dict(self, full_state_dict(self) | state)
            return
        _load_weights(self.policy, Path(folder), self.policy_adapter)
        if self.value_adapter is not None:
            load_adapter_state(self.policy, self.value_adapter, load_file(value_folder / ADAPTER_WEIGHTS))
        if isinstance(self.value_model, ValueHead):
            self.value_model.load_state_dict(load_file(value_folder / ValueHead.FILE))
        else:
            own: Any = self.value_model.active_adapter if has_adapter(self.value_model) else None
            _load_weights(self.value_model, value_folder, own)


def head_in_own_precision(score: Any, hidden: Tensor) -> Tensor:
    """Apply a head in its own precision, (..., hidden_size) -> (...) in float32: autocast would round the values."""
    with torch.autocast(hidden.device.type, enabled=False):
        return score(hidden.to(score.weight.dtype)).squeeze(-1).float()


def _select_prefix(state_dict: dict[str, Tensor] | None, prefix: str) -> dict[str, Tensor] | None:
    if state_dict is None:
        return None
    return {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}


def _load_weights(module: Any, folder: Path, adapter: str | None) -> None:
    if adapter is not None:
        load_adapter_state(module, adapter, load_file(folder / ADAPTER_WEIGHTS))
    else:
        module.load_state_dict(type(module).from_pretrained(folder, dtype=module.dtype).state_dict())


def _saved_state(prefix: str, module: Any, folder: Path, adapter: str | None) -> dict[str, Tensor]:
    """Return the weights in a folder, under their names in a `PolicyAndValue`."""
    if isinstance(module, ValueHead):
        state = load_file(folder / ValueHead.FILE)
    elif adapter is None:
        state = type(module).from_pretrained(folder, dtype=module.dtype).state_dict()
    else:
        saved = load_file(folder / ADAPTER_WEIGHTS)
        state = {f"{name.removesuffix('.weight')}.{adapter}.weight": tensor for name, tensor in saved.items()}
    return {prefix + name: tensor for name, tensor in state.items()}


def check_value_model(model: nn.Module) -> nn.Module:
    """Return a `ValueHead`, or a sequence classifier with one label whose head is ``score``; else raise a TypeError."""
    score = getattr(model, "score", None)
    outputs = getattr(score, "out_features", None)
    if isinstance(model, ValueHead) or (isinstance(score, nn.Module) and outputs == 1):
        return model
    raise TypeError(
        f"value_model is a {type(model).__name__}"
        + (f" with {outputs} labels" if outputs else "")
        + "; give AutoModelForSequenceClassification with num_labels=1, or None for a value head on the policy"
    )
