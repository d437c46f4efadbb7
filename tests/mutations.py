"""Break PPO on purpose, one formula at a time, and list the tests that fail.

    python tests/mutations.py [NAME ...]     a few minutes; exit code 1 if a mutation survives

Each mutation changes a copy of the sources. A fork of this process, where the libraries are imported, tests the copy. pytest
does not collect this file.
"""

import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ARITHMETIC = [
    f"tests/ppo/{name}.py"
    for name in (
        "rollout/test_advantages",
        "rollout/test_rewards",
        "rollout/test_rollout",
        "update/test_losses",
        "update/test_minibatches",
        "logging/test_metrics",
    )
]
ARITHMETIC.append("tests/core/test_tensors.py")
TRAINER = [f"tests/ppo/test_{name}.py" for name in ("logged_metrics", "numerics", "reward_sources")]
PROCESSES = ["tests/ppo/test_data_parallel.py"]


@dataclass(frozen=True)
class Mutation:
    """`new` replaces `old`, which must occur once in the file; `select` chooses tests of `files` (pytest's `-k`)."""

    name: str
    file: str
    old: str
    new: str
    select: str = "every_metric"
    files: tuple[str, ...] = tuple(TRAINER)


DATA = ("tests/data/test_forms.py", "tests/data/test_load.py")
ENCODING = ("tests/data/test_encoding.py",)
HELD_OUT = ("tests/training/test_held_out.py",)
ARCHITECTURES = ("tests/models/test_architectures.py",)
ADAPTERS, CONTROLS, RESUME = ((f"tests/ppo/test_{name}.py",) for name in ("adapters", "controls", "resume"))

