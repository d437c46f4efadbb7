"""Padding-free forward passes against each row alone, in float64 and by an unchanged model."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_recipes.core.unwrapping import trunk_of
from rlhf_recipes.optimizations.attention import fuse_kernels_
from rlhf_recipes.optimizations.frozen_trunk import UpperLayers, lower_layers
from rlhf_recipes.optimizations.packing import TILE, PackedLayout, hidden_states_at, hidden_states_of

LENGTHS = [5, 12, 1, 12, 9]
ANSWERS = [3, 12, 1, 2, 0]  # how many of each row's last tokens are selected
WIDTH = 14  # two more columns than the longest row, and no multiple of TILE
MakeModel = Callable[..., Any]


@pytest.fixture
def rows() -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, the mask of real tokens and the mask of selected tokens, each (rows, width); padding holds valid ids."""
    ids = torch.randint(0, 250, (len(LENGTHS), WIDTH), generator=torch.Generator().manual_seed(0))
    real, selected = (torch.zeros(len(LENGTHS), WIDTH, dtype=torch.bool) for _ in range(2))
    for row, (length, answer) in enumerate(zip(LENGTHS, ANSWERS, strict=True)):
        real[row, :length] = True
        selected[row, length - answer : length] = True
    return ids, real, selected


def states_row_by_row(model: Any, ids: Tensor) -> list[Tensor]:
    """Return the last hidden states of each row, computed alone, without padding and in float64."""
    trunk = copy.deepcopy(trunk_of(model)).double()
    return [
        trunk(input_ids=row[None, :length], use_cache=False).last_hidden_state[0]
        for row, length in zip(ids, LENGTHS, strict=True)
    ]


def fused(model: Any) -> Any:
    return fuse_kernels_(copy.deepcopy(model), torch.device("cpu"))


def test_selected_hidden_states_and_gradients_match_unpadded_rows(make_model: MakeModel, rows: Any) -> None:
    ids, real, selected = rows
    plain = make_model(0, initializer_range=0.2)
    packed, exact = fused(plain), copy.deepcopy(trunk_of(plain)).double()
    actual = hidden_states_at(trunk_of(packed), selected, real.long(), input_ids=ids)
    expected = torch.cat(
        [
            exact(input_ids=row[None, :length]).last_hidden_state[0, length - answer :]
            for row, length, answer in zip(ids, LENGTHS, ANSWERS, strict=True)
        ]
    )
    torch.testing.assert_close(actual.double(), expected, atol=2e-5, rtol=0)
    weights = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (actual * weights.float()).sum().backward()
    (expected * weights).sum().backward()
    for (name, parameter), exact_parameter in zip(
        trunk_of(packed).named_parameters(), exact.parameters(), strict=True
    ):
        scale = exact_parameter.grad.abs().max().clamp(min=1.0)
        torch.testing.assert_close(
            parameter.grad.double() / scale, exact_parameter.grad / scale, atol=1e-5, rtol=0, msg=name
        )


def test_hidden_states_match_unpadded_rows(make_model: MakeModel, rows: Any) -> None:
    ids, real, _ = rows
    plain = make_model(0, initializer_range=0.2)
    actual = hidden_states_of(trunk_of(fused(plain)), real.long(), input_ids=ids)
    assert actual.shape == (*ids.shape, 32)
    torch.testing.assert_close(actual[real].double(), torch.cat(states_row_by_row(plain, ids)), atol=2e-5, rtol=0)


def test_upper_layers_continue_from_packed_lower_layers(make_model: MakeModel, rows: Any) -> None:
    ids, real, selected = rows
    plain = make_model(0, n_layer=3, initializer_range=0.2)
    model = fused(plain)
    lower = hidden_states_of(lower_layers(model, 2), real.long(), input_ids=ids)
    upper = UpperLayers(model, 2)
    expected = torch.cat(states_row_by_row(plain, ids))[selected[real]]
    for layers in (upper, upper.frozen_copy()):
        actual = hidden_states_at(layers.trunk, selected, real.long(), inputs_embeds=lower)
        torch.testing.assert_close(actual.double(), expected, atol=2e-5, rtol=0)


