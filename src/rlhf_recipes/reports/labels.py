"""Logged keys in words."""

LABELS = {
    "loss": "training",
    "eval_loss": "held out",
    "objective/scores": "reward model score",
    "objective/rlhf_reward": "score minus KL penalty",
    "policy/approxkl_avg": "approximate KL",
    "policy/clipfrac_avg": "policy clipped (share)",
    "val/clipfrac_avg": "value clipped (share)",
    "kl": "KL to the reference (nats per answer)",
    "eos_share": "stopped by EOS",
    "distinct_2": "distinct-2",
}


def label_of(key: str) -> str:
    """Return a logged key in words: its entry in `LABELS`, else its last part without underscores."""
    if key in LABELS:
        return LABELS[key]
    words = key.removeprefix("eval_").rsplit("/", 1)[-1].replace("_", " ")
    return f"{words}, held out" if key.startswith("eval_") else words
