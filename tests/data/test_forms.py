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
    "conversation with a system": {"conversations": [human()], "system": "", "chosen": gpt(), "rejected": gpt(B)},
    "conversation with its answer": {"messages": [user(), said()], "chosen": said(), "rejected": said(B)},
    "conversation in all three": {
        "messages": [user(), said()], "chosen": [user(), said()], "rejected": [user(), said(B)],
    },
    "stack exchange": {"qid": 1, "question": Q, "response_j": A, "response_k": B},
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


@pytest.mark.parametrize(
    "shape", [shape for shape in CHAT_PAIRS if not shape.startswith(("arena", "best", "conversation"))]
)
def test_a_prompt_is_found_in_preferences(shape):
    row = first("ppo", CHAT_PAIRS[shape])
    assert row.pop("prompt") == [user()]
    assert "prompt" not in row  # the other columns are passed on as they are
    assert row.items() <= CHAT_PAIRS[shape].items()


CONVERSATIONS = {
    "openai": {"messages": [user(), said()]},
    "sharegpt": {"conversations": [human(), gpt()]},
    "sharegpt under another name": {"messages": [human(), gpt()]},
    "questions and answers": {"conversation": [{"human": Q, "assistant": A}]},
    "inputs and outputs": {"conversation": [{"input": Q, "output": A}]},
    "other names": {"Messages": [{"sender": "用户", "text": Q}, {"sender": "助手", "text": A}]},
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
    lost = {"messages": [user(), said(B, loss=False), user("Again."), said(A, loss=True)]}
    assert first("sft", lost) == first(
        "sft", row | {"messages": [user(), said(B, train=False), *lost["messages"][2:]]}
    )
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
    partly = row | {"scores": ["2", "N/A", None]}
    pairs, counts = read("dpo", [row, partly, {"prompt": "p", "responses": [], "scores": []}])
    assert (len(pairs), counts["unscored_answers"], counts["few_answers"]) == (2, 2, 2)
    with pytest.raises(UserError, match="name it one of response"):
        read("dpo", [{"prompt": "p", "responses": [{"body": "a", "score": 1}, {"body": "b", "score": 2}]}])
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
    numbered = {"prompt": Q, "response_1": B, "response_2": A}
    zero = {"prompt": Q, "response_0": B, "response_1": A, "better_response_id": 1, "safer_response_id": 0}
    best = {"prompt": Q, "chosen": A, "rejected": B}
    assert first("dpo", numbered | {"preference": 2}) == first("dpo", numbered | {"preference": "response_2"}) == best
    assert first("dpo", numbered | {"preference_strength": 3}) == first("dpo", zero) == best
    assert first("dpo", zero, columns=["vote=safer_response_id"])["chosen"] == B
    named = {"model_a": "x-1", "model_b": "y-2", "response_a": B, "response_b": A, "prompt": Q}
    assert first("dpo", named | {"winner": "y-2"}) == best
    scored = {"question": {"full_text": Q}, "answer_0": B, "answer_1": A, "score_0": -0.5, "score_1": "0.5"}
    assert first("dpo", scored, columns=["prompt=question.full_text"]) == best
    with pytest.raises(UserError, match="names no answer"):  # 0 may mean the first
        first("dpo", numbered | {"preference": 0})
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


@pytest.mark.parametrize("values", [(1, -1), ("Y", "N"), ("thumbs_up", "thumbs_down"), ("正面", "负面"), (True, 0)])
def test_labels_whose_names_leave_no_doubt(values):
    assert [row["label"] for row in read("reward", [{"text": "a", "label": each} for each in values])[0]] == [1, 0]


def test_a_split_without_labels_is_named():
    with pytest.raises(UserError, match="--dataset_test_split validation"):
        read("reward", [{"text": "a", "label": -1}])


@pytest.mark.parametrize(("values", "flag"), [([1, 2], "--label_threshold 2"), (["happy", "sad"], "--positive_label")])
def test_unknown_labels_name_the_flag(values, flag):
    with pytest.raises(UserError, match=flag):
        read("reward", [{"text": "a", "label": value} for value in values])


def test_a_column_named_for_the_bad_means_that_one_is_bad():
    for name, values, good in (
        ("toxic", (1, 0), [0, 1]),
        ("is_hate", ("yes", "no"), [0, 1]),
        ("non_toxic", (1, 0), [1, 0]),
        ("is_safe", (True, False), [1, 0]),
    ):
        rows = [{"text": "a", name: values[0]}, {"text": "b", name: values[1]}]
        assert [row["label"] for row in read("reward", rows)[0]] == good
    rows = [{"text": "a", "toxicity": 0.8}, {"text": "b", "toxicity": 0.1}]
    with pytest.raises(UserError, match=r"from 0\.8 on are bad"):
        read("reward", rows)
    assert [row["label"] for row in read("reward", rows, options={"label_threshold": 0.5})[0]] == [0, 1]


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
    ("sft", {"text": Q, "label": 1}, "label"),
    ("sft", {"prompt": Q, "text": A}, "prompt"),
    ("sft", {"document": Q, "summary": A}, "summary"),
    ("sft", {"text": Q, "role": "prompter"}, "role"),
    ("sft", {"question": Q, "answer": "A", "options": [A, B]}, "options"),
    ("sft", {"question": Q, "answer": A, "reasoning": "because"}, "reasoning"),
    ("sft", {"question": Q, "answer": A, "context": {"sentences": ["x"]}}, "context"),
    ("sft", {"prompt": Q, "completion": A, "is_safe": False}, "is_safe"),
    ("sft", {"inputs": Q, "targets": A, "definition": "Answer."}, "definition"),
    ("pretrain", {"text": "https://example.org", "content": Q}, "content"),
]


