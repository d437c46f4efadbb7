"""Every stage on every architecture, against plain transformers in float32: the largest difference, or the refusal.

    python benchmarks/models.py [--architectures llama qwen3 ...] [--out benchmarks/results/models.md]

Each cell is a real run of two steps on a tiny random model, its own process for each architecture. What is compared:
pretrain and eval: the loss of held-out texts; sft: the first loss; reward: the scores of a batch; ppo and rloo: the
log-probabilities of the sampled answers; dpo: those of the chosen ones. eval also compares greedy answers. One failure
ends no other run."""

import argparse
import datetime
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import learning_matrix
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback
from trl import ModelConfig

import rlhf_recipes as rr
from rlhf_recipes.stages.dpo import build_dpo_trainer
from rlhf_recipes.stages.ppo import build_ppo_trainer
from rlhf_recipes.stages.rloo import build_rloo_trainer
from rlhf_recipes.system import describe_hardware

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))
from programs.tiny_models import ARCHITECTURES, save_model  # noqa: E402

COLUMNS = (
    "pretrain", "sft", "sft packed", "reward", "ppo full", "ppo LoRA", "ppo upper layers", "dpo", "rloo", "eval",
)  # fmt: skip
LIMIT_S = 900  # of one architecture
LINES = [f"{who} {what} {when}" for when in ("at 1", "at 2", "now", "then")
         for who, what in (("the cat", "naps"), ("an owl", "sings"), ("a king", "eats"), ("the dog", "barks"))]  # fmt: skip
ROWS = len(LINES)  # one batch, so that the first loss is that of all rows, in any order
PACKED_ROWS = 2  # fit one packed row
STEPS = {
    "max_steps": 2, "per_device_train_batch_size": ROWS, "learning_rate": 1e-3, "logging_steps": 1, "use_cpu": True,
    "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "warmup_steps": 0,
}  # fmt: skip
REWARD = "learning_matrix:low_share"


