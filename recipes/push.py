"""Push a folder to the Hugging Face Hub: private unless told otherwise, in one commit, read back before it counts.

In      a folder that any stage left (model, adapter, tokenizer, reward model, report), or rows by split
Out     a repo of the Hub that the next stage takes by its id, as does from_pretrained; the folder stays as it is
Launch  python recipes/push.py --folder runs/quickstart/ppo --hub_model_id me/quickstart-ppo
Next    any recipe, on any machine, with me/quickstart-ppo in place of the folder
"""

from rlhf_recipes import PushArguments, one_line_errors, parse_arguments, run_push


def main() -> None:
    with one_line_errors():
        run_push(*parse_arguments(PushArguments))


if __name__ == "__main__":
    main()
