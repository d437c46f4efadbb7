"""Compare models on the same prompts: perplexity, reward and gold scores, win rates, KL, length, repetition.

In      models (folders or Hub ids), prompts, and optionally texts, a reward model, a gold function, a reference model
Out     a report folder: metrics.json, a card with the table, completions.jsonl, models.png
Launch  python recipes/eval.py --config recipes/configs/quickstart/eval.yaml
Next    read README.md in the report folder
Docs    docs/eval.md
"""

from rlhf_recipes import EvalArguments, one_line_errors, parse_arguments, run_eval


def main() -> None:
    with one_line_errors():
        run_eval(*parse_arguments(EvalArguments))


if __name__ == "__main__":
    main()
