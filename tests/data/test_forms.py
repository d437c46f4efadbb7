"""Rows as people have them become the rows that a reader would expect, or one line that says what to do."""

import pytest

from rlhf_recipes.core.arguments import ReadingArguments
from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data.counts import RowCounts
from rlhf_recipes.data.forms.meanings import parse_columns
from rlhf_recipes.data.forms.options import FormOptions
from rlhf_recipes.data.forms.understand import understand
from rlhf_recipes.data.reading import Source

STAGES = {
    "sft": ("prompt_completion", "messages", "text"),
    "reward": ("preference", "label"),
    "dpo": ("preference",),
    "ppo": ("prompt",),
    "pretrain": ("text",),
}
Q, A, B = "Name a colour.", "Blue.", "I do not know."


def user(text=Q):
    return {"role": "user", "content": text}


def said(text=A, **more):
    return {"role": "assistant", "content": text, **more}


def human(text=Q):
    return {"from": "human", "value": text}


def gpt(text=A):
    return {"from": "gpt", "value": text}


def source(rows, label_names=None):
    columns = tuple(dict.fromkeys(name for row in rows for name in row))
    return Source("data.jsonl", lambda: iter(rows), columns, label_names or {}, len(rows))


def read(stage, rows, *, label_names=None, options=(), **flags):
    """Return the canonical rows, and the counts."""
    arguments, counts = ReadingArguments(**flags), RowCounts("rows")
    form = FormOptions(STAGES[stage], **dict(options))
    understood = understand(source(rows, label_names), arguments, form, [], parse_columns(arguments.columns), counts)
    return list(understood), counts


def first(stage, row, **flags):
    return read(stage, [row], **flags)[0][0]


PAIR = {"prompt": [user()], "chosen": [said()], "rejected": [said(B)]}
HH = {"chosen": f"\n\nHuman: {Q}\n\nAssistant: {A}", "rejected": f"\n\nHuman: {Q}\n\nAssistant: {B}"}
CHAT_PAIRS = {
    "hh": HH,
    "hh with its prompt": HH | {"prompt": f"\n\nHuman: {Q}\n\nAssistant:"},
    "prompt within the messages": {"chosen": [user(), said()], "rejected": [user(), said(B)]},
    "prompt as text and within": {"prompt": Q, "chosen": [user(), said()], "rejected": [user(), said(B)]},
    "prompt as messages and within": {"prompt": [user()], "chosen": [user(), said()], "rejected": [user(), said(B)]},
    "prompt as text beside messages": {"prompt": Q, "chosen": [said()], "rejected": [said(B)]},
    "sharegpt": {"conversations": [human()], "chosen": gpt(), "rejected": gpt(B)},
    "openai": {
        "input": {"messages": [user()], "tools": []}, "preferred_output": [said()], "non_preferred_output": [said(B)],
    },
    "question": {"question": Q, "chosen": A, "rejected": B},
    "json strings": {name: str(value).replace("'", '"') for name, value in PAIR.items()},
    "python strings": {name: str(value) for name, value in PAIR.items()},
    "arena": {"winner": "model_b", "conversation_a": [user(), said(B)], "conversation_b": [user(), said()]},
    "best score": {"instruction": Q, "completions": [{"response": B, "score": 1}, {"response": A, "score": 4}]},
    "best rank": {"instruction": Q, "responses": [B, A], "ranks": [2, 1]},
}  # fmt: skip


@pytest.mark.parametrize("shape", CHAT_PAIRS)
def test_preferences_of_every_shape_are_one_pair(shape):
    for stage in ("reward", "dpo"):
        assert first(stage, CHAT_PAIRS[shape]) == PAIR


@pytest.mark.parametrize("shape", [shape for shape in CHAT_PAIRS if shape not in ("arena", "best score", "best rank")])
def test_a_prompt_is_found_in_preferences(shape):
    row = first("ppo", CHAT_PAIRS[shape])
    assert row.pop("prompt") == [user()]
    assert "prompt" not in row  # the other columns are passed on as they are
    assert row.items() <= CHAT_PAIRS[shape].items()


CONVERSATIONS = {
    "openai": {"messages": [user(), said()]},
    "sharegpt": {"conversations": [human(), gpt()]},
    "sharegpt under another name": {"messages": [human(), gpt()]},
    "content parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": Q}]}, said()]},
    "json string": {
        "messages": '[{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue."}]'
    },
}


@pytest.mark.parametrize("shape", CONVERSATIONS)
def test_conversations_of_every_shape_are_messages(shape):
    assert first("sft", CONVERSATIONS[shape]) == {"messages": [user(), said()]}
    assert first("ppo", CONVERSATIONS[shape])["prompt"] == [user()]


