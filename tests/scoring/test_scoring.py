"""From completions to rewards: functions and models, and what a model's score must not depend on."""

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_recipes.core.errors import RankError, UserError, one_line_errors
from rlhf_recipes.scoring.functions import FunctionReward
from rlhf_recipes.scoring.reward import check_reward, load_reward, score
from rlhf_recipes.scoring.reward_models import ModelReward, classify

EOS, PAD = 256, 257
CHAT = [{"role": "user", "content": "Hi"}]
ROWS = [
    [72, 105],
    [65, 66, 67, 68, 69, EOS],
    [97],
    [120, 121, 122, EOS],
    [48, 49, 50],
    [90],
    [33, 34],
    [1, 2, 3, 4, 5],
]


def call(reward: Any, completions: Sequence[Any], prompts: Sequence[Any] | None = None, **columns: Any) -> list[float]:
    """Ask for rewards of text whose ids are its bytes."""
    prompts = prompts or ["p"] * len(completions)
    ids = [list(text.encode()) for text in completions]
    return reward(prompts, completions, prompt_ids=[[112]] * len(ids), completion_ids=ids, **columns)


def length(prompts: list[Any], completions: list[Any], completion_ids: list[Any], **columns: Any) -> list[int]:
    return [len(completion) for completion in completions]


def with_target(completions: list[str], target: list[str], **columns: Any) -> list[bool]:
    return [completion == wanted for completion, wanted in zip(completions, target, strict=True)]


def test_a_function_gets_every_column_and_its_numbers_become_floats() -> None:
    assert call(FunctionReward(length), ["a", "abc"]) == [1.0, 3.0]
    scores = call(FunctionReward(with_target), ["a", "b"], target=["a", "a"])
    assert scores == [1.0, 0.0] and all(type(value) is float for value in scores)
    for values in (torch.tensor([0.5, 2.0]), np.array([0.5, 2.0]), (0.5, 2)):
        assert call(FunctionReward(lambda values=values, **columns: values), ["a", "b"]) == [0.5, 2.0]


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf"), "good", [1.0]])
def test_a_score_that_is_no_number_names_its_sample(bad: Any) -> None:
    def reward_model(completions: list[str], **columns: Any) -> list[Any]:
        return [1.0, bad]

    with pytest.raises(  # what only the process with that row can tell
        RankError, match=r"reward function reward_model returned .* for the completion 'zwei' of the prompt 'two'"
    ):
        call(FunctionReward(reward_model), ["eins", "zwei"], prompts=["one", "two"])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_as_many_scores_as_completions_are_asked_for(count: int) -> None:
    def reward_model(**columns: Any) -> list[float]:
        return [0.0] * count

    with pytest.raises(RankError, match=f"reward_model returned {count} scores for 2 completions"):
        call(FunctionReward(reward_model), ["a", "b"])


