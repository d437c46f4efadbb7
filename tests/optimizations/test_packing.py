"""Rows of unequal length as one: against each row by itself, in float64, by a model that nothing was done to."""

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
ANSWERS = [3, 12, 1, 2, 0]  # of each row's last tokens, how many are asked for
WIDTH = 14  # two more columns of padding than any row needs, and no whole tiles
Make = Callable[..., Any]


@pytest.fixture
def rows() -> tuple[Tensor, Tensor, Tensor]:
    """ids, what is real, and what is asked for: (rows, width) each; padding holds ids that mean something."""
    ids = torch.randint(0, 250, (len(LENGTHS), WIDTH), generator=torch.Generator().manual_seed(0))
    real, asked = (torch.zeros(len(LENGTHS), WIDTH, dtype=torch.bool) for _ in range(2))
    for row, (length, answer) in enumerate(zip(LENGTHS, ANSWERS, strict=True)):
        real[row, :length] = True
        asked[row, length - answer : length] = True
    return ids, real, asked


def one_by_one(model: Any, ids: Tensor) -> list[Tensor]:
    """The last states of each row, read alone and without padding."""
    trunk = copy.deepcopy(trunk_of(model)).double()
    return [
        trunk(input_ids=row[None, :length], use_cache=False).last_hidden_state[0]
        for row, length in zip(ids, LENGTHS, strict=True)
    ]


def quick(model: Any) -> Any:
    return fuse_kernels_(copy.deepcopy(model), torch.device("cpu"))


def test_asked_states_and_their_gradients_are_those_of_each_row_alone(make_model: Make, rows: Any) -> None:
    ids, real, asked = rows
    plain = make_model(0, initializer_range=0.2)
    packed, exact = quick(plain), copy.deepcopy(trunk_of(plain)).double()
    found = hidden_states_at(trunk_of(packed), asked, real.long(), input_ids=ids)
    wanted = torch.cat(
        [
            exact(input_ids=row[None, :length]).last_hidden_state[0, length - answer :]
            for row, length, answer in zip(ids, LENGTHS, ANSWERS, strict=True)
        ]
    )
    torch.testing.assert_close(found.double(), wanted, atol=2e-5, rtol=0)
    weights = torch.randn(wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (found * weights.float()).sum().backward()
    (wanted * weights).sum().backward()
    for (name, one), other in zip(trunk_of(packed).named_parameters(), exact.parameters(), strict=True):
        scale = other.grad.abs().max().clamp(min=1.0)
        torch.testing.assert_close(one.grad.double() / scale, other.grad / scale, atol=1e-5, rtol=0, msg=name)


def test_every_state_is_that_of_its_row_alone(make_model: Make, rows: Any) -> None:
    ids, real, _ = rows
    plain = make_model(0, initializer_range=0.2)
    found = hidden_states_of(trunk_of(quick(plain)), real.long(), input_ids=ids)
    assert found.shape == (*ids.shape, 32)
    torch.testing.assert_close(found[real].double(), torch.cat(one_by_one(plain, ids)), atol=2e-5, rtol=0)


def test_the_upper_layers_go_on_from_what_the_lower_ones_left(make_model: Make, rows: Any) -> None:
    ids, real, asked = rows
    plain = make_model(0, n_layer=3, initializer_range=0.2)
    model = quick(plain)
    lower = hidden_states_of(lower_layers(model, 2), real.long(), input_ids=ids)
    upper = UpperLayers(model, 2)
    wanted = torch.cat(one_by_one(plain, ids))[asked[real]]
    for each in (upper, upper.frozen_copy()):
        found = hidden_states_at(each.trunk, asked, real.long(), inputs_embeds=lower)
        torch.testing.assert_close(found.double(), wanted, atol=2e-5, rtol=0)


def test_the_last_feed_forward_part_is_asked_for_nothing_else(make_model: Make, rows: Any) -> None:
    ids, real, asked = rows
    model, seen = quick(make_model(0)), []
    for layer in model.transformer.h:
        layer.mlp.c_fc.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[-2]))
    hidden_states_at(trunk_of(model), asked, real.long(), input_ids=ids)
    tiles = [-(-int(each.sum()) // TILE) * TILE for each in (real, asked)]
    assert seen == tiles and tiles[1] < tiles[0]
    seen.clear()
    model(ids)  # and whoever reads the model in any other way gets all of it
    assert seen == [WIDTH, WIDTH]


def test_an_error_leaves_no_trace(make_model: Make, rows: Any) -> None:
    """A pass that ended between attention and what follows it: the next one is whole."""
    ids, real, asked = rows
    model = quick(make_model(0))
    whole, norm = model(ids).logits, model.transformer.h[-1].ln_2
    hook = norm.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError("cut off")))
    with pytest.raises(KeyError, match="cut off"):
        hidden_states_at(trunk_of(model), asked, real.long(), input_ids=ids)
    hook.remove()
    assert torch.equal(model(ids).logits, whole)


