"""Flags of other projects and of earlier versions, and what they are called here."""

from collections.abc import Sequence

# Name there -> what to pass here. The first word after -- must be a flag of the stage, or the hint is left out.
OTHER_NAMES = {
    "prompt_column": "--columns prompt=NAME",
    "prompt_key": "--columns prompt=NAME",
    "input_key": "--columns prompt=NAME",
    "question_column": "--columns prompt=NAME",
    "instruction_column": "--columns prompt=NAME",
    "field_instruction": "--columns prompt=NAME",
    "field_input": "--columns context=NAME",
    "field_output": "--columns completion=NAME",
    "field_messages": "--columns messages=NAME",
    "field_system": "--columns system=NAME",
    "completion_column": "--columns completion=NAME",
    "response_column": "--columns completion=NAME",
    "answer_column": "--columns completion=NAME",
    "output_key": "--columns completion=NAME",
    "text_column": "--columns text=NAME",
    "dataset_text_field": "--columns text=NAME",
    "text_field": "--columns text=NAME",
    "messages_column": "--columns messages=NAME",
    "messages_key": "--columns messages=NAME",
    "system_column": "--columns system=NAME",
    "chosen_column": "--columns chosen=NAME",
    "chosen_key": "--columns chosen=NAME",
    "rejected_column": "--columns rejected=NAME",
    "rejected_key": "--columns rejected=NAME",
    "label_column": "--columns label=NAME",
    "label_key": "--columns label=NAME",
    "margin_column": "--columns margin=NAME",
    "column_mapping": "--columns prompt=NAME completion=NAME",
    "drop_long_prompts": "--too_long drop",
    "truncation": "--too_long cut",
    "cutoff_len": "--max_length N",
    "max_seq_length": "--max_length N",
    "max_prompt_length": "--too_long cut",
    "max_length": "--response_length N (tokens of an answer); prompts may fill the rest of the context (--too_long)",
    "max_new_tokens": "--response_length N",
    "max_samples": "--max_train_samples N",
    "dataset": "--dataset_name PATH",
    "dataset_path": "--dataset_name PATH",
    "train_file": "--dataset_name PATH",
    "data_files": "--dataset_name PATH --extra_dataset_names PATH",
    "train_split": "--dataset_train_split NAME",
    "eval_split": "--dataset_test_split NAME",
    "dataset_split": "--dataset_train_split NAME",
    "subset": "--dataset_config NAME",
    "template": "--as_chat true (the model's own chat template)",
    "role_mapping": "--roles user=NAME assistant=NAME",
}


def name_here(name: str, known: Sequence[str]) -> str | None:
    """Return what a flag of another project is called here, if the stage has such a flag."""
    here = OTHER_NAMES.get(name)
    return here if here is not None and here.removeprefix("--").split()[0] in known else None
