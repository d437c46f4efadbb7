"""Pretrain a GPT-2 language model from scratch, or continue a checkpoint.

In      a text dataset and a tokenizer (or a model to continue)
Out     a model folder with held-out perplexity, bits per byte, curves and sample continuations
Launch  accelerate launch --config_file accelerate_configs/one_cpu.yaml \
            recipes/pretrain.py --config recipes/configs/quickstart/pretrain.yaml
Next    recipes/sft.py teaches it to answer; recipes/reward.py and recipes/ppo.py can start from it too
Docs    docs/pretrain.md
"""

from rlhf_recipes import ModelConfig, PretrainArguments, PretrainConfig, one_line_errors, parse_arguments, run_pretrain


def main() -> None:
    with one_line_errors():
        run_pretrain(*parse_arguments(PretrainArguments, ModelConfig, PretrainConfig))


if __name__ == "__main__":
    main()
