"""Proximal policy optimisation: a model learns to answer in a way that scores better.

In      a model folder; a reward model's folder or a Python function; prompts (text, messages or ids)
Out     a model folder with the value model beside it, curves.png, samples.jsonl
Launch  accelerate launch --config_file accelerate_configs/one_cpu.yaml \
            recipes/ppo.py --config recipes/configs/quickstart/ppo.yaml
Next    recipes/eval.py compares it with the model it came from
"""

from rlhf_recipes import ModelConfig, PPOArguments, PPOConfig, one_line_errors, parse_arguments, run_ppo


def main() -> None:
    with one_line_errors():
        run_ppo(*parse_arguments(PPOArguments, ModelConfig, PPOConfig))


if __name__ == "__main__":
    main()