def test_a_copy_reads_for_itself(make_model: Make, rows: Any) -> None:
    """The hooks of a copy belong to the copy: a reference is made so."""
    ids, real, asked = rows
    model = quick(make_model(0))
    first = hidden_states_at(trunk_of(model), asked, real.long(), input_ids=ids)
    other = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    seen: list[int] = []
    other.transformer.h[-1].mlp.c_fc.register_forward_hook(lambda m, i, o: seen.append(i[0].shape[-2]))
    assert torch.equal(hidden_states_at(trunk_of(other), asked, real.long(), input_ids=ids), first)
    assert seen == [-(-int(asked.sum()) // TILE) * TILE]


def test_a_copied_layer_or_part_of_one_reads_for_itself(make_model: Make, rows: Any) -> None:
    """It has a configuration of its own, whose attention is not ours; and it is not told what the one it was copied from is."""
    ids, real, asked = rows
    plain = make_model(0, initializer_range=0.2)
    grown, part = quick(plain), quick(plain)
    for model in (plain, grown):
        model.transformer.h.append(copy.deepcopy(model.transformer.h[0]))
    grown = fuse_kernels_(grown, torch.device("cpu"))
    grown.transformer.h[-1].attn.config = copy.deepcopy(grown.config)
    grown.transformer.h[-1].attn.config._attn_implementation = "sdpa"
    wanted = torch.cat(one_by_one(plain, ids))[asked[real]]
    found = hidden_states_at(trunk_of(grown), asked, real.long(), input_ids=ids)
    torch.testing.assert_close(found.double(), wanted, atol=2e-5, rtol=0)
    hidden_states_at(trunk_of(part), asked, real.long(), input_ids=ids)
    first = hidden_states_at(trunk_of(part), asked, real.long(), input_ids=ids)
    part.transformer.h[-1].mlp = copy.deepcopy(part.transformer.h[-1].mlp)  # as peft does for modules_to_save
    torch.testing.assert_close(
        hidden_states_at(trunk_of(part), asked, real.long(), input_ids=ids), first, atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("together", [[0], [3], [0, 2], [1, 4], [0, 1, 4]])
def test_a_row_reads_the_same_whoever_comes_along(make_model: Make, rows: Any, together: list[int]) -> None:
    """To the last bit: of other minibatches the probability ratio must not start off 1."""
    ids, real, asked = rows
    trunk = trunk_of(quick(make_model(0, initializer_range=0.2)))
    counts = asked.sum(1).tolist()
    of_row = hidden_states_at(trunk, asked, real.long(), input_ids=ids).split(counts)
    width = int(real[together].sum(1).max())
    some = [each[together][:, :width] for each in (asked, real, ids)]
    found = hidden_states_at(trunk, some[0], some[1].long(), input_ids=some[2])
    assert torch.equal(found, torch.cat([of_row[row] for row in together]))


def test_a_layout_puts_every_token_back(rows: Any) -> None:
    real = torch.nn.functional.pad(rows[1], (0, 2))
    layout = PackedLayout.of(real.long())
    values = torch.randn(*real.shape, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    one_row = layout.packed(values)
    assert one_row.shape == (1, layout.total, 3) and layout.total % TILE == 0
    assert torch.equal(one_row[0, : int(real.sum())], values[real]) and not one_row[0, int(real.sum()) :].any()
    assert torch.equal(layout.spread(one_row)[real], values[real])
    # Where padding gets no gradient, the backward passes are the transposes of the forward ones.
    given = values.clone().requires_grad_()
    torch.autograd.gradcheck(lambda each: layout.spread(layout.packed(each)) * real[..., None], given)
