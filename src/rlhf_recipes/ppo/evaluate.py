"""Held-out prompts, answered: what that measures, and how it reads."""

from typing import Any

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.tensors import identity
from rlhf_recipes.data import Prompts
from rlhf_recipes.generation import row_seed
from rlhf_recipes.ppo.rollout.rollout import as_samples


def evaluate_prompts(trainer: Any, prompts: Prompts | None, prefix: str) -> dict[str, float]:
    """Means of score, KL, length and EOS share over all processes; logged, and told to the callbacks.

    Raises:
        UserError: fewer prompts than processes.
    """
    args = trainer.args
    if prompts is None or len(prompts) < args.world_size:
        raise UserError("there are too few held-out prompts to evaluate on; pass eval_dataset")
    asked, completions, scores = _answered(trainer, prompts, len(prompts))
    rollout = trainer.experience.rollout(
        asked["prompt_ids"], completions, scores, args.reward_weights, identity, learn=False
    )
    means = trainer.experience.metrics(rollout, scores, trainer.reduce)
    trainer.experience.prior.forget()  # these answers are none that are learnt from
    metrics = {f"{prefix}_{name}": value for name, value in means.items()}
    trainer.log(dict(metrics))
    trainer.control = trainer.callback_handler.on_evaluate(args, trainer.state, trainer.control, metrics)
    return metrics


def show_completions(trainer: Any, count: int | None, lines: int = 8) -> list[dict[str, Any]]:
    """This process's answers to so many prompts (None: all) of the held-out sets; the first are printed."""
    sets = trainer.eval_prompts if isinstance(trainer.eval_prompts, dict) else {"": trainer.eval_prompts}
    rows: list[dict[str, Any]] = []
    for prompts in sets.values():
        if prompts is None:
            raise UserError("there are no held-out prompts to answer; pass eval_dataset")
        asked, completions, scores = _answered(trainer, prompts, min(len(prompts), count or len(prompts)))
        trainer.experience.prior.forget()
        texts = completions.texts(trainer.processing_class)
        words = [
            trainer.processing_class.decode(each)
            if isinstance(prompt, list) and isinstance(prompt[0], int)
            else prompt
            for prompt, each in zip(asked["prompts"], asked["prompt_ids"], strict=True)
        ]
        rows += as_samples(words, texts, scores, completions)
    if trainer.is_world_process_zero():
        print("\n".join(f"{row['prompt']} -> {row['completion']}" for row in rows[:lines]))
    return rows


def _answered(trainer: Any, prompts: Prompts, count: int) -> Any:
    indices = range(trainer.args.process_index, count, trainer.args.world_size)
    asked = prompts.rows(indices)
    completions, scores = trainer.answer(asked, [row_seed(trainer.args.seed + 1, row) for row in indices])
    trainer.clock.read()
    return asked, completions, scores