def test_a_system_column_is_the_first_message():
    system = {"role": "system", "content": "Be brief."}
    assert first("sft", {"system": "Be brief.", "messages": [user(), said()]}) == {
        "messages": [system, user(), said()]
    }
    pair = first("reward", {"system": "Be brief.", "question": Q, "chosen": A, "rejected": B})
    assert pair["prompt"] == [system, user()]
    assert first("ppo", {"system": "Be brief.", "prompt": Q})["prompt"] == [system, user()]
    with pytest.raises(UserError, match="--ignore_columns system"):
        first("sft", {"system": "Be brief.", "messages": [{"role": "system", "content": "Be long."}, user(), said()]})


def test_weights_of_turns_say_which_are_trained():
    row = {"messages": [user(), said(B, weight=0), user("Again."), said(A, weight=1)]}
    assert [turn.get("train") for turn in first("sft", row)["messages"]] == [None, False, None, True]
    with pytest.raises(UserError, match="weight 0\\.5"):
        first("sft", {"messages": [user(), said(A, weight=0.5)]})


def test_tools_and_template_values_are_kept():
    tools = [{"type": "function", "function": {"name": "clock"}}]
    calls = [{"id": "1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}]
    answer = {"role": "assistant", "content": None, "tool_calls": calls}
    result = {"role": "tool", "tool_call_id": "1", "content": "noon"}
    row = {"messages": [user(), answer, result, said()], "tools": tools, "chat_template_kwargs": {"mode": "fast"}}
    assert first("sft", row) == row
    assert first("ppo", {"prompt": [user()], "tools": tools})["tools"] == tools


INSTRUCTION = {"instruction": "Sort.", "input": "3, 1", "output": "1, 3"}


def test_instructions_become_turns_or_stay_text():
    for row in (INSTRUCTION, {"instruction": "Sort.", "context": "3, 1", "response": "1, 3", "category": "qa"}):
        assert first("sft", row) == {"prompt": [user("Sort.\n\n3, 1")], "completion": [said("1, 3")]}
        assert first("sft", row, as_chat=False) == {"prompt": "Sort.\n\n3, 1\n\n", "completion": "1, 3"}
    assert first("sft", INSTRUCTION | {"input": ""}, as_chat=False)["prompt"] == "Sort.\n\n"
    history = first("sft", INSTRUCTION | {"system": "s", "history": [["hello", "hi"]], "input": ""})
    roles = [turn["role"] for turn in history["prompt"]]
    assert roles == ["system", "user", "assistant", "user"]
    assert first("ppo", INSTRUCTION)["prompt"] == [user("Sort.\n\n3, 1")]


def test_plain_prompts_stay_plain_by_default():
    row = {"prompt": Q, "completion": A}
    assert first("sft", row) == row
    assert first("sft", row, as_chat=True) == {"prompt": [user()], "completion": [said()]}
    assert first("sft", {"prompt": Q, "completion": Q + A})["completion"] == A  # the prompt is not said twice
    text = {"text": f"User: {Q}\nAssistant: {A}"}
    assert first("sft", text) == text
    assert first("sft", text, as_chat=True) == {"messages": [user(), said()]}
    with pytest.raises(UserError, match="--as_chat"):
        first("sft", {"text": "a story"}, as_chat=True)
    with pytest.raises(UserError, match="--as_chat false"):
        first("sft", {"messages": [user(), said()]}, as_chat=False)


def test_an_answer_of_several_turns_has_loss_on_the_assistants_only():
    row = {"prompt": [user(), said("Green."), user()], "completion": [said(), user("Why?"), said(B)]}
    turns = first("sft", row)["messages"]
    assert [turn.get("train") for turn in turns] == [None, False, None, None, None, None]
    with pytest.raises(UserError, match="turn of the user"):
        first("reward", {"chosen": [user(), said(), user("thanks")], "rejected": [user(), said(B), user("hm")]})


def test_a_prompt_repeated_by_both_texts_is_taken_away():
    row = {"prompt": "One and one is", "chosen": "One and one is two", "rejected": "One and one is three"}
    assert first("dpo", row) == {"prompt": "One and one is", "chosen": " two", "rejected": " three"}
    other = {"prompt": "One", "chosen": "One is first", "rejected": "no"}
    assert read("dpo", [row, other])[0] == [row, other]  # not in every row, so it is part of the answers


def test_rankings_give_every_pair_and_ties_none():
    row = {"prompt": "p", "responses": ["a", "b", "c"], "scores": [1, 3, 3]}
    pairs, counts = read("dpo", [row])
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("b", "a"), ("c", "a")]
    assert counts["ties"] == 1
    pairs, _ = read("reward", [row], options={"score_margin": True})
    assert [pair["margin"] for pair in pairs] == [2, 2]
    ordered = {"prompt": "p", "output": ["best", "worst"]}
    with pytest.raises(UserError, match="--dataset_format ranked"):
        read("dpo", [ordered])
    assert first("dpo", ordered, dataset_format="ranked")["chosen"] == "best"
    with pytest.raises(UserError, match="single steps"):
        read("reward", [{"prompt": "p", "completions": ["a", "b"], "labels": [True, False]}])


def test_votes():
    summaries = {"info": {"post": Q}, "summaries": [{"text": A}, {"text": B}], "choice": 1}
    assert first("dpo", summaries) == {"prompt": Q, "chosen": B, "rejected": A}
    shp = {"history": Q, "human_ref_A": A, "human_ref_B": B, "labels": 1, "score_A": 9, "score_B": 2}
    assert first("reward", shp) == {"prompt": Q, "chosen": A, "rejected": B}
    with pytest.raises(UserError, match="--ignore_columns score_A score_B"):
        first("reward", shp | {"labels": 0})
    tie = {"winner": "tie (bothbad)", "response_a": A, "response_b": B}
    assert read("reward", [tie, tie | {"winner": "a"}])[1]["ties"] == 1
    with pytest.raises(UserError, match="names no answer"):
        first("reward", tie | {"winner": "7"})


@pytest.mark.parametrize(
    ("values", "names", "flags", "good"),
    [
        ([1, 0], None, {}, [1]),
        (["1", "0"], None, {}, ["1"]),
        ([True, False], None, {}, [True]),
        ([1.0, 0.0], None, {}, [1.0]),
        (["pos", "neg"], None, {}, ["pos"]),
        ([0, 1], ["pos", "neg"], {}, [0]),
        ([0, 1], ["clean", "toxic"], {}, [0]),
        (["fine", "toxic"], None, {}, ["fine"]),
        ([1, 2, 3, 4, 5], None, {"label_threshold": 4}, [4, 5]),
        ([1, 2], None, {"positive_label": ["2"]}, [2]),
        (["sad", "glad"], None, {"positive_label": ["glad"]}, ["glad"]),
    ],
)
def test_labels_of_every_kind(values, names, flags, good):
    rows = [{"text": str(value), "label": value} for value in values]
    label_names = None if names is None else {"label": names}
    read_rows, _ = read("reward", rows, label_names=label_names, options=flags)
    assert [row["text"] for row in read_rows if row["label"] == 1] == [str(value) for value in good]


@pytest.mark.parametrize(("values", "flag"), [([1, 2], "--label_threshold 2"), (["happy", "sad"], "--positive_label")])
def test_unknown_labels_name_the_flag(values, flag):
    with pytest.raises(UserError, match=flag):
        read("reward", [{"text": "a", "label": value} for value in values])


def test_a_column_named_for_the_bad_means_that_one_is_bad():
    rows = [{"text": "a", "toxic": 1}, {"text": "b", "toxic": 0}]
    assert [row["label"] for row in read("reward", rows)[0]] == [0, 1]


def test_labelled_answers_and_conversations():
    kto = [{"prompt": Q, "completion": A, "label": True}, {"prompt": Q, "completion": B, "label": False}]
    assert [row["label"] for row in read("reward", kto)[0]] == [1, 0]
    with pytest.raises(UserError, match="--row_filter label"):
        read("sft", kto)
    with pytest.raises(UserError, match="--reward_type classifier"):
        read("dpo", kto)
    assert first("reward", {"messages": [user(), said()], "label": 1}) == {"messages": [user(), said()], "label": 1}
    assert first("reward", {"text": [user(), said()], "label": 1}) == {"messages": [user(), said()], "label": 1}


MEANINGFUL = [
    ("reward", {"chosen": A, "rejected": B, "riddle": Q}, "riddle"),
    ("dpo", {"prompt": Q, "chosen": A, "rejected": B, "margin": 1.0}, "margin"),
    ("sft", {"prompt": Q, "completion": A, "label": True}, "label"),
    ("sft", {"prompt": Q, "completion": A, "answer": "7"}, "answer"),
    ("sft", {"prompt": Q, "completion": A, "weight": 0.5}, "weight"),
    ("sft", {"prompt": Q, "completion": A, "document": Q + A}, "document"),
    ("reward", {"chosen": A, "rejected": B, "text": Q}, "text"),
    ("sft", {"messages": [user(), said()], "rejected": [said()]}, "rejected"),
    ("sft", {"text": Q, "images": ["a.jpg"]}, "images"),
    ("ppo", {"prompt": Q, "image": "a.jpg"}, "image"),
]


@pytest.mark.parametrize(
    ("stage", "row", "column"), MEANINGFUL, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_column_that_carries_meaning_is_never_left_out_without_a_word(stage, row, column):
    with pytest.raises(UserError, match=rf"--ignore_columns .*{column}"):
        first(stage, row)
    assert column not in first(stage, row, ignore_columns=[column])


def test_a_margin_reaches_the_loss_that_reads_it():
    row = {"prompt": Q, "chosen": A, "rejected": B, "margin": 3.0}
    assert first("reward", row, options={"margin": True})["margin"] == 3.0


def test_columns_about_rows_are_left_out():
    row = {"prompt": Q, "chosen": A, "rejected": B, "prompt_id": "7", "source": "web forum", "score_chosen": 8}
    assert set(first("dpo", row)) == {"prompt", "chosen", "rejected"}
    assert first("sft", {"prompt": Q, "completion": A, "images": None}) == {"prompt": Q, "completion": A}


def test_meanings_given_by_the_user():
    row = {"riddle": Q, "best": A, "worst": B, "note": {"deep": "x"}}
    flags = {"columns": ["prompt=riddle", "chosen=best", "rejected=worst"]}
    assert first("dpo", row, **flags) == {"prompt": Q, "chosen": A, "rejected": B}
    as_mapping = {"columns": ['{"prompt": "riddle", "chosen": "best", "rejected": "worst"}']}
    assert first("dpo", row, **as_mapping) == first("dpo", row, **flags)
    assert first("pretrain", row, columns=["text=note.deep"]) == {"text": "x"}
    with pytest.raises(UserError, match="did you mean 'riddle'"):
        first("dpo", row, columns=["prompt=ridle"])
    with pytest.raises(UserError, match="did you mean prompt=riddle"):
        first("dpo", row, columns=["riddle=prompt"])


def test_unknown_roles_name_the_flag():
    row = {"messages": [{"role": "Customer", "content": Q}, {"role": "Agent", "content": A}]}
    with pytest.raises(UserError, match="--roles user=Customer"):
        first("sft", row)
    roles = ["user=Customer", "assistant=Agent"]
    assert first("sft", row, roles=roles) == {"messages": [user(), said()]}
    assert first("sft", row, roles=['{"user": "Customer", "assistant": "Agent"}']) == {"messages": [user(), said()]}


@pytest.mark.parametrize(
    ("stage", "empty", "kind"),
    [
        ("sft", {"prompt": Q, "completion": " \n"}, "empty_answers"),
        ("sft", {"prompt": Q, "completion": None}, "empty_answers"),
        ("sft", {"prompt": "", "completion": A}, "empty_prompts"),
        ("dpo", {"prompt": Q, "chosen": "", "rejected": B}, "empty_answers"),
        ("pretrain", {"text": float("nan")}, "empty_rows"),
        ("ppo", {"prompt": ""}, "empty_prompts"),
    ],
)
def test_empty_rows_are_dropped_and_counted(stage, empty, kind):
    full = {"prompt": Q, "completion": A, "chosen": A, "rejected": B, "text": Q}
    row = {name: full[name] for name in empty}
    rows, counts = read(stage, [row, empty])
    assert len(rows) == 1
    assert counts[kind] == 1
    assert counts["read"] == 2


def test_an_empty_rejected_answer_is_kept():
    rows, counts = read("reward", [{"prompt": [user()], "chosen": [said()], "rejected": [said("")]}])
    assert rows[0]["rejected"] == [said("")]
    assert counts["empty_rejected"] == 1


def test_rows_with_the_columns_of_several_stages_serve_each():
    row = {"prompt": Q, "completion": A, "chosen": A, "rejected": B, "text": Q + A}
    assert first("sft", row) == {"prompt": Q, "completion": A}
    assert first("dpo", row) == {"prompt": Q, "chosen": A, "rejected": B}
    assert first("pretrain", row) == {"text": Q + A}


def test_two_readings_are_an_error_and_the_named_one_is_taken():
    row = {"document": Q + A, "messages": [user(), said()]}
    with pytest.raises(UserError, match="two ways"):
        first("sft", row)
    assert first("sft", row, ignore_columns=["document"]) == {"messages": [user(), said()]}
    uf = {"prompt": Q, "chosen": [user(), said()], "rejected": [user(), said(B)], "messages": [user(), said()]}
    assert first("reward", uf) == PAIR
    kept = {"prompt": [user()], "completion": [said()]}
    assert first("sft", uf, ignore_columns=["messages", "rejected"]) == kept


@pytest.mark.parametrize("stage", STAGES)
def test_rows_without_a_known_column_name_the_flag(stage):
    with pytest.raises(UserError, match=r"--columns \w+=NAME"):
        first(stage, {"foo": "some words", "bar": 1})


def test_a_requested_format_must_fit():
    with pytest.raises(UserError, match="format kto, which needs prompt\\+completion\\+label"):
        first("reward", HH, dataset_format="kto")
