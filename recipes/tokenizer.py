"""Train a byte-level BPE tokenizer on text.

In      any text dataset: a folder, a file (.txt, .jsonl, ...) or a Hub id
Out     a tokenizer folder with a chat template; metrics.json has its bytes per token
Launch  python recipes/tokenizer.py --config recipes/configs/quickstart/tokenizer.yaml
Next    recipes/pretrain.py trains a language model with it
Docs    docs/tokenizer.md
"""

from rlhf_recipes import TokenizerArguments, one_line_errors, parse_arguments, run_tokenizer


def main() -> None:
    with one_line_errors():
        run_tokenizer(*parse_arguments(TokenizerArguments))


if __name__ == "__main__":
    main()