@pytest.mark.parametrize(
    ("stage", "row", "column"), MEANINGFUL, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_column_that_carries_meaning_is_never_left_out_without_a_word(stage, row, column):
    with pytest.raises(UserError, match=rf"--ignore_columns .*{column}"):
        first(stage, row)
    assert column not in first(stage, row, ignore_columns=[column])


READ_BY_A_FLAG = [
    ("sft", {"question": Q, "answer": 7}, "completion=answer", "7"),
    ("sft", {"prompt": Q, "completion": 7}, "completion=completion", "7"),
    ("sft", {"question": Q, "answers": {"text": [A, B], "answer_start": [1, 2]}}, "completion=answers.text.0", A),
    ("sft", {"question": Q, "answer": [A, B]}, "completion=answer.0", A),
    ("sft", {"prompt": Q, "completion": {"text": A}}, "completion=completion.text", A),
    ("sft", {"document": Q, "summary": A}, "prompt=document completion=summary", A),
    ("sft", {"prompt": Q, "text": A}, "completion=text", A),
]


@pytest.mark.parametrize(("stage", "row", "columns", "answer"), READ_BY_A_FLAG, ids=lambda value: str(value)[:30])
def test_the_flag_that_an_error_names_reads_the_column(stage, row, columns, answer):
    with pytest.raises(UserError, match=rf"--columns {columns}( |$|,)"):
        first(stage, row)
    read_answer = first(stage, row, columns=columns.split())["completion"]
    assert read_answer in (answer, [said(answer)])


def test_texts_that_two_say_in_turn_are_turns_by_a_flag():
    row = {"conversations": [Q, A]}
    with pytest.raises(UserError, match="--columns messages=conversations if"):
        first("sft", row)
    assert first("sft", row, columns=["messages=conversations"]) == {"messages": [user(), said()]}
    assert first("ppo", row, columns=["messages=conversations"])["prompt"] == [user()]


def test_a_flag_is_shown_as_it_is_typed():
    with pytest.raises(UserError, match="--ignore_columns 'System Prompt'"):
        first("sft", {"prompt": Q, "completion": A, "system": "a", "System Prompt": "b"})
    with pytest.raises(UserError, match="--roles 'user=a customer'"):
        first("sft", {"messages": [{"role": "a customer", "content": Q}, said()]})


def test_one_of_two_labels_is_chosen_by_the_user():
    row = {"prompt": Q, "completion": A, "is_safe": True, "is_helpful": False}
    with pytest.raises(UserError, match="--ignore_columns is_helpful"):
        first("reward", row)
    assert first("reward", row, ignore_columns=["is_safe"])["label"] == 0


def test_names_are_compared_without_case_spaces_and_dashes():
    row = {"System Prompt": "s", "INSTRUCTION": Q, "Response": A}
    assert first("sft", row) == {"prompt": [{"role": "system", "content": "s"}, user()], "completion": [said()]}
    assert first("dpo", {"User-Prompt": Q, "chosen": A, "rejected": B, "chosen-model": "x"})["prompt"] == Q


def test_history_of_every_kind():
    turns = [user("a"), said("b"), user()]
    for history in ([["a", "b"]], "[['a', 'b']]", [user("a"), said("b")]):
        assert first("sft", {"instruction": Q, "output": A, "history": history})["prompt"] == turns
    with pytest.raises(UserError, match="--ignore_columns history"):
        first("sft", {"instruction": Q, "output": A, "history": "a and b"})


def test_cells_of_a_table_without_a_value():
    chat = str([user(), said()])
    rows, counts = read("sft", [{"messages": chat}, {"messages": ""}])
    assert (rows, counts["empty_rows"]) == ([{"messages": [user(), said()]}], 1)
    pairs = [{"prompt": Q, "chosen": A, "rejected": B, "margin": margin} for margin in ("1.5", "", None)]
    assert [row["margin"] for row in read("reward", pairs, options={"margin": True})[0]] == [1.5, 0.0, 0.0]


def test_transcripts_after_hashes_become_turns_by_a_flag():
    for text in (
        f"### Human: {Q}### Assistant: {A}",
        f"### Human: {Q}\n### Assistant: {A}",
        f"USER: {Q}\n\nASSISTANT: {A}",
    ):
        assert first("sft", {"text": text}, as_chat=True) == {"messages": [user(), said()]}


def test_media_in_messages_are_refused():
    with pytest.raises(UserError, match="only text is read"):
        first("sft", {"messages": [user() | {"images": ["a.jpg"]}, said()]})


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
    with pytest.raises(UserError, match="--roles user=Customer or --roles assistant=Customer"):
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
