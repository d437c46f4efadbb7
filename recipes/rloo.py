"""REINFORCE leave-one-out: a model learns to answer in a way that scores better, without a value model.

In      a model folder; a reward model's folder or a Python function; prompts (text or messages)
Out     a model folder (with --use_peft: a LoRA adapter), score, KL and length in metrics.json, curves.png
Launch  accelerate launch --config_file accelerate_configs/one_cpu.yaml \
            recipes/rloo.py --config recipes/configs/quickstart/rloo.yaml
Next    recipes/eval.py compares it with the model it came from, and with the one that ppo left
"""

from rlhf_recipes import ModelConfig, RLOOArguments, RLOOConfig, one_line_errors, parse_arguments, run_rloo


def main() -> None:
    with one_line_errors():
        run_rloo(*parse_arguments(RLOOArguments, ModelConfig, RLOOConfig))


if __name__ == "__main__":
    main()
