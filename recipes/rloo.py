"""Train a model to generate answers with a higher reward, without a value model (REINFORCE leave-one-out).

In      a model folder; reward models' folders or Python functions; prompts (text or messages)
Out     a model folder (with --use_peft: a LoRA adapter); score, KL and length in metrics.json, curves.png
Launch  accelerate launch --config_file accelerate_configs/one_cpu.yaml \
            recipes/rloo.py --config recipes/configs/quickstart/rloo.yaml
Next    recipes/eval.py compares it with the model before RLOO, and with the result of ppo
Docs    docs/rloo.md
"""

from rlhf_recipes import ModelConfig, RLOOArguments, RLOOConfig, one_line_errors, parse_arguments, run_rloo


def main() -> None:
    with one_line_errors():
        run_rloo(*parse_arguments(RLOOArguments, ModelConfig, RLOOConfig))


if __name__ == "__main__":
    main()