def test_messages_reach_a_function_as_messages() -> None:
    seen: list[Any] = []

    def reward_model(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        seen.extend([prompts, completions])
        return [0.0] * len(completions)

    score(
        load_reward(reward_model, None), [CHAT, "text"], ["A", "B"], prompt_ids=[[1], [2]], completion_ids=[[3], [4]]
    )
    assert seen == [[CHAT, "text"], [[{"role": "assistant", "content": "A"}], "B"]]


def test_functions_are_imported_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    (tmp_path / "shouting_rewards.py").write_text(
        "def shout(completions, **columns):\n    return [c.isupper() for c in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    reward = load_reward("shouting_rewards:shout", tokenizer)
    assert reward.name == "shout" and call(reward, ["A", "b"]) == [1.0, 0.0]
    check_reward("shouting_rewards:shout", ["answer"])
    for wrong in ("shouting_rewards:whisper", "no_such_module_at_all:shout"):
        with pytest.raises(UserError, match=f"reward function {wrong} cannot be imported"):
            load_reward(wrong, tokenizer)
    with pytest.raises(TypeError, match="a reward is a model, a path, or a function, not int"):
        load_reward(3, tokenizer)


def logits_by_hand(model: Any, row: Sequence[int], place: int = -1) -> list[float]:
    with torch.no_grad():
        hidden = model.transformer(torch.tensor([row])).last_hidden_state[0, place].double()
    return (model.score.weight.detach().double() @ hidden).tolist()


def ask(reward: Any, rows: Sequence[Sequence[int]]) -> list[float]:
    empty: list[list[int]] = [[] for _ in rows]
    return reward([""] * len(rows), [""] * len(rows), prompt_ids=empty, completion_ids=rows)


@pytest.mark.parametrize("labels", [1, 2])
def test_a_model_scores_by_its_value_or_by_its_log_odds(labels: int, make_reward_model: Any, tokenizer: Any) -> None:
    model = make_reward_model(0, num_labels=labels, initializer_range=0.2)
    expected = []
    for row in ROWS:
        logits = logits_by_hand(model, row)
        odds = math.exp(logits[-1] - logits[0])  # p(good) / p(bad), by the definition of softmax
        expected.append(logits[0] if labels == 1 else math.log(odds))
    reward = load_reward(model, tokenizer)
    assert ask(reward, ROWS) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert max(expected) - min(expected) > 0.1  # so the rows are told apart
    split = reward([""] * 8, [""] * 8, prompt_ids=[row[:1] for row in ROWS], completion_ids=[row[1:] for row in ROWS])
    assert split == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("pad_id", [PAD, EOS, None])
def test_a_row_scores_alone_as_in_a_batch(pad_id: int | None, make_reward_model: Any, tokenizer: Any) -> None:
    """Whichever id pads, and however much of it: one row at a time, eight together, and next to a long one."""
    model = make_reward_model(0, initializer_range=0.2, pad_token_id=pad_id)
    alone = [ask(load_reward(model, tokenizer), [row])[0] for row in ROWS]
    for size in (1, 3, 8):
        assert ask(load_reward(model, tokenizer, batch_size=size), ROWS) == pytest.approx(alone, rel=1e-4, abs=1e-5)
    beside = classify(model, [*ROWS, list(range(100))])[:-1, 0].tolist()
    assert beside == pytest.approx(alone, rel=1e-4, abs=1e-5)
    same_length = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert classify(model, same_length)[:, 0].tolist() == pytest.approx(
        [ask(load_reward(model, tokenizer), [row])[0] for row in same_length], rel=1e-4, abs=1e-5
    )


def test_where_the_last_token_is_read(make_reward_model: Any, tokenizer: Any) -> None:
    """At EOS, where padding has an id of its own; before it, where EOS is the padding."""
    row = [65, 66, 67, EOS]
    own, shared = (make_reward_model(0, initializer_range=0.2, pad_token_id=pad_id) for pad_id in (PAD, EOS))
    assert classify(own, [row])[0].tolist() == pytest.approx(logits_by_hand(own, row), rel=1e-4)
    assert classify(shared, [row])[0].tolist() == pytest.approx(logits_by_hand(shared, row, place=2), rel=1e-4)
    middle = [65, EOS, 67]
    assert classify(shared, [middle])[0].tolist() == pytest.approx(logits_by_hand(shared, middle), rel=1e-4)


def test_a_reward_model_is_asked_without_dropout_and_without_gradients(make_reward_model: Any, tokenizer: Any) -> None:
    model = make_reward_model(0, initializer_range=0.2, resid_pdrop=0.5, embd_pdrop=0.5).train()
    reward = load_reward(model, tokenizer)
    assert ask(reward, ROWS) == ask(reward, ROWS)
    asked_with: list[bool] = []
    model.transformer.register_forward_hook(lambda *args: asked_with.append(args[2].last_hidden_state.requires_grad))
    ask(reward, ROWS)
    assert asked_with and not any(asked_with)


def test_a_row_beyond_the_context_keeps_its_end(make_reward_model: Any, tokenizer: Any) -> None:
    model = make_reward_model(0, initializer_range=0.2, n_positions=4)
    assert ask(load_reward(model, tokenizer), [[1, 2, 3, 4, 5, 6]]) == ask(
        load_reward(model, tokenizer), [[3, 4, 5, 6]]
    )


@pytest.fixture
def shifted(make_tokenizer: Callable[[], Any]) -> Any:
    """A tokenizer whose id of each byte is another one, with a template of its own: it marks turns by letters."""
    from transformers import PreTrainedTokenizerFast

    state = json.loads(make_tokenizer().backend_tokenizer.to_str())
    state["model"]["vocab"] = {token: 255 - number for token, number in state["model"]["vocab"].items()}
    from tokenizers import Tokenizer

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<|endoftext|>", pad_token="<|pad|>"
    )
    turns = "{% for m in messages %}{{ m['role'][0] }}={{ m['content'] }};{% endfor %}"
    tokenizer.chat_template = turns + "{{ eos_token if messages[-1]['role'] == 'assistant' }}"
    return tokenizer


@pytest.mark.parametrize("ended", [True, False])
def test_a_reward_model_with_another_vocabulary_reads_the_text(
    ended: bool, make_reward_model: Any, tokenizer: Any, shifted: Any
) -> None:
    """In its own template and ids, closed by its own EOS only where the policy had closed the answer."""
    model = make_reward_model(0, initializer_range=0.2)
    reward = load_reward(model, tokenizer, tokenizer=shifted)
    assert isinstance(reward, ModelReward) and not reward.shares_ids
    completion_ids = [[89, 111, *([EOS] if ended else [])]] * 2
    scores = score(reward, ["Say: ", CHAT], ["Yo", "Yo"], prompt_ids=[[1], [2]], completion_ids=completion_ids)
    rows = [[255 - byte for byte in text.encode()] + ([EOS] if ended else []) for text in ("Say: Yo", "u=Hi;a=Yo;")]
    expected = [logits_by_hand(model, row)[0] for row in rows]
    assert scores == pytest.approx(expected, rel=1e-4, abs=1e-5)
    [by_ids] = reward([[72, 105]], ["Yo"], prompt_ids=[[72, 105]], completion_ids=completion_ids[:1])
    row = [255 - byte for byte in b"HiYo"] + ([EOS] if ended else [])
    assert by_ids == pytest.approx(logits_by_hand(model, row)[0], rel=1e-4, abs=1e-5)


def test_an_equal_vocabulary_reads_the_policys_ids(
    make_reward_model: Any, tokenizer: Any, make_tokenizer: Any
) -> None:
    reward = load_reward(make_reward_model(0), tokenizer, tokenizer=make_tokenizer())
    assert isinstance(reward, ModelReward) and reward.shares_ids


def test_a_reward_model_with_too_few_embeddings_is_refused(make_reward_model: Any, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="has 200 token embeddings, but its tokenizer has the id 261"):
        load_reward(make_reward_model(0, vocab_size=200), tokenizer)


@pytest.mark.parametrize("labels", [0, 3, 5])
def test_a_reward_model_has_one_label_or_two(
    labels: int, make_reward_model: Any, make_tokenizer: Any, tmp_path: Path
) -> None:
    model = make_reward_model(0, num_labels=labels or 3)
    if labels == 0:  # a language model
        model.config.architectures = ["GPT2LMHeadModel"]
        model.config.save_pretrained(tmp_path)
        message = "is a GPT2LMHeadModel, not a sequence classifier"
    else:
        with pytest.raises(UserError, match=f"has {labels} labels"):
            load_reward(model, make_tokenizer())
        model.save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").unlink()  # refused before weights are read
        message = f"has {labels} labels"
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        load_reward(str(tmp_path), make_tokenizer())
    with pytest.raises(UserError, match=message):
        check_reward(str(tmp_path))


def test_a_folder_scores_as_the_model_that_was_saved(
    make_reward_model: Any, make_tokenizer: Any, tmp_path: Path
) -> None:
    model, tokenizer = make_reward_model(0, num_labels=2, initializer_range=0.2), make_tokenizer()
    model.save_pretrained(tmp_path / "reward_model")
    tokenizer.save_pretrained(tmp_path / "reward_model")
    reward = load_reward(str(tmp_path / "reward_model"), tokenizer)
    assert reward.name == "reward_model" and ask(reward, ROWS) == ask(load_reward(model, tokenizer), ROWS)


def test_normalized_scores_have_mean_0_and_variance_1(make_reward_model: Any, tokenizer: Any) -> None:
    """Against NumPy on the raw scores of the same rows; a reward model that does not know its spread says so."""
    rows = [list(text.encode()) for text in ("one", "another", "a third, longer one", "four")]
    reward = ModelReward(make_reward_model(), tokenizer, tokenizer)
    raw = np.array(reward.score_ids(rows))
    with pytest.raises(UserError, match="does not know the mean and spread"):
        reward.normalize()
    reward.model.config.score_mean, reward.model.config.score_std = float(raw.mean()), float(raw.std())
    reward.normalize()
    normalized = np.array(reward.score_ids(rows))
    np.testing.assert_allclose(normalized, (raw - raw.mean()) / raw.std(), rtol=1e-5, atol=1e-6)
    assert normalized.mean() == pytest.approx(0, abs=1e-5) and normalized.std() == pytest.approx(1, abs=1e-5)


def test_a_reward_model_whose_score_is_no_number_is_named_with_the_sample(
    make_reward_model: Any, tokenizer: Any
) -> None:
    reward_model = make_reward_model(0)
    reward_model.score.weight.data.fill_(float("nan"))
    with pytest.raises(
        UserError, match="reward model reward_model gives nan for the completion 'b' of the prompt 'a'"
    ):
        load_reward(reward_model, tokenizer)(["a"], ["b"], prompt_ids=[[5]], completion_ids=[[6]])


def test_what_is_wrong_with_one_sample_is_told_by_the_process_that_has_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tokenizer: Any
) -> None:
    def picky(completions: list[str], **columns: Any) -> list[float]:
        return [1.0 / (text != "b") for text in completions]

    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as ended, one_line_errors():
        load_reward(picky, tokenizer)(["q", "p"], ["a", "b"], prompt_ids=[[5], [5]], completion_ids=[[6], [7]])
    told = capsys.readouterr().err
    assert (
        ended.value.code == 2 and "raised ZeroDivisionError" in told and "the completion 'b' of the prompt 'p'" in told
    )


