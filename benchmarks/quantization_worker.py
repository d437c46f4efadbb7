"""One row of quantization.py: a stage in one precision, on the models of the quickstart, in a separate process."""

import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import torch
from bitsandbytes.functional import dequantize_4bit, has_avx512bf16
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from learning_matrix import byte_tokenizer
from peers import peak_mib
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_recipes import PPOConfig, PPOTrainer, load_reward, parse_arguments
from rlhf_recipes.core.unwrapping import base_model
from rlhf_recipes.data import encode_completion
from rlhf_recipes.evaluation import completion_perplexity, evaluate_model
from rlhf_recipes.generation import Sampling, stop_ids
from rlhf_recipes.models import build_gpt2, load_causal_lm, load_reward_model, load_tokenizer, quantization_kwargs
from rlhf_recipes.stages import eval as evaluation
from rlhf_recipes.stages import ppo, reward, sft
from rlhf_recipes.system import apply_bitsandbytes_workarounds_

CONFIGS = Path(__file__).parents[1] / "recipes" / "configs" / "quickstart"
PRECISIONS: dict[str, dict[str, Any]] = {  # arguments of `quantization_kwargs`
    "full": {"bits": None},
    "8-bit": {"bits": 8},
    "4-bit": {"bits": 4},
    "4-bit double": {"bits": 4, "nested": True},
}
LORA: dict[str, Any] = {"use_peft": True, "lora_r": 16, "lora_dropout": 0.0}
TARGETS = ["c_attn", "c_proj", "c_fc"]
INPUTS: dict[str, dict[str, str]] = {  # what a stage reads, below the quickstart's folder
    "sft": {"model_name_or_path": "pretrain", "dataset_name": "world/demonstrations"},
    "reward": {"model_name_or_path": "reward", "dataset_name": "world/preferences"},
    "ppo": {"model_name_or_path": "sft", "dataset_name": "world/prompts"},
}
CHANGES: dict[str, dict[str, Any]] = {  # changes of a stage's YAML: fewer steps, and learning rates for an adapter
    "sft": {"max_steps": 200, "learning_rate": 3e-3},
    "reward": {"max_steps": 200, "learning_rate": 3e-4},
    "ppo": {"total_episodes": 960, "learning_rate": 2e-3, "max_test_samples": 16},
}
PROMPTS = 200
GOLD = "rlhf_recipes.quickstart:gold_score"
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


def clock() -> float:
    """Return CPU seconds; on a GPU wall seconds, after waiting for the GPU."""
    if not GPU:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


# Memory.


