"""Push a folder to the Hugging Face Hub: private by default, in one commit that is read back.

In      a stage's output folder (model, adapter, tokenizer, reward model, report), or a folder of rows by split
Out     a repository on the Hub, whose id every stage and from_pretrained take; the folder stays unchanged
Launch  python recipes/push.py --folder runs/quickstart/ppo --hub_model_id me/quickstart-ppo
Next    any recipe, on any machine, with me/quickstart-ppo in place of the folder
Docs    docs/push.md
"""

from rlhf_recipes import PushArguments, one_line_errors, parse_arguments, run_push


def main() -> None:
    with one_line_errors():
        run_push(*parse_arguments(PushArguments))


if __name__ == "__main__":
    main()
