"""Train a model on preferences between answers, without a reward model (direct preference optimisation).

In      a model folder; a dataset with prompt, chosen and rejected, as text or messages
Out     a model folder (with --use_peft: a LoRA adapter); held-out loss, accuracy and margin in metrics.json, curves.png
Launch  accelerate launch --config_file accelerate_configs/one_cpu.yaml \
            recipes/dpo.py --config recipes/configs/quickstart/dpo.yaml
Next    recipes/eval.py compares it with the model before DPO, and with the result of ppo
Docs    docs/dpo.md
"""

from rlhf_recipes import DPOArguments, DPOConfig, ModelConfig, one_line_errors, parse_arguments, run_dpo


def main() -> None:
    with one_line_errors():
        run_dpo(*parse_arguments(DPOArguments, ModelConfig, DPOConfig))


if __name__ == "__main__":
    main()
