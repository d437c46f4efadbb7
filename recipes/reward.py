"""Train a reward model on preference pairs, or on texts labelled good and bad.

In      a model folder; a dataset with chosen and rejected (and prompt), as text or messages, or with text and label
Out     a reward-model folder; accuracy and calibration on held-out rows in metrics.json, curves.png, reliability.png
Launch  accelerate launch --config_file accelerate_configs/one_cpu.yaml \
            recipes/reward.py --config recipes/configs/quickstart/reward.yaml
Next    recipes/ppo.py takes the folder as a reward
Docs    docs/reward.md
"""

from rlhf_recipes import ModelConfig, RewardArguments, RewardConfig, one_line_errors, parse_arguments, run_reward


def main() -> None:
    with one_line_errors():
        run_reward(*parse_arguments(RewardArguments, ModelConfig, RewardConfig))


if __name__ == "__main__":
    main()
