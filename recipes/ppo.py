"""Train a model to generate answers with a higher reward (proximal policy optimisation).

In      a model folder; reward models' folders or Python functions; prompts (text, messages or ids)
Out     a model folder with the value model in it, curves.png, samples.jsonl
Launch  accelerate launch --config_file accelerate_configs/one_cpu.yaml \
            recipes/ppo.py --config recipes/configs/quickstart/ppo.yaml
Next    recipes/eval.py compares it with the model before PPO
Docs    docs/ppo.md
"""

from rlhf_recipes import ModelConfig, PPOArguments, PPOConfig, one_line_errors, parse_arguments, run_ppo


def main() -> None:
    with one_line_errors():
        run_ppo(*parse_arguments(PPOArguments, ModelConfig, PPOConfig))


if __name__ == "__main__":
    main()