def test_a_reward_model_that_reads_a_row_at_its_first_token_is_refused(make_tokenizer: Any) -> None:
    """It would be asked without that token, and say something of the prompt's first word."""
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = make_tokenizer()
    tokenizer.cls_token = "<|system|>"
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = BertForSequenceClassification(BertConfig(num_labels=1, vocab_size=262, **shape))
    with pytest.raises(UserError, match="is a BertForSequenceClassification, which reads a row at its first token"):
        load_reward(model, tokenizer)


def test_a_reward_model_with_a_vocabulary_of_its_own_reads_text_with_its_bos(
    make_reward_model: Any, make_tokenizer_with_bos: Any, tokenizer: Any
) -> None:
    """As TRL trained it; a chat template writes what it wants."""
    reward_model, own = make_reward_model(0, initializer_range=0.2), make_tokenizer_with_bos()
    reward = ModelReward(reward_model, own, tokenizer)
    reward.shares_ids = False
    text = reward(["Hi"], [" you"], prompt_ids=[[*b"Hi"]], completion_ids=[[*b" you", EOS]])
    assert text == ask(ModelReward(reward_model, own, own), [[260, *b"Hi you", EOS]])
    chat = reward([CHAT], ["Ho"], prompt_ids=[[1]], completion_ids=[[*b"Ho", EOS]])
    assert chat == ask(ModelReward(reward_model, own, own), [[258, *b"Hi", 261, 259, *b"Ho", EOS]])