def test_last_mlp_runs_on_selected_tokens_only(make_model: MakeModel, rows: Any) -> None:
    ids, real, selected = rows
    model, token_counts = fused(make_model(0)), []
    for layer in model.transformer.h:
        layer.mlp.c_fc.register_forward_hook(lambda module, inputs, output: token_counts.append(inputs[0].shape[-2]))
    hidden_states_at(trunk_of(model), selected, real.long(), input_ids=ids)
    padded = [-(-int(mask.sum()) // TILE) * TILE for mask in (real, selected)]
    assert token_counts == padded and padded[1] < padded[0]
    token_counts.clear()
    model(ids)  # an ordinary forward pass computes all tokens
    assert token_counts == [WIDTH, WIDTH]


def test_an_error_in_a_packed_pass_leaves_no_state(make_model: MakeModel, rows: Any) -> None:
    """After a pass that failed between attention and MLP, the next ordinary pass is unchanged."""
    ids, real, selected = rows
    model = fused(make_model(0))
    before, norm = model(ids).logits, model.transformer.h[-1].ln_2
    hook = norm.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError("failed on purpose")))
    with pytest.raises(KeyError, match="failed on purpose"):
        hidden_states_at(trunk_of(model), selected, real.long(), input_ids=ids)
    hook.remove()
    assert torch.equal(model(ids).logits, before)


def test_a_copied_model_has_its_own_hooks(make_model: MakeModel, rows: Any) -> None:
    """A reference model is made by copying, so hooks of a copy must belong to the copy."""
    ids, real, selected = rows
    model = fused(make_model(0))
    first = hidden_states_at(trunk_of(model), selected, real.long(), input_ids=ids)
    copied = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    token_counts: list[int] = []
    copied.transformer.h[-1].mlp.c_fc.register_forward_hook(lambda m, i, o: token_counts.append(i[0].shape[-2]))
    assert torch.equal(hidden_states_at(trunk_of(copied), selected, real.long(), input_ids=ids), first)
    assert token_counts == [-(-int(selected.sum()) // TILE) * TILE]


def test_a_copied_layer_or_mlp_works_in_packed_passes(make_model: MakeModel, rows: Any) -> None:
    """A copied layer has its own config and attention; a copied MLP has no hooks (peft's `modules_to_save` copies so)."""
    ids, real, selected = rows
    plain = make_model(0, initializer_range=0.2)
    more_layers, copied_mlp = fused(plain), fused(plain)
    for model in (plain, more_layers):
        model.transformer.h.append(copy.deepcopy(model.transformer.h[0]))
    more_layers = fuse_kernels_(more_layers, torch.device("cpu"))
    more_layers.transformer.h[-1].attn.config = copy.deepcopy(more_layers.config)
    more_layers.transformer.h[-1].attn.config._attn_implementation = "sdpa"
    expected = torch.cat(states_row_by_row(plain, ids))[selected[real]]
    actual = hidden_states_at(trunk_of(more_layers), selected, real.long(), input_ids=ids)
    torch.testing.assert_close(actual.double(), expected, atol=2e-5, rtol=0)
    hidden_states_at(trunk_of(copied_mlp), selected, real.long(), input_ids=ids)
    first = hidden_states_at(trunk_of(copied_mlp), selected, real.long(), input_ids=ids)
    copied_mlp.transformer.h[-1].mlp = copy.deepcopy(copied_mlp.transformer.h[-1].mlp)
    torch.testing.assert_close(
        hidden_states_at(trunk_of(copied_mlp), selected, real.long(), input_ids=ids), first, atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("batch", [[0], [3], [0, 2], [1, 4], [0, 1, 4]])
def test_hidden_states_do_not_depend_on_the_other_rows(make_model: MakeModel, rows: Any, batch: list[int]) -> None:
    """States are equal to the last bit: in another minibatch, the first probability ratio must still be 1."""
    ids, real, selected = rows
    trunk = trunk_of(fused(make_model(0, initializer_range=0.2)))
    counts = selected.sum(1).tolist()
    of_row = hidden_states_at(trunk, selected, real.long(), input_ids=ids).split(counts)
    width = int(real[batch].sum(1).max())
    some_selected, some_real, some_ids = (tensor[batch][:, :width] for tensor in (selected, real, ids))
    actual = hidden_states_at(trunk, some_selected, some_real.long(), input_ids=some_ids)
    assert torch.equal(actual, torch.cat([of_row[row] for row in batch]))


def test_packed_layout_restores_the_position_of_every_token(rows: Any) -> None:
    real = torch.nn.functional.pad(rows[1], (0, 2))
    layout = PackedLayout.of(real.long())
    values = torch.randn(*real.shape, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    one_row = layout.packed(values)
    assert one_row.shape == (1, layout.total, 3) and layout.total % TILE == 0
    assert torch.equal(one_row[0, : int(real.sum())], values[real]) and not one_row[0, int(real.sum()) :].any()
    assert torch.equal(layout.spread(one_row)[real], values[real])
    # Padding gets no gradient here, so backward passes are the transposes of forward passes.
    inputs = values.clone().requires_grad_()
    torch.autograd.gradcheck(lambda tensor: layout.spread(layout.packed(tensor)) * real[..., None], inputs)
