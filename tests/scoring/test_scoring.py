"""Rewards of completions: reward functions, reward models, and scores that do not depend on batch or padding."""

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
    """Return the rewards of completions whose token ids are their bytes."""
    prompts = prompts or ["p"] * len(completions)
    ids = [list(text.encode()) for text in completions]
    return reward(prompts, completions, prompt_ids=[[112]] * len(ids), completion_ids=ids, **columns)


def length(prompts: list[Any], completions: list[Any], completion_ids: list[Any], **columns: Any) -> list[int]:
    return [len(completion) for completion in completions]


def with_target(completions: list[str], target: list[str], **columns: Any) -> list[bool]:
    return [completion == expected for completion, expected in zip(completions, target, strict=True)]


def test_reward_function_gets_all_columns_and_returns_floats() -> None:
    assert call(FunctionReward(length), ["a", "abc"]) == [1.0, 3.0]
    scores = call(FunctionReward(with_target), ["a", "b"], target=["a", "a"])
    assert scores == [1.0, 0.0] and all(type(value) is float for value in scores)
    for values in (torch.tensor([0.5, 2.0]), np.array([0.5, 2.0]), (0.5, 2)):
        assert call(FunctionReward(lambda values=values, **columns: values), ["a", "b"]) == [0.5, 2.0]


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf"), "good", [1.0]])
def test_a_reward_that_is_not_a_finite_number_names_its_sample(bad: Any) -> None:
    def reward_model(completions: list[str], **columns: Any) -> list[Any]:
        return [1.0, bad]

    with pytest.raises(  # RankError, because only the process with that row knows it
        RankError, match=r"reward function reward_model returned .* for the completion 'zwei' of the prompt 'two'"
    ):
        call(FunctionReward(reward_model), ["eins", "zwei"], prompts=["one", "two"])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_wrong_number_of_rewards_is_refused(count: int) -> None:
    def reward_model(**columns: Any) -> list[float]:
        return [0.0] * count

    with pytest.raises(RankError, match=f"reward_model returned {count} scores for 2 completions"):
        call(FunctionReward(reward_model), ["a", "b"])