def tensors_in(module: Any) -> Iterator[torch.Tensor]:
    """Yield the weights and, for quantized ones, their scales and codes."""
    yield from module.parameters()
    yield from module.buffers()
    for layer in module.modules():
        if isinstance(layer, Linear4bit):
            state = layer.weight.quant_state
            inner = [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
            yield from (state.absmax, state.code, *inner)
        if isinstance(layer, Linear8bitLt):
            of_weight = [getattr(layer.weight, name, None) for name in ("CB", "SCB")]
            yield from (part for part in (*of_weight, layer.state.CB, layer.state.SCB) if part is not None)


def bytes_in(tensors: Any) -> int:
    """Return the bytes of the tensors; a shared storage counts once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def roles_of(policy: Any, reward_model: Any = None, value: Any = None) -> dict[str, int]:
    """Return the bytes of the base, of the trained weights on it, and of a reward model. The base is the reference."""
    total = bytes_in(tensors_in(policy))
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    heads = [] if value is None else list(value.parameters())
    roles = {"base": total - bytes_in(trained), "trained": bytes_in([*trained, *heads])}
    return roles | ({} if reward_model is None else {"reward_model": bytes_in(tensors_in(reward_model))})


# Stages.


def quantization_flags(precision: str) -> dict[str, Any]:
    """Return the flags that load a stage's model in this precision."""
    settings = PRECISIONS[precision]
    if not settings["bits"]:
        return {}
    return {f"load_in_{settings['bits']}bit": True, "use_bnb_nested_quant": settings.get("nested", False)}


def stage_arguments(stage: str, run: Path, out: Path, precision: str, **more: Any) -> tuple[Any, ...]:
    """Return the arguments of a stage: its YAML in the quickstart, an adapter, and the precision."""
    inputs = {name: str(run / folder) for name, folder in INPUTS[stage].items()}
    output = {"output_dir": out, "use_cpu": not GPU, "disable_tqdm": True}
    flags = LORA | CHANGES[stage] | quantization_flags(precision) | inputs | output | more
    words = ["--config", str(CONFIGS / f"{stage}.yaml")]
    for name, value in flags.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    hints = get_type_hints(getattr(import_module(f"rlhf_recipes.stages.{stage}"), f"run_{stage}"))
    return parse_arguments(*(hint for name, hint in hints.items() if name != "return"), argv=words)


def both_ways(folder: Path, precision: str, load: Callable[..., Any]) -> dict[str, Any]:
    """Load a saved model twice: in the precision it was trained in, and merged into the base in full precision."""
    return {"again": load(str(folder), **quantization_kwargs(**PRECISIONS[precision])), "merged": load(str(folder))}


def rows_of(run: Path, name: str) -> list[dict[str, Any]]:
    """Return the held-out rows of a dataset of the world."""
    return [json.loads(line) for line in (run / "world" / name / "test.jsonl").read_text().splitlines()]


def metrics_in(folder: Path) -> dict[str, Any]:
    """Return metrics.json of a stage's folder."""
    metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return metrics


def of_eval(run: Path, precision: str, out: Path) -> dict[str, Any]:
    """Evaluate the pretrained and the fine-tuned model; the KL is to the fine-tuned one in full precision."""
    pretrained, tuned = str(run / "pretrain"), str(run / "sft")
    arguments = evaluation.EvalArguments(
        models=[tuned, pretrained], reference=tuned, dataset_name=str(run / "world" / "prompts"), gold=GOLD,
        num_prompts=PROMPTS, text_dataset_name=str(run / "world" / "corpus"), num_texts=100, max_new_tokens=40,
        temperature=0.7, use_cpu=not GPU, output_dir=str(out), **quantization_flags(precision),
    )  # fmt: skip
    started = clock()
    metrics = metrics_in(evaluation.run_eval(arguments))["models"]
    seconds = clock() - started
    model = load_causal_lm(tuned, **quantization_kwargs(**PRECISIONS[precision]))
    return {
        "perplexity": metrics["pretrain"]["perplexity"],
        "gold": metrics["sft"]["gold_score"],
        "kl": metrics["sft"]["kl"],
        "roles": {"base": bytes_in(tensors_in(model))},
        "seconds": seconds,
    }


def of_sft(run: Path, precision: str, out: Path) -> dict[str, Any]:
    """Fine-tune the pretrained model; measured is the perplexity of held-out answers."""
    trainer = sft.build_sft_trainer(*stage_arguments("sft", run, out, precision))
    rows, tokenizer, roles = sft.loss_spans(trainer.eval_dataset), trainer.processing_class, roles_of(trainer.model)

    def measured(model: Any) -> float:
        return completion_perplexity(model, tokenizer, rows, batch_size=64)["perplexity"]

    before, started = measured(trainer.model), clock()
    metrics = metrics_in(sft.run_sft(*stage_arguments("sft", run, out, precision)))
    seconds = clock() - started
    loaded = {name: measured(model) for name, model in both_ways(out, precision, load_causal_lm).items()}
    return {"before": before, "after": metrics["perplexity"], **loaded, "roles": roles, "seconds": seconds}


def of_reward(run: Path, precision: str, out: Path) -> dict[str, Any]:
    """Train the reward model further; measured is the share of held-out pairs in the right order.

    From a language model it would be a matter of luck in which step so small a reward model starts to improve.
    """
    model = reward.build_reward_trainer(*stage_arguments("reward", run, out, precision)).model
    tokenizer, rows, roles = load_tokenizer(str(run / "reward")), rows_of(run, "preferences"), roles_of(model)

    def measured(model: Any) -> float:
        reward_model: Any = load_reward(model, tokenizer)
        ids = [
            [encode_completion(row["prompt"], row[side], tokenizer) for row in rows] for side in ("chosen", "rejected")
        ]
        chosen, rejected = (reward_model.score_ids([[*prompt, *answer] for prompt, answer in side]) for side in ids)
        return sum(map(float.__gt__, chosen, rejected)) / len(rows)

    before, started = measured(model), clock()
    metrics = metrics_in(reward.run_reward(*stage_arguments("reward", run, out, precision)))
    seconds = clock() - started
    loaded = {name: measured(model) for name, model in both_ways(out, precision, load_reward_model).items()}
    return {"before": before, "after": metrics["reward_accuracy"], **loaded, "roles": roles, "seconds": seconds}


def of_ppo(run: Path, precision: str, out: Path) -> dict[str, Any]:
    """Train the fine-tuned model with PPO; measured are the gold and the reward model's score of held-out answers."""
    frozen = {"frozen_bits": bits} if (bits := PRECISIONS[precision]["bits"]) else {}
    rewards = [str(run / "reward"), GOLD]
    trainer = ppo.build_ppo_trainer(*stage_arguments("ppo", run, out, precision, reward=rewards, **frozen))
    rows, tokenizer = rows_of(run, "prompts")[:PROMPTS], trainer.processing_class
    inputs: dict[str, Any] = {
        "columns": {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"},
        "gold": load_reward(GOLD, tokenizer),
        "reward_model": trainer.rewards[0],
    }

    def measured(model: Any) -> dict[str, float]:
        sampling = Sampling(40, 0.7, stop_ids=stop_ids(base_model(model), tokenizer))
        metrics = evaluate_model(
            model, tokenizer, [row["prompt"] for row in rows], sampling=sampling, **inputs
        ).metrics
        return {"gold": metrics["gold_score"], "reward_model": metrics["reward_score"]}

    roles = roles_of(trainer.model.policy, trainer.rewards[0].model, trainer.model.value_model)
    before, started = measured(trainer.model.policy), clock()
    trainer.train()
    seconds, after = clock() - started, measured(trainer.model.policy)
    trainer.save_model()
    loaded = {name: measured(model) for name, model in both_ways(out, precision, load_causal_lm).items()}
    return {"before": before, "after": after, **loaded, "roles": roles, "seconds": seconds}


def of_gpt2(run: Path, precision: str, out: Path) -> dict[str, Any]:
    """Run one PPO update with adapters for policy and value, on GPT-2's shape with random weights.

    run: folder of the models. precision: "models only" saves them there instead.
    """
    base, reward_folder = run / "gpt2" / "base", run / "gpt2" / "reward_model"
    if precision == "models only":
        tokenizer = byte_tokenizer()
        torch.manual_seed(0)
        model = build_gpt2("gpt2", tokenizer)
        model.resize_token_embeddings(50257)
        model.save_pretrained(base)
        reward_model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
        reward_model.config.pad_token_id = tokenizer.pad_token_id
        reward_model.save_pretrained(reward_folder)
        for folder in (base, reward_folder):
            tokenizer.save_pretrained(folder)
        return {}
    config = quantization_kwargs(**PRECISIONS[precision]).get("quantization_config")
    args = PPOConfig(
        output_dir=str(out), per_device_train_batch_size=4, response_length=8, num_ppo_epochs=1, max_steps=1, bf16=GPU,
        report_to="none", disable_tqdm=True, save_strategy="no", hints=False, use_cpu=not GPU, log_completions=False,
    )  # fmt: skip
    adapter = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=TARGETS, fan_in_fan_out=config is None)
    trainer = PPOTrainer(
        str(base), [str(reward_folder)], args, [{"prompt": f"prompt {row}"} for row in range(4)], peft_config=adapter,
        quantization_config=config, reward_quantization_config=config,
    )  # fmt: skip
    started = clock()
    trainer.train()
    return {
        "roles": roles_of(trainer.model.policy, trainer.rewards[0].model, trainer.model.value_model),
        "seconds": clock() - started,
    }


def of_optimizer(run: Path, name: str, out: Path) -> dict[str, Any]:
    """Fine-tune all weights with an optimizer, and measure its state."""
    trainer = sft.build_sft_trainer(*stage_arguments("sft", run, out, "full", use_peft=False, optim=name))
    started = clock()
    trainer.train()
    seconds, optimizer = clock() - started, trainer.optimizer.optimizer
    tensors = [part for state in optimizer.state.values() for part in state.values() if isinstance(part, torch.Tensor)]
    rows = sft.loss_spans(trainer.eval_dataset)
    metrics = completion_perplexity(trainer.model, trainer.processing_class, rows, batch_size=64)
    weights = bytes_in(trainer.model.parameters())
    return {"after": metrics["perplexity"], "roles": {"base": weights, "state": bytes_in(tensors)}, "seconds": seconds}


# Bugs of bitsandbytes.


def of_bugs(run: Path, _: str, out: Path) -> dict[str, Any]:
    """Return the outcome of each bug with and without the workarounds. Perplexities are of the world's stories."""
    pretrained = run / "pretrain"
    tokenizer, texts = load_tokenizer(str(pretrained)), [row["text"] for row in rows_of(run, "corpus")[:60]]
    rows = [torch.tensor([tokenizer(text)["input_ids"][:128]], device=DEVICE) for text in texts]

    def load(folder: Path) -> Any:
        options: dict[str, Any] = {"device_map": {"": DEVICE}, "dtype": torch.float32} | quantization_kwargs(4)
        return AutoModelForCausalLM.from_pretrained(folder, **options).eval()

    def adapted(model: Any) -> Any:
        torch.manual_seed(1)
        lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=TARGETS, init_lora_weights=False, lora_alpha=1)
        return get_peft_model(prepare_model_for_kbit_training(model, use_gradient_checkpointing=False), lora).eval()

    @torch.no_grad()
    def measured(model: Any) -> str:  # by hand, since our `perplexity` applies the workarounds
        losses = torch.stack([model(ids, labels=ids).loss for ids in rows])
        return f"perplexity {losses.mean().exp():.3f}"

    def answer(model: Any) -> Any:
        with torch.no_grad():
            model.generate(input_ids=rows[0][:, :8], max_new_tokens=2, do_sample=False)
        return model

    def saved(guard: Callable[[Any], Any]) -> str:
        answer(guard(load(pretrained))).save_pretrained(out / "saved")
        return measured(guard(AutoModelForCausalLM.from_pretrained(out / "saved", device_map={"": DEVICE}).eval()))

    def trained(guard: Callable[[Any], Any]) -> str:
        model = answer(adapted(guard(load(pretrained)))).train()
        model(rows[0], labels=rows[0]).loss.backward()
        return "works"

    def merged(guard: Callable[[Any], Any]) -> str:
        return measured(guard(answer(adapted(guard(load(pretrained)))).merge_and_unload()))

    def odd_width(guard: Callable[[Any], Any]) -> str:
        config = AutoConfig.from_pretrained(pretrained, n_embd=48)
        AutoModelForCausalLM.from_config(config).save_pretrained(out / "odd")
        answer(guard(load(out / "odd")))
        return "works"

    def decoded(guard: Callable[[Any], Any]) -> str:
        torch.manual_seed(0)
        layer, weight = Linear4bit(48, 64, quant_type="nf4"), torch.randn(64, 48)
        layer.weight.data = weight.clone()
        layer = guard(layer.to(DEVICE))
        error = dequantize_4bit(layer.weight.data, layer.weight.quant_state).cpu() - weight
        return f"largest error {(error.abs().max() / weight.abs().max()):.2f} of the largest weight"

    expected, expected_merged = (
        measured(apply_bitsandbytes_workarounds_(load(pretrained))),
        measured(adapted(apply_bitsandbytes_workarounds_(load(pretrained))).merge_and_unload()),
    )
    actions = {
        "dequantized rows of length 48": decoded,  # first, since its workaround patches the whole process
        "generate with 48 units": odd_width,
        f"saved after generating; correct {expected}": saved,
        "trained after generating": trained,
        f"merged after generating; correct {expected_merged}": merged,
    }
    outcomes = {name: _with_and_without(action) for name, action in actions.items()}
    return {"gpu": GPU, "packs": bool(has_avx512bf16()), "rows": outcomes}


def _with_and_without(action: Callable[[Callable[[Any], Any]], str]) -> dict[str, str]:
    """Return the outcome of an action with plain bitsandbytes, and with the workarounds."""
    try:
        plain = action(lambda model: model)
    except (RuntimeError, AssertionError) as error:
        plain = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return {"plain": plain, "ours": action(apply_bitsandbytes_workarounds_)}


def main(table_name: str, precision: str, run: Path) -> None:
    """Measure a row and print it as JSON."""
    torch.set_num_threads(1)
    measure: Callable[[Path, str, Path], dict[str, Any]] = globals()[f"of_{table_name}"]
    gc.collect()
    imports_mib = peak_mib()
    with tempfile.TemporaryDirectory() as folder:
        row = measure(run, precision, Path(folder) / "out")
    print(json.dumps(row | {"peak": round((peak_mib() - imports_mib) * 2**20)}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
