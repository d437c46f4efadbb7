"""Logged keys in words."""

LABELS = {
    "loss": "training",
    "eval_loss": "held out",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "loss/policy_avg": "policy loss",
    "loss/value_avg": "value loss",
    "objective/scores": "reward model score",
    "objective/rlhf_reward": "score minus KL penalty",
    "objective/kl": "KL",
    "objective/kl_coef": "KL coefficient",
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
    if key.startswith("eval_"):
        return f"{label_of(key.removeprefix('eval_'))}, held out"
    return key.rsplit("/", 1)[-1].replace("_", " ")
