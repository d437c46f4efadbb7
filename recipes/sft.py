"""Fine-tune a language model on demonstrations (supervised fine-tuning).

In      a model folder; a dataset with prompt and completion (text or messages), or messages, or text
Out     a model folder (with --use_peft: a LoRA adapter), held-out perplexity in metrics.json, curves.png
Launch  accelerate launch --config_file accelerate_configs/one_cpu.yaml \
            recipes/sft.py --config recipes/configs/quickstart/sft.yaml
Next    recipes/reward.py starts a reward model from this model; recipes/ppo.py improves it with that reward model
Docs    docs/sft.md
"""

from rlhf_recipes import ModelConfig, SFTArguments, SFTConfig, one_line_errors, parse_arguments, run_sft


def main() -> None:
    with one_line_errors():
        run_sft(*parse_arguments(SFTArguments, ModelConfig, SFTConfig))


if __name__ == "__main__":
    main()