MUTATIONS = [
    Mutation("GAE forgets lambda", "ppo/rollout/advantages.py", "gamma * lam * running", "gamma * running"),
    Mutation("GAE forgets gamma in the error", "ppo/rollout/advantages.py", "gamma * following", "following"),
    Mutation(
        "GAE reads values after the last token",
        "ppo/rollout/advantages.py",
        "values = torch.where(mask, values, torch.zeros_like(values))",
        "values = values.clone()",
    ),
    Mutation(
        "policy clip takes the larger surrogate",
        "ppo/update/losses.py",
        "TokenLosses(torch.maximum(plain",
        "TokenLosses(torch.minimum(plain",
    ),
    Mutation(
        "ratio upside down",
        "ppo/update/losses.py",
        "torch.exp(log_probs - old_log_probs)",
        "torch.exp(old_log_probs - log_probs)",
    ),
    Mutation(
        "value clip takes the smaller error", "ppo/update/losses.py", "0.5 * torch.maximum", "0.5 * torch.minimum"
    ),
    Mutation(
        "value clip around the return",
        "ppo/update/losses.py",
        "torch.clamp(values, old_values -",
        "torch.clamp(values, returns -",
    ),
    Mutation("value loss without its half", "ppo/update/losses.py", "0.5 * torch.maximum", "torch.maximum"),
    Mutation(
        "KL upside down",
        "ppo/rollout/rewards.py",
        "log_probs - reference_log_probs",
        "reference_log_probs - log_probs",
    ),
    Mutation(
        "k3 with the ratio upside down", "ppo/rollout/rewards.py", "torch.exp(-log_ratio)", "torch.exp(log_ratio)"
    ),
    Mutation("KL penalty with the wrong sign", "ppo/rollout/rewards.py", "-kl_coef * kl", "kl_coef * kl"),
    Mutation(
        "score on the first token",
        "ppo/rollout/rewards.py",
        "(mask.sum(dim=1) - 1).clamp(min=0)",
        "mask.sum(dim=1) * 0",
    ),
    Mutation(
        "score on the last column",
        "ppo/rollout/rewards.py",
        "(mask.sum(dim=1) - 1).clamp(min=0)",
        "mask.sum(dim=1) * 0 + mask.shape[1] - 1",
    ),
    Mutation(
        "missing-EOS penalty for answers with EOS",
        "ppo/rollout/rewards.py",
        "(stopped, scores, scores - penalty)",
        "(stopped, scores - penalty, scores)",
    ),
    Mutation(
        "missing-EOS penalty with the wrong sign", "ppo/rollout/rewards.py", "scores - penalty", "scores + penalty"
    ),
    Mutation(
        "advantages not whitened",
        "ppo/rollout/rollout.py",
        "torch.where(mask, masked_whiten(raw, mask, reduce=reduce)",
        "torch.where(mask, raw",
    ),
    Mutation("whitening with the biased variance", "core/tensors.py", "squares / (count - 1)", "squares / count"),
    Mutation("whitened rewards lose their mean", "ppo/rollout/rollout.py", "shift_mean=False", "shift_mean=True"),
    Mutation(
        "returns from whitened advantages",
        "ppo/rollout/rollout.py",
        "returns=raw + values",
        "returns=advantages + values",
    ),
    Mutation(
        "log-probabilities without temperature",
        "core/tensors.py",
        "else logits.float() / temperature",
        "else logits.float()",
    ),
    Mutation(
        "gradient of log-probabilities without temperature",
        "core/tensors.py",
        "weights = of_log_probs[rows, None] / ctx.temperature",
        "weights = of_log_probs[rows, None]",
    ),
    Mutation("entropy's gradient upside down", "core/tensors.py", "part -= p * (log_p", "part += p * (log_p"),
    *(
        Mutation(name, "optimizations/packing.py", old, new, "", ("tests/optimizations/test_packing.py",))
        for name, old, new in (
            ("packed rows all start at position 0", "position_ids=layout.packed(columns)", "position_ids=None"),
            ("packed rows are unpacked one position off", "(real.cumsum(0) - 1)", "real.cumsum(0)"),
            (
                "gradient of packed rows lost",
                "_put(grad, ctx.indices, ctx.total)",
                "_put(grad * 0, ctx.indices, ctx.total)",
            ),
            (
                "last layer computed for every position",
                'current.layout = options.get("packed")',
                "current.layout = None",
            ),
            (
                "last states put back in request order",
                "_put(values, indices, total)",
                "_put(values, indices * 0, total)",
            ),
        )
    ),
    Mutation("states shifted by one", "ppo/roles/outputs.py", "response_mask, first=-1)", "response_mask, first=0)"),
    Mutation(
        "attention's gradient reads later tokens",
        "optimizations/attention.py",
        "triu_(1)",
        "triu_(2)",
        "",
        ("tests/optimizations/test_attention.py",),
    ),
    Mutation(
        "casts outlive the optimizer step",
        "ppo/trainer.py",
        "            self.piece_runner.release_casts()\n",
        "",
        "kept_casts",
        ("tests/ppo/test_frozen_layers.py",),
    ),
    Mutation(
        "chunks of a minibatch overlap",
        "ppo/step.py",
        "tensor[rows] for name",
        "tensor[batches[0]] for name",
        "splitting_a_minibatch",
        ("tests/ppo/test_frozen_layers.py",),
    ),
    Mutation(
        "the lower layers are trained",
        "optimizations/frozen_trunk.py",
        "weight.requires_grad_(False)",
        "pass",
        "matches_manual_freezing",
        ("tests/ppo/test_frozen_layers.py",),
    ),
    Mutation(
        "the reference is trained with the upper layers",
        "ppo/roles/build.py",
        "model.upper.frozen_copy()",
        "model.upper",
        "matches_manual_freezing",
        ("tests/ppo/test_frozen_layers.py",),
    ),
    Mutation(
        "padding counted in positions",
        "core/tensors.py",
        "(mask.long().cumsum(dim=-1) - 1).clamp(min=0)",
        "torch.ones_like(mask).cumsum(dim=-1) - 1",
        "a_row_alone or every_metric",
    ),
    Mutation(
        "mean over positions, not tokens",
        "ppo/update/objective.py",
        "torch.zeros_like(token_losses)).sum() / tokens",
        "torch.zeros_like(token_losses)).mean()",
    ),
    Mutation(
        "mean over each micro-batch",
        "ppo/update/objective.py",
        "if tokens is None else tokens",
        "if tokens is None else mask.sum().clamp(min=1)",
    ),
    Mutation(
        "value loss without its weight",
        "ppo/update/objective.py",
        "policy.losses + options.vf_coef * value.losses",
        "policy.losses + value.losses",
    ),
    Mutation(
        "only the first stop id stops",
        "ppo/roles/build.py",
        "else stop_ids(base_model(model), tokenizer)",
        "else stop_ids(base_model(model), tokenizer)[:1]",
        "answers_stop",
    ),
    Mutation(
        "a non-finite step is taken",
        "ppo/update/guard.py",
        "if broken or self.over:",
        "if self.over:",
        "non_finite_loss",
    ),
    Mutation(
        "minibatches overlap",
        "ppo/update/minibatches.py",
        ".argsort(dim=1)",
        ".argsort(dim=1)[:, :1].repeat(1, size)",
        "one_update_matches",
    ),
    Mutation(
        "losses averaged over processes",
        "ppo/update/objective.py",
        "/ tokens * world_size",
        "/ tokens",
        "two_processes_train_like_one",
        tuple(PROCESSES),
    ),
    Mutation(
        "whitening in each process alone",
        "ppo/rollout/rollout.py",
        "masked_whiten(raw, mask, reduce=reduce)",
        "masked_whiten(raw, mask)",
        "two_processes_train_like_one",
        tuple(PROCESSES),
    ),
    Mutation(
        "the value reads through the policy's adapter",
        "ppo/roles/value.py",
        "with use_adapter(self.policy, self.value_adapter):",
        "if True:",
        "policy_and_value_train",
        ADAPTERS,
    ),
    Mutation(
        "the reference ignores the policy's adapter",
        "ppo/roles/build.py",
        "trainable=False) if came_with_adapter else None",
        "trainable=False) if False else None",
        "test_reference_of",
        ADAPTERS,
    ),
    Mutation(
        "value warm-up changes the policy",
        "ppo/update/guard.py",
        "drop_gradients_(self.model.policy_parameters())",
        "pass",
        "value_warmup",
        CONTROLS,
    ),
    Mutation(
        "target_kl without its tolerance",
        "ppo/update/guard.py",
        "TOLERANCE = 1.5",
        "TOLERANCE = 1.0",
        "target_kl",
        CONTROLS,
    ),
    Mutation(
        "the KL coefficient moves the wrong way",
        "ppo/rollout/rewards.py",
        "*= 1.0 + error",
        "*= 1.0 - error",
        "adaptive_kl",
        CONTROLS,
    ),
    Mutation(
        "scores scaled by the last batch alone",
        "ppo/rollout/rewards.py",
        "self.count = total_count",
        "self.count = 0.0",
        "scaled",
        CONTROLS,
    ),
    Mutation(
        "a resumed run forgets the state of rewards and coefficients",
        "ppo/trainer.py",
        'self.collector.restore(saved[0]["collector"])',
        "pass",
        "killed",
        RESUME,
    ),
    Mutation(
        "a resumed run repeats the steps of its update",
        "ppo/update/minibatches.py",
        "first = steps_in_update if number == finished_updates else 0",
        "first = 0",
        "killed",
        RESUME,
    ),
    Mutation(
        "a column that carries meaning is left out",
        "data/forms/leftover.py",
        "    if not carrying:",
        "    if True:",
        "",
        DATA,
    ),
    Mutation(
        "SHP's label is read the other way",
        "data/forms/votes.py",
        "return 1 - int(number)",
        "return int(number)",
        "votes",
        DATA,
    ),
    Mutation(
        "a rank of 1 is the worst",
        "data/forms/pairs.py",
        "[-number if falls and",
        "[number if falls and",
        "every_shape",
        DATA,
    ),
    Mutation(
        "the prompt stays in the answers",
        "data/forms/pairs.py",
        "first, second = first[len(shared) :], second[len(shared) :]",
        "first, second = first, second",
        "every_shape",
        DATA,
    ),
    Mutation(
        "weights of turns are forgotten",
        "data/forms/messages.py",
        '        result["train"] = trained',
        "        pass",
        "weights",
        DATA,
    ),
    Mutation(
        "a column named toxic is good at 1",
        "data/forms/labels.py",
        "!= bad_column)",
        "!= False)",
        "named_for_the_bad",
        DATA,
    ),
    Mutation(
        "a completion of several turns has loss on all",
        "data/forms/convert.py",
        'turn | {"train": False}',
        "turn",
        "several_turns",
        DATA,
    ),
    Mutation(
        "rows dropped are not counted",
        "data/forms/convert.py",
        "        context.counts[EMPTY_ANSWERS] += 1",
        "        pass",
        "counted",
        DATA,
    ),
    Mutation(
        "what a template writes after an answer is trained",
        "data/encoding.py",
        "plain_ids(without_tail(text, tokenizer), tokenizer)",
        "plain_ids(text, tokenizer)",
        "",
        ENCODING,
    ),
    Mutation(
        "logits are not capped",
        "models/logits.py",
        "torch.tanh(logits / cap) * cap",
        "logits",
        "transformers",
        ARCHITECTURES,
    ),
    Mutation(
        "batches of one row weigh as much as full ones",
        "training/held_out.py",
        "weights = [batch.counts[kinds[name]] for batch in measured]",
        "weights = [1.0 for batch in measured]",
        "",
        HELD_OUT,
    ),
]