def first_logged(log_history: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Return the first entry of a log that holds a number; held-out numbers from before training come earlier."""
    return next(entry for entry in log_history if name in entry)


class Cells:
    """The runs of one architecture, each a method that returns the largest difference to plain transformers."""

    def __init__(self, name: str, place: Path) -> None:
        self.place, self.tokenizer = place, learning_matrix.byte_tokenizer()
        self.base = save_model(place / "base", name, self.tokenizer, vocab_size=len(self.tokenizer))
        self.rows = [
            {"text": f"{line}.", "prompt": f"{line}?", "completion": f" {line[4:]}", "chosen": f" {line[4:]}",
             "rejected": " no" * (1 + index % 3)} for index, line in enumerate(LINES)
        ]  # fmt: skip

    def data(self, *columns: str) -> str:
        """Write the rows with these columns only, and return their folder."""
        folder = self.place / "-".join(columns)
        folder.mkdir(exist_ok=True)
        lines = [json.dumps({name: row[name] for name in columns}) + "\n" for row in self.rows]
        for split in ("train", "test"):
            (folder / f"{split}.jsonl").write_text("".join(lines))
        return str(folder)

    def runs(self) -> dict[str, Callable[[], float]]:
        """Return the run of each column."""
        return {
            "pretrain": self.pretrain,
            "sft": lambda: self.sft(packing=False),
            "sft packed": lambda: self.sft(packing=True),
            "reward": self.reward,
            "ppo full": lambda: self.ppo({}),
            "ppo LoRA": lambda: self.ppo({}, use_peft=True, lora_r=2),
            "ppo upper layers": lambda: self.ppo({"num_layers_unfrozen": 1}),
            "dpo": self.dpo,
            "rloo": self.rloo,
            "eval": self.eval,
        }

    def folder(self, name: str) -> str:
        return tempfile.mkdtemp(prefix=name, dir=self.place)

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def plain(self, folder: str) -> Any:
        """Load a model as transformers does, without anything of this project."""
        return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()

    def log_probs(self, model: Any, ids: list[int], answer: int, temperature: float = 1.0) -> torch.Tensor:
        """Return the log-probabilities of the last `answer` ids of one row, without padding or cache."""
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].float() / temperature
        return -cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")[-answer:]

    def text_loss(self, folder: str) -> float:
        """Return the mean loss over the tokens of the texts, each after EOS; each fits one window."""
        model, texts = self.plain(folder), [self.ids(row["text"]) for row in self.rows]
        start = self.tokenizer.eos_token_id
        return -torch.cat([self.log_probs(model, [start, *ids], len(ids)) for ids in texts]).mean().item()

    def pretrain(self) -> float:
        out = self.folder("pretrain")
        rr.run_pretrain(
            rr.PretrainArguments(
                dataset_name=self.data("text"), max_length=32, sample_prompts=["the"], sample_tokens=8
            ),
            ModelConfig(self.base),
            rr.PretrainConfig(out, eval_strategy="no", **STEPS | {"per_device_train_batch_size": 4}),
        )
        return difference([json.loads(Path(out, "metrics.json").read_text())["loss"]], [self.text_loss(out)])

    def sft(self, packing: bool) -> float:
        out, rows = self.folder("sft"), self.rows[:PACKED_ROWS] if packing else self.rows
        batch = {"per_device_train_batch_size": 1} if packing else {}
        rr.run_sft(
            rr.SFTArguments(dataset_name=self.data("prompt", "completion"), max_train_samples=len(rows)),
            ModelConfig(self.base),
            rr.SFTConfig(out, packing=packing, max_length=120, **STEPS | batch),
        )
        log = first_logged(json.loads(Path(out, "trainer_state.json").read_text())["log_history"], "loss")
        model, terms = self.plain(self.base), []
        for row in rows:
            answer = [*self.ids(row["completion"]), self.tokenizer.eos_token_id]
            terms.append(self.log_probs(model, [*self.ids(row["prompt"]), *answer], len(answer)))
        return difference([log["loss"]], [-torch.cat(terms).mean().item()])

    def reward(self) -> float:
        out = self.folder("reward")
        rr.run_reward(
            rr.RewardArguments(dataset_name=self.data("prompt", "chosen", "rejected")),
            ModelConfig(self.base),
            rr.RewardConfig(out, **STEPS),
        )
        rows = [self.ids(row["prompt"] + row["chosen"]) for row in self.rows]
        scores = rr.load_reward(out, self.tokenizer).score_ids(rows)
        model = AutoModelForSequenceClassification.from_pretrained(out, dtype="float32").eval()
        with torch.no_grad():
            alone = [model(input_ids=torch.tensor([row])).logits.item() for row in rows]
        return difference(scores, alone)

    def ppo(self, options: dict[str, Any], **lora: Any) -> float:
        training = rr.PPOConfig(self.folder("ppo"), response_length=8, temperature=0.7, hints=False, **STEPS | options)
        arguments = rr.PPOArguments(dataset_name=self.data("prompt"), reward=[REWARD])
        trainer = build_ppo_trainer(arguments, ModelConfig(self.base, **lora), training)
        trainer.add_callback(first := FirstRollout(trainer))
        trainer.train()
        trainer.save_model(training.output_dir)
        model, rollout = self.plain(self.base), first.rollout
        ours, plain = [], []
        for index, mask in enumerate(rollout.response_mask):
            ids = rollout.input_ids[index][rollout.attention_mask[index].bool()].tolist()
            ours += rollout.log_probs[index][mask].tolist()
            plain += self.log_probs(model, ids, int(mask.sum()), 0.7).tolist()
        return difference(ours, plain)

    def dpo(self) -> float:
        training = rr.DPOConfig(self.folder("dpo"), **STEPS)
        trainer = build_dpo_trainer(
            rr.DPOArguments(dataset_name=self.data("prompt", "chosen", "rejected")), ModelConfig(self.base), training
        )
        trainer.train()
        trainer.save_model(training.output_dir)
        model, sums = self.plain(self.base), []
        for row in self.rows:
            answer = [*self.ids(row["chosen"]), self.tokenizer.eos_token_id]
            sums.append(self.log_probs(model, [*self.ids(row["prompt"]), *answer], len(answer)).sum().item())
        return difference(
            [first_logged(trainer.state.log_history, "logps/chosen")["logps/chosen"]], [sum(sums) / len(sums)]
        )

    def rloo(self) -> float:
        training = rr.RLOOConfig(self.folder("rloo"), max_completion_length=8, temperature=0.7, beta=0.1, **STEPS)
        arguments = rr.RLOOArguments(dataset_name=self.data("prompt"), reward=[REWARD])
        trainer = build_rloo_trainer(arguments, ModelConfig(self.base), training)
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        model, plain = self.plain(self.base), []
        for index in range(len(batch["prompt_ids"])):
            prompt, answer = (
                batch[f"{part}_ids"][index][batch[f"{part}_mask"][index].bool()].tolist()
                for part in ("prompt", "completion")
            )
            plain.append(self.log_probs(model, [*prompt, *answer], len(answer), 0.7).sum().item())
        trainer.train()
        trainer.save_model(training.output_dir)
        return difference(batch["old_logps"].tolist(), plain)

    def eval(self) -> float:
        out, options = (
            self.folder("eval"),
            {"max_new_tokens": 8, "temperature": 0.0, "use_cpu": True, "overwrite": True},
        )
        data = {"dataset_name": self.data("prompt"), "text_dataset_name": self.data("text")}
        rr.run_eval(rr.EvalArguments(models=[self.base], output_dir=out, **data, **options))
        model, stop = self.plain(self.base), self.tokenizer.eos_token_id
        lines = Path(out, "completions.jsonl").read_text().splitlines()
        for row in map(json.loads, lines):
            ids = prompt = self.ids(row["prompt"])
            while len(ids) < len(prompt) + 8 and (ids is prompt or ids[-1] != stop):
                with torch.no_grad():
                    ids = [*ids, int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())]
            if self.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True) != row["completion"]:
                raise AssertionError(f"eval answers {row['completion']!r}, which is not the model's own answer")
        if len(lines) != ROWS:
            raise AssertionError(f"eval left {len(lines)} answers to {ROWS} prompts")
        perplexity = json.loads(Path(out, "metrics.json").read_text())["perplexity"]
        return difference([math.log(perplexity)], [self.text_loss(self.base)])


def difference(ours: Sequence[float], plain: Sequence[float]) -> float:
    """Return the largest difference; nothing to compare, or a number that is not finite, is an error."""
    if not plain or not all(map(math.isfinite, [*ours, *plain])):
        raise AssertionError(f"not comparable: {list(ours)[:4]} and {list(plain)[:4]}")
    return max(abs(one - two) for one, two in zip(ours, plain, strict=True))


class FirstRollout(TrainerCallback):
    """Keeps the first rollout of a PPO run."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.rollout = trainer, None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rollout = self.rollout or self.trainer.current_rollout


def measure(name: str) -> dict[str, str]:
    """Run every column of an architecture; a cell is a difference, a refusal, or the last line of a traceback."""
    with tempfile.TemporaryDirectory(prefix="models_") as place:
        cells, results = Cells(name, Path(place)), {}
        for column, run in cells.runs().items():
            try:
                results[column] = f"{run():.0e}"
            except rr.UserError as error:
                results[column] = "refused: " + " ".join(str(error).split()).replace(str(place), "")
            except (Exception, SystemExit) as error:
                results[column] = f"TRACEBACK {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return results


def measure_in_process(name: str) -> dict[str, str]:
    """Run `measure` in a process of its own, so that a crash ends one row only."""
    command = [sys.executable, __file__, "--only", name]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return dict.fromkeys(COLUMNS, f"TRACEBACK TimeoutExpired: {LIMIT_S} s")
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
    return json.loads(lines[-1][7:]) if lines else dict.fromkeys(COLUMNS, f"TRACEBACK rc {done.returncode}: {reason}")


def table(results: dict[str, dict[str, str]]) -> str:
    """Return the results as Markdown; what is refused, or fails, is said in full below the table."""
    notes: list[str] = []

    def cell(text: str) -> str:
        if not text.startswith(("refused", "TRACEBACK")):
            return text
        if text not in notes:
            notes.append(text)
        return f"{text.split()[0].strip(':')} [{notes.index(text) + 1}]"

    lines = ["| architecture | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [
        f"| {name} | " + " | ".join(cell(row[column]) for column in COLUMNS) + " |" for name, row in results.items()
    ]
    return "\n".join([*lines, "", *[f"{number}. {text}" for number, text in enumerate(notes, 1)]])


def main() -> None:
    """Run the matrix, print each row as it is done, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES), choices=list(ARCHITECTURES))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "models.md")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        warnings.filterwarnings("ignore")
        logging.disable(logging.WARNING)
        torch.set_num_threads(1)
        print("RESULT " + json.dumps(measure(options.only)))
        return
    results = {}
    for name in options.architectures:
        results[name] = measure_in_process(name)
        print(name, " | ".join(f"{column}: {text}" for column, text in results[name].items()), flush=True)
    head = f"{datetime.date.today()}, {describe_hardware()}; largest difference to plain transformers, float32."
    options.out.write_text("\n".join([head, "", table(results), ""]), encoding="utf-8")
    print("\n".join(["", head, "", table(results)]))


if __name__ == "__main__":
    main()
