"""Hints: one line about what may be wrong when a metric leaves its healthy range."""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

logger = logging.getLogger(__name__)

History = list[dict[str, float]]  # the logged metrics of each update, the newest last


@dataclass(frozen=True)
class Hint:
    """name: as in docs/ppo.md. triggered: whether the newest update is out of range. text: what to try."""

    name: str
    triggered: Callable[[History], bool]
    text: str


def _moved(name: str, history: History, factor: float) -> bool:
    """Return whether a metric is above `factor` times its first value (below, for factors under 1)."""
    first, last = history[0].get(name), history[-1].get(name)
    if first is None or last is None or len(history) < 3 or first <= 0:
        return False
    return last > factor * first if factor > 1 else last < factor * first


def _value(name: str, history: History, default: float = 0.0) -> float:
    return history[-1].get(name, default) if history else default


def _trend(name: str, history: History) -> float:
    """Return the mean of the newest third minus that of the oldest; 0 before there are six updates."""
    values = [update[name] for update in history if name in update]
    third = len(values) // 3
    return sum(values[-third:]) / third - sum(values[:third]) / third if third >= 2 else 0.0


def _tokens(history: History) -> float:
    return max(1.0, _value("completions/mean_length", history, 1.0))


HINTS = [
    Hint(
        "KL runaway",
        lambda h: _value("objective/kl", h) > max(20.0, 0.5 * _tokens(h)),
        "the policy is {objective/kl:.1f} nats per answer from its reference, so the reward model reads text unlike its "
        "training data; raise kl_coef, lower learning_rate, or set adaptive_kl_target",
    ),
    Hint(
        "negative KL",
        lambda h: _value("objective/kl", h) < -0.05 * _tokens(h),
        "the KL to the reference is {objective/kl:.1f}: tokens are sampled from another distribution than the measured one; "
        "look at generation_kwargs, and at a generate() of your own",
    ),
    Hint(
        "ratio off 1",
        lambda h: abs(_value("val/ratio", h, 1.0) - 1.0) > 0.1,
        "the mean probability ratio is {val/ratio:.2f}: steps are too large; lower learning_rate or num_ppo_epochs, or set "
        "target_kl",
    ),
    Hint(
        "clipping",
        lambda h: _value("policy/clipfrac_avg", h) > 0.3,
        "{policy/clipfrac_avg:.0%} of the tokens are clipped and give no gradient; lower learning_rate or num_ppo_epochs",
    ),
    Hint(
        "value loss exploding",
        lambda h: _moved("loss/value_avg", h, 10.0),
        "the value loss is ten times what it was; lower value_learning_rate or vf_coef, or scale the scores "
        "(use_score_scaling, reward_clip_range)",
    ),
    Hint(
        "uninformative value",
        lambda h: len(h) >= 20 and _value("val/explained_variance", h, 1.0) < -0.5,
        "the values are worse than a constant (explained variance {val/explained_variance:.2f}); raise "
        "value_learning_rate, or set value_warmup_updates to a few",
    ),
    Hint(
        "entropy collapse",
        lambda h: _moved("policy/entropy_avg", h, 0.3),
        "entropy has fallen to {policy/entropy_avg:.2f} nats per token, below a third of its first value: answers become alike; "
        "raise kl_coef or entropy_coef, and look at the samples",
    ),
    Hint(
        "length drift",
        lambda h: _moved("completions/mean_length", h, 2.0) or _moved("completions/mean_length", h, 0.5),
        "answers have come to {completions/mean_length:.0f} tokens: the reward may pay for length; compare it with "
        '"always pick the longer answer", or set missing_eos_penalty',
    ),
    Hint(
        "EOS share falling",
        lambda h: _trend("completions/eos_share", h) < -0.2,
        "only {completions/eos_share:.0%} of the answers end by themselves; set missing_eos_penalty or raise "
        "response_length",
    ),
    Hint(
        "steps skipped",
        lambda h: _value("val/skipped_steps", h) > _value("val/skipped_steps", h[:-1]),  # counted over the whole run
        "{val/skipped_steps:.0f} optimizer steps had a loss that is not finite and were skipped; lower learning_rate, or "
        "train in float32",
    ),
]


def overoptimized_reward(history: History, unweighted: Collection[str] | None = None) -> str | None:
    """Return the logged name of a reward that falls while the score rises, or None.

    unweighted: the names of the rewards of weight 0, which are looked at; None: all rewards.
    """
    names = [name for name in history[-1] if name.startswith("rewards/")]
    if unweighted is not None:
        names = [name for name in names if name.removeprefix("rewards/") in unweighted]
    if _trend("objective/scores", history) <= 0:
        return None
    return next(
        (name for name in names if _trend(name, history) < -0.05 * abs(history[0].get(name, 0.0)) - 0.01), None
    )


def _numbers(logs: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in logs.items() if isinstance(value, (int, float))}


class Hints(TrainerCallback):
    """Logs each hint once, and again only after its metric has been healthy in between.

    unweighted: returns the names of the rewards of weight 0; without it every reward is taken for one.
    """

    def __init__(self, unweighted: Callable[[], Collection[str]] | None = None) -> None:
        self.unweighted = unweighted
        self.history: History = []
        self._active: set[str] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the earlier updates of a resumed run."""
        self.history = [_numbers(logs) for logs in state.log_history if "objective/kl" in logs]

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or "objective/kl" not in logs:
            return
        self.history.append(_numbers(logs))
        for name, text in self.hints():
            logger.warning("%s: %s (docs/ppo.md)", name, text)

    def hints(self) -> list[tuple[str, str]]:
        """Return name and text of each hint that has been triggered since the last call."""
        active = {hint.name: hint.text.format_map(self.history[-1]) for hint in HINTS if hint.triggered(self.history)}
        unweighted = None if self.unweighted is None else self.unweighted()
        falling = overoptimized_reward(self.history, unweighted)
        if falling is not None:
            active["over-optimisation"] = (
                f"the score rises while {falling} falls: the policy exploits the reward model instead of improving; stop "
                "at an earlier checkpoint, raise kl_coef, or train the reward model on such answers"
            )
        new = [(name, text) for name, text in active.items() if name not in self._active]
        self._active = set(active)
        return new