class FailedTests:
    """A pytest plugin that collects the names of failed tests."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and report.nodeid not in self.names:
            self.names.append(report.nodeid)


def mutated_copy(folder: Path, mutation: Mutation | None) -> Path:
    """Copy sources and tests to `folder` and apply the mutation."""
    for name in ("src", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    if mutation is not None:
        path = folder / "src" / "rlhf_recipes" / mutation.file
        text = path.read_text(encoding="utf-8")
        if text.count(mutation.old) != 1:
            raise SystemExit(
                f"{mutation.name}: {mutation.old!r} occurs {text.count(mutation.old)} times in {path.name}"
            )
        path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    return folder


def failed_tests(folder: Path, mutation: Mutation | None) -> list[str]:
    """Return the tests that fail in `folder`: all of the arithmetic, and the first of the selected tests of the trainer."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = run_forked(folder, mutation)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit("pytest could not run:\n" + (folder / "output.txt").read_text(encoding="utf-8")[-3000:])
    return list(json.loads((folder / "failed.json").read_text(encoding="utf-8")))


def run_forked(folder: Path, mutation: Mutation | None) -> int:
    import pytest

    os.chdir(folder)
    output = os.open("output.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    failed, selection = FailedTests(), mutation or Mutation("none", "", "", "")
    plain = ["-p", "no:cacheprovider", "--tb=short"]
    codes = [
        pytest.main([*plain, *ARITHMETIC], plugins=[failed]),
        pytest.main([*plain, "--maxfail=1", "-k", selection.select, *selection.files], plugins=[failed]),
    ]
    import rlhf_recipes

    assert Path(str(rlhf_recipes.__file__)).is_relative_to(folder), "the copy must be tested"
    Path("failed.json").write_text(json.dumps(failed.names), encoding="utf-8")
    return 0 if {int(code) for code in codes} <= {0, 1, 2} else 1  # passed, failed, stopped at the first failure


def short(names: list[str]) -> str:
    """Name two of the failed arithmetic tests and two of the others, and count the rest."""
    arithmetic = [name for name in names if name.partition("::")[0] in ARITHMETIC]
    shown = arithmetic[:2] + [name for name in names if name not in arithmetic][:2]
    labels = [name.removeprefix("tests/").removeprefix("ppo/").removeprefix("test_") for name in shown]
    labels = [label.replace(".py::test_", ": ") for label in labels]
    return "; ".join(labels) + (f"; and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


def failed_by(mutation: Mutation | None) -> list[str]:
    """Return the tests that notice the mutation; for None, those that fail without any."""
    with tempfile.TemporaryDirectory() as name:
        return failed_tests(mutated_copy(Path(name).resolve(), mutation), mutation)


def main(wanted: list[str]) -> int:
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    import torch
    from datasets import Dataset  # noqa: F401  loaded once, for every fork
    from peft import PeftModel  # noqa: F401
    from transformers import GPT2ForSequenceClassification, PreTrainedTokenizerFast, Trainer  # noqa: F401

    torch.set_num_threads(1)
    broken = failed_by(None)
    if broken:
        print(f"failing without a mutation: {short(broken)}")
        return 1
    survivors = []
    print("| mutation | failing tests |\n|---|---|")
    for mutation in MUTATIONS:
        if not wanted or any(word in mutation.name for word in wanted):
            failing = failed_by(mutation)
            print(f"| {mutation.name} | {short(failing) or '**none: it survives**'} |", flush=True)
            survivors += [] if failing else [mutation.name]
    print(f"\n{len(survivors)} survive" + (f": {', '.join(survivors)}" if survivors else ""))
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