def test_reward_function_gets_messages_for_conversational_prompts() -> None:
    received: list[Any] = []

    def reward_model(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        received.extend([prompts, completions])
        return [0.0] * len(completions)

    score(
        load_reward(reward_model, None), [CHAT, "text"], ["A", "B"], prompt_ids=[[1], [2]], completion_ids=[[3], [4]]
    )
    assert received == [[CHAT, "text"], [[{"role": "assistant", "content": "A"}], "B"]]


def test_reward_functions_are_imported_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
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


def logits_by_hand(model: Any, row: Sequence[int], position: int = -1) -> list[float]:
    with torch.no_grad():
        hidden = model.transformer(torch.tensor([row])).last_hidden_state[0, position].double()
    return (model.score.weight.detach().double() @ hidden).tolist()


def rewards_of(reward: Any, rows: Sequence[Sequence[int]]) -> list[float]:
    empty: list[list[int]] = [[] for _ in rows]
    return reward([""] * len(rows), [""] * len(rows), prompt_ids=empty, completion_ids=rows)


@pytest.mark.parametrize("labels", [1, 2])
def test_reward_is_the_logit_of_one_label_or_the_log_odds_of_two(
    labels: int, make_reward_model: Any, tokenizer: Any
) -> None:
    model = make_reward_model(0, num_labels=labels, initializer_range=0.2)
    expected = []
    for row in ROWS:
        logits = logits_by_hand(model, row)
        odds = math.exp(logits[-1] - logits[0])  # p(good) / p(bad), by the definition of softmax
        expected.append(logits[0] if labels == 1 else math.log(odds))
    reward = load_reward(model, tokenizer)
    assert rewards_of(reward, ROWS) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert max(expected) - min(expected) > 0.1  # the rows differ
    split = reward([""] * 8, [""] * 8, prompt_ids=[row[:1] for row in ROWS], completion_ids=[row[1:] for row in ROWS])
    assert split == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("pad_id", [PAD, EOS, None])
def test_model_rewards_do_not_depend_on_the_batch(pad_id: int | None, make_reward_model: Any, tokenizer: Any) -> None:
    """For each padding id: one row at a time, three or eight in a batch, and beside a long row."""
    model = make_reward_model(0, initializer_range=0.2, pad_token_id=pad_id)
    one_by_one = [rewards_of(load_reward(model, tokenizer), [row])[0] for row in ROWS]
    for size in (1, 3, 8):
        assert rewards_of(load_reward(model, tokenizer, batch_size=size), ROWS) == pytest.approx(
            one_by_one, rel=1e-4, abs=1e-5
        )
    beside_long_row = classify(model, [*ROWS, list(range(100))])[:-1, 0].tolist()
    assert beside_long_row == pytest.approx(one_by_one, rel=1e-4, abs=1e-5)
    same_length = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert classify(model, same_length)[:, 0].tolist() == pytest.approx(
        [rewards_of(load_reward(model, tokenizer), [row])[0] for row in same_length], rel=1e-4, abs=1e-5
    )


def test_position_of_the_score_with_and_without_eos_as_padding(make_reward_model: Any, tokenizer: Any) -> None:
    """The score is read at EOS if padding has another id, and before EOS if EOS is the padding."""
    row = [65, 66, 67, EOS]
    separate, shared = (make_reward_model(0, initializer_range=0.2, pad_token_id=pad_id) for pad_id in (PAD, EOS))
    assert classify(separate, [row])[0].tolist() == pytest.approx(logits_by_hand(separate, row), rel=1e-4)
    assert classify(shared, [row])[0].tolist() == pytest.approx(logits_by_hand(shared, row, position=2), rel=1e-4)
    middle = [65, EOS, 67]
    assert classify(shared, [middle])[0].tolist() == pytest.approx(logits_by_hand(shared, middle), rel=1e-4)


def test_reward_model_runs_without_dropout_and_without_gradients(make_reward_model: Any, tokenizer: Any) -> None:
    model = make_reward_model(0, initializer_range=0.2, resid_pdrop=0.5, embd_pdrop=0.5).train()
    reward = load_reward(model, tokenizer)
    assert rewards_of(reward, ROWS) == rewards_of(reward, ROWS)
    requires_grad: list[bool] = []
    model.transformer.register_forward_hook(
        lambda *args: requires_grad.append(args[2].last_hidden_state.requires_grad)
    )
    rewards_of(reward, ROWS)
    assert requires_grad and not any(requires_grad)


def test_rows_longer_than_the_context_keep_their_last_tokens(make_reward_model: Any, tokenizer: Any) -> None:
    model = make_reward_model(0, initializer_range=0.2, n_positions=4)
    assert rewards_of(load_reward(model, tokenizer), [[1, 2, 3, 4, 5, 6]]) == rewards_of(
        load_reward(model, tokenizer), [[3, 4, 5, 6]]
    )


@pytest.fixture
def other_tokenizer(make_tokenizer: Callable[[], Any]) -> Any:
    """Return a tokenizer with other ids for the bytes and another chat template, which marks turns by letters."""
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
def test_reward_model_with_another_vocabulary_reads_the_text(
    ended: bool, make_reward_model: Any, tokenizer: Any, other_tokenizer: Any
) -> None:
    """It uses its own chat template and ids; its EOS follows only if the policy's completion ended with EOS."""
    model = make_reward_model(0, initializer_range=0.2)
    reward = load_reward(model, tokenizer, tokenizer=other_tokenizer)
    assert isinstance(reward, ModelReward) and not reward.shares_ids
    completion_ids = [[89, 111, *([EOS] if ended else [])]] * 2
    scores = score(reward, ["Say: ", CHAT], ["Yo", "Yo"], prompt_ids=[[1], [2]], completion_ids=completion_ids)
    rows = [[255 - byte for byte in text.encode()] + ([EOS] if ended else []) for text in ("Say: Yo", "u=Hi;a=Yo;")]
    expected = [logits_by_hand(model, row)[0] for row in rows]
    assert scores == pytest.approx(expected, rel=1e-4, abs=1e-5)
    [by_ids] = reward([[72, 105]], ["Yo"], prompt_ids=[[72, 105]], completion_ids=completion_ids[:1])
    row = [255 - byte for byte in b"HiYo"] + ([EOS] if ended else [])
    assert by_ids == pytest.approx(logits_by_hand(model, row)[0], rel=1e-4, abs=1e-5)


def test_reward_model_with_an_equal_vocabulary_reads_the_policys_ids(
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
        (tmp_path / "model.safetensors").unlink()  # the refusal comes before weights are loaded
        message = f"has {labels} labels"
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        load_reward(str(tmp_path), make_tokenizer())
    with pytest.raises(UserError, match=message):
        check_reward(str(tmp_path))


def test_a_saved_reward_model_gives_the_same_rewards(
    make_reward_model: Any, make_tokenizer: Any, tmp_path: Path
) -> None:
    model, tokenizer = make_reward_model(0, num_labels=2, initializer_range=0.2), make_tokenizer()
    model.save_pretrained(tmp_path / "reward_model")
    tokenizer.save_pretrained(tmp_path / "reward_model")
    reward = load_reward(str(tmp_path / "reward_model"), tokenizer)
    assert reward.name == "reward_model" and rewards_of(reward, ROWS) == rewards_of(
        load_reward(model, tokenizer), ROWS
    )


def test_normalized_scores_have_mean_0_and_variance_1(make_reward_model: Any, tokenizer: Any) -> None:
    """Compare with NumPy on the raw scores; a reward model without a saved mean and spread is refused."""
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


def test_a_nan_of_a_reward_model_names_the_model_and_the_sample(make_reward_model: Any, tokenizer: Any) -> None:
    reward_model = make_reward_model(0)
    reward_model.score.weight.data.fill_(float("nan"))
    with pytest.raises(
        UserError, match="reward model reward_model gives nan for the completion 'b' of the prompt 'a'"
    ):
        load_reward(reward_model, tokenizer)(["a"], ["b"], prompt_ids=[[5]], completion_ids=[[6]])


def test_an_error_in_one_sample_is_printed_by_the_rank_with_that_sample(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tokenizer: Any
) -> None:
    def picky(completions: list[str], **columns: Any) -> list[float]:
        return [1.0 / (text != "b") for text in completions]

    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as exit_info, one_line_errors():
        load_reward(picky, tokenizer)(["q", "p"], ["a", "b"], prompt_ids=[[5], [5]], completion_ids=[[6], [7]])
    stderr = capsys.readouterr().err
    assert (
        exit_info.value.code == 2
        and "raised ZeroDivisionError" in stderr
        and "the completion 'b' of the prompt 'p'" in stderr
    )


def test_a_reward_model_that_pools_the_first_token_is_refused(make_tokenizer: Any) -> None:
    """Rows are tokenized without its CLS token, so the score would describe the prompt's first token."""
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = make_tokenizer()
    tokenizer.cls_token = "<|system|>"
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = BertForSequenceClassification(BertConfig(num_labels=1, vocab_size=262, **shape))
    with pytest.raises(UserError, match="is a BertForSequenceClassification, which reads a row at its first token"):
        load_reward(model, tokenizer)


def test_reward_model_with_another_vocabulary_puts_its_bos_before_text(
    make_reward_model: Any, make_tokenizer_with_bos: Any, tokenizer: Any
) -> None:
    """TRL trains it with BOS. For messages the chat template decides."""
    reward_model, bos_tokenizer = make_reward_model(0, initializer_range=0.2), make_tokenizer_with_bos()
    reward = ModelReward(reward_model, bos_tokenizer, tokenizer)
    reward.shares_ids = False
    text = reward(["Hi"], [" you"], prompt_ids=[[*b"Hi"]], completion_ids=[[*b" you", EOS]])
    assert text == rewards_of(ModelReward(reward_model, bos_tokenizer, bos_tokenizer), [[260, *b"Hi you", EOS]])
    chat = reward([CHAT], ["Ho"], prompt_ids=[[1]], completion_ids=[[*b"Ho", EOS]])
    assert chat == rewards_of(
        ModelReward(reward_model, bos_tokenizer, bos_tokenizer), [[258, *b"Hi", 261, 259, *b"Ho", EOS]]
    )


def test_a_reward_model_reads_conversations_by_its_own_template(
    make_reward_model: Any, make_tokenizer: Any, tokenizer: Any
) -> None:
    """With the policy's vocabulary and another chat template, as with it."""
    model, own = make_reward_model(0, initializer_range=0.2), make_tokenizer()
    own.chat_template = "{% for m in messages %}{{ m['role'][0] }}={{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    reward = load_reward(model, tokenizer, tokenizer=own, prefix_scores=True)
    ids = {"prompt_ids": [[1]] * 2, "completion_ids": [[*b"Yo", EOS], [*b"Yo"]]}
    scores = score(reward, [CHAT, CHAT], ["Yo", "Yo"], **ids)
    rows = [[*b"u=Hi", EOS, *b"\na=Yo", EOS], [*b"u=Hi", EOS, *b"\na=Yo"]]
    assert scores == pytest.approx([logits_by_hand(model, row)[0] for row in rows], rel=1e-4, abs=1e-5)
    assert not hasattr(scores, "prefix_scores")
    text = score(reward, ["Hi"], ["Yo"], prompt_ids=[[*b"Hi"]], completion_ids=[[*b"Yo", EOS]])
    assert text == pytest.approx(logits_by_hand(model, [*b"HiYo", EOS])[:1], rel=1e-4, abs=1e-5)


def test_a_begun_turn_is_continued_for_a_reward_model_with_another_vocabulary(
    make_reward_model: Any, tokenizer: Any, other_tokenizer: Any
) -> None:
    model = make_reward_model(0, initializer_range=0.2)
    begun = [*CHAT, {"role": "assistant", "content": "Y"}]
    scores = score(
        load_reward(model, tokenizer, tokenizer=other_tokenizer), [begun], ["o"], prompt_ids=[[1]], completion_ids=[[111, EOS]]
    )  # fmt: skip
    row = [*(255 - byte for byte in b"u=Hi;a=Yo;"), EOS]
    assert scores == pytest.approx(logits_by_hand(model, row)[:1], rel=1e-4, abs=1e-5)


def test_a_function_gets_prompts_given_as_ids_as_text(tokenizer: Any) -> None:
    received: list[Any] = []

    def remember(prompts: list[Any], **columns: Any) -> list[float]:
        received.extend(prompts)
        return [0.0] * len(prompts)

    prompts = [[*b"Hi"], [*"é".encode()[:1]], "text", CHAT]
    score(load_reward(remember, tokenizer), prompts, ["a"] * 4, prompt_ids=[[1]] * 4, completion_ids=[[2]] * 4)
    assert received == ["Hi", "", "text", CHAT]
