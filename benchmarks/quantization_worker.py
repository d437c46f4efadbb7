"""One row of `quantization.py`: a stage in one precision, on what the quickstart left, in a process of its own."""

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
from rlhf_recipes.data import prompt_and_completion_ids
from rlhf_recipes.evaluation import completion_perplexity, evaluate_model
from rlhf_recipes.generation import Sampling, stop_ids
from rlhf_recipes.models import build_gpt2, load_causal_lm, load_reward_model, load_tokenizer, quantization_kwargs
from rlhf_recipes.stages import eval as evaluation
from rlhf_recipes.stages import ppo, reward, sft
from rlhf_recipes.system import apply_bitsandbytes_workarounds_

CONFIGS = Path(__file__).parents[1] / "recipes" / "configs" / "quickstart"
PRECISIONS: dict[str, dict[str, Any]] = {
    "full": {"bits": None},
    "8-bit": {"bits": 8},
    "4-bit": {"bits": 4},
    "4-bit double": {"bits": 4, "nested": True},
}
LORA: dict[str, Any] = {"use_peft": True, "lora_r": 16, "lora_dropout": 0.0}
TARGETS = ["c_attn", "c_proj", "c_fc"]
READS: dict[str, dict[str, str]] = {  # what a stage reads below the quickstart's folder
    "sft": {"model_name_or_path": "pretrain", "dataset_name": "world/demonstrations"},
    "reward": {"model_name_or_path": "reward", "dataset_name": "world/preferences"},
    "ppo": {"model_name_or_path": "sft", "dataset_name": "world/prompts"},
}
ASKED: dict[str, dict[str, Any]] = {  # beside the YAML of the stage: fewer steps, and the rates that an adapter wants
    "sft": {"max_steps": 200, "learning_rate": 3e-3},
    "reward": {"max_steps": 200, "learning_rate": 3e-4},
    "ppo": {"total_episodes": 960, "learning_rate": 2e-3, "max_test_samples": 16},
}
PROMPTS = 200
GOLD = "rlhf_recipes.quickstart:gold_score"
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


def clock() -> float:
    """Seconds of the processor; on a GPU, which works while it waits, of the wall."""
    if not GPU:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


# Memory.


def tensors_in(module: Any) -> Iterator[torch.Tensor]:
    """Weights, and what belongs to quantized ones: their scales and codes."""
    yield from module.parameters()
    yield from module.buffers()
    for layer in module.modules():
        if isinstance(layer, Linear4bit):
            state = layer.weight.quant_state
            inner = [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
            yield from (state.absmax, state.code, *inner)
        if isinstance(layer, Linear8bitLt):
            own = [getattr(layer.weight, name, None) for name in ("CB", "SCB")]
            yield from (each for each in (*own, layer.state.CB, layer.state.SCB) if each is not None)


def bytes_in(tensors: Any) -> int:
    """Each storage once."""
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


def roles_of(policy: Any, reward_model: Any = None, value: Any = None) -> dict[str, int]:
    """Bytes of the base, of what is trained on it, and of a reward model. The reference of an adapter is the base itself."""
    whole = bytes_in(tensors_in(policy))
    trained = [each for each in policy.parameters() if each.requires_grad]
    heads = [] if value is None else list(value.parameters())
    roles = {"base": whole - bytes_in(trained), "trained": bytes_in([*trained, *heads])}
    return roles | ({} if reward_model is None else {"reward_model": bytes_in(tensors_in(reward_model))})


# Stages.


def ask(stage: str, run: Path, out: Path, precision: str, **more: Any) -> tuple[Any, ...]:
    """The arguments of a stage: its YAML in the quickstart, an adapter, the precision."""
    how = PRECISIONS[precision]
    bits = {f"load_in_{how['bits']}bit": True, "use_bnb_nested_quant": how.get("nested", False)} if how["bits"] else {}
    reads = {name: str(run / folder) for name, folder in READS[stage].items()}
    given = LORA | ASKED[stage] | bits | reads | {"output_dir": out, "use_cpu": not GPU, "disable_tqdm": True} | more
    words = ["--config", str(CONFIGS / f"{stage}.yaml")]
    for name, value in given.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    hints = get_type_hints(getattr(import_module(f"rlhf_recipes.stages.{stage}"), f"run_{stage}"))
    return parse_arguments(*(hint for name, hint in hints.items() if name != "return"), argv=words)


def both_ways(folder: Path, precision: str, load: Callable[..., Any]) -> dict[str, Any]:
    """What was left, read again as it was trained, and merged into the base in full precision."""
    return {"again": load(str(folder), **quantization_kwargs(**PRECISIONS[precision])), "merged": load(str(folder))}


def rows_of(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "world" / name / "test.jsonl").read_text().splitlines()]


def metrics_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return found


def of_eval(run: Path, precision: str, out: Path) -> dict[str, Any]:
    """Two models as they are, read in these bits; the KL is to the fine-tuned one in full precision."""
    pretrained, tuned, how = str(run / "pretrain"), str(run / "sft"), PRECISIONS[precision]
    bits = {f"load_in_{how['bits']}bit": True, "use_bnb_nested_quant": how.get("nested", False)} if how["bits"] else {}
    arguments = evaluation.EvalArguments(
        models=[tuned, pretrained], reference=tuned, dataset_name=str(run / "world" / "prompts"), gold=GOLD,
        num_prompts=PROMPTS, text_dataset_name=str(run / "world" / "corpus"), num_texts=100, max_new_tokens=40,
        temperature=0.7, use_cpu=not GPU, output_dir=str(out), **bits,
    )  # fmt: skip
    started = clock()
    told = metrics_in(evaluation.run_eval(arguments))["models"]
    seconds = clock() - started
    roles = {"base": bytes_in(tensors_in(load_causal_lm(tuned, **quantization_kwargs(**how))))}
    found = {"perplexity": told["pretrain"]["perplexity"], "gold": told["sft"]["gold_score"], "kl": told["sft"]["kl"]}
    return found | {"roles": roles, "seconds": seconds}


def of_sft(run: Path, precision: str, out: Path) -> dict[str, Any]:
    trainer = sft.build_sft_trainer(*ask("sft", run, out, precision))
    rows, tokenizer, roles = sft.loss_spans(trainer.eval_dataset), trainer.processing_class, roles_of(trainer.model)

    def measured(model: Any) -> float:
        return completion_perplexity(model, tokenizer, rows, batch_size=64)["perplexity"]

    before, started = measured(trainer.model), clock()
    told = metrics_in(sft.run_sft(*ask("sft", run, out, precision)))
    seconds = clock() - started
    read = {name: measured(model) for name, model in both_ways(out, precision, load_causal_lm).items()}
    return {"before": before, "after": told["perplexity"], **read, "roles": roles, "seconds": seconds}


def of_reward(run: Path, precision: str, out: Path) -> dict[str, Any]:
    """Going on from the reward model: from a model that is none the moment when so small a reward model learns is a matter of luck."""
    model = reward.build_reward_trainer(*ask("reward", run, out, precision)).model
    tokenizer, rows, roles = load_tokenizer(str(run / "reward")), rows_of(run, "preferences"), roles_of(model)

    def measured(model: Any) -> float:
        reward_model: Any = load_reward(model, tokenizer)
        ids = [
            [prompt_and_completion_ids(row["prompt"], row[side], tokenizer) for row in rows]
            for side in ("chosen", "rejected")
        ]
        one, other = (reward_model.score_ids([[*prompt, *answer] for prompt, answer in side]) for side in ids)
        return sum(map(float.__gt__, one, other)) / len(rows)

    before, started = measured(model), clock()
    told = metrics_in(reward.run_reward(*ask("reward", run, out, precision)))
    seconds = clock() - started
    read = {name: measured(model) for name, model in both_ways(out, precision, load_reward_model).items()}
    return {"before": before, "after": told["reward_accuracy"], **read, "roles": roles, "seconds": seconds}


def of_ppo(run: Path, precision: str, out: Path) -> dict[str, Any]:
    frozen = {"frozen_bits": bits} if (bits := PRECISIONS[precision]["bits"]) else {}
    reward_models = [str(run / "reward"), GOLD]
    trainer = ppo.build_ppo_trainer(*ask("ppo", run, out, precision, reward=reward_models, **frozen))
    rows, tokenizer = rows_of(run, "prompts")[:PROMPTS], trainer.processing_class
    asked: dict[str, Any] = {
        "columns": {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"},
        "gold": load_reward(GOLD, tokenizer),
        "reward_model": trainer.rewards[0],
    }

    def measured(model: Any) -> dict[str, float]:
        sampling = Sampling(40, 0.7, stop_ids=stop_ids(base_model(model), tokenizer))
        told = evaluate_model(model, tokenizer, [row["prompt"] for row in rows], sampling=sampling, **asked).metrics
        return {"gold": told["gold_score"], "reward_model": told["reward_score"]}

    roles = roles_of(trainer.model.policy, trainer.rewards[0].model, trainer.model.value_model)
    before, started = measured(trainer.model.policy), clock()
    trainer.train()
    seconds, after = clock() - started, measured(trainer.model.policy)
    trainer.save_model()
    read = {name: measured(model) for name, model in both_ways(out, precision, load_causal_lm).items()}
    return {"before": before, "after": after, **read, "roles": roles, "seconds": seconds}


def of_gpt2(run: Path, precision: str, out: Path) -> dict[str, Any]:
    """GPT-2's own shape and vocabulary, weights at random: one update of PPO with adapters for policy and value."""
    base, reward_model = run / "gpt2" / "base", run / "gpt2" / "reward_model"
    if precision == "none yet":
        tokenizer = byte_tokenizer()
        torch.manual_seed(0)
        model = build_gpt2("gpt2", tokenizer)
        model.resize_token_embeddings(50257)
        model.save_pretrained(base)
        judged = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
        judged.config.pad_token_id = tokenizer.pad_token_id
        judged.save_pretrained(reward_model)
        for folder in (base, reward_model):
            tokenizer.save_pretrained(folder)
        return {}
    bits = quantization_kwargs(**PRECISIONS[precision]).get("quantization_config")
    args = PPOConfig(
        output_dir=str(out), per_device_train_batch_size=4, response_length=8, num_ppo_epochs=1, max_steps=1, bf16=GPU,
        report_to="none", disable_tqdm=True, save_strategy="no", hints=False, use_cpu=not GPU, log_completions=False,
    )  # fmt: skip
    adapter = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=TARGETS, fan_in_fan_out=bits is None)
    trainer = PPOTrainer(
        str(base), [str(reward_model)], args, [{"prompt": f"prompt {row}"} for row in range(4)], peft_config=adapter,
        quantization_config=bits, reward_quantization_config=bits,
    )  # fmt: skip
    started = clock()
    trainer.train()
    judged = trainer.rewards[0].model
    return {
        "roles": roles_of(trainer.model.policy, judged, trainer.model.value_model),
        "seconds": clock() - started,
    }


def of_optimizer(run: Path, name: str, out: Path) -> dict[str, Any]:
    """Fine-tuning of all weights; what AdamW keeps of each."""
    trainer = sft.build_sft_trainer(*ask("sft", run, out, "full", use_peft=False, optim=name))
    started = clock()
    trainer.train()
    seconds, optimizer = clock() - started, trainer.optimizer.optimizer
    tensors = [each for state in optimizer.state.values() for each in state.values() if isinstance(each, torch.Tensor)]
    rows = sft.loss_spans(trainer.eval_dataset)
    found = completion_perplexity(trainer.model, trainer.processing_class, rows, batch_size=64)
    weights = bytes_in(trainer.model.parameters())
    return {"after": found["perplexity"], "roles": {"base": weights, "state": bytes_in(tensors)}, "seconds": seconds}


# The traps.


def of_traps(run: Path, _: str, out: Path) -> dict[str, Any]:
    """What plain bitsandbytes makes of each, and what comes of it here. Perplexities are of the world's stories."""
    name = run / "pretrain"
    tokenizer, texts = load_tokenizer(str(name)), [row["text"] for row in rows_of(run, "corpus")[:60]]
    rows = [torch.tensor([tokenizer(text)["input_ids"][:128]], device=DEVICE) for text in texts]

    def read(folder: Path) -> Any:
        given: dict[str, Any] = {"device_map": {"": DEVICE}, "dtype": torch.float32} | quantization_kwargs(4)
        return AutoModelForCausalLM.from_pretrained(folder, **given).eval()

    def adapted(model: Any) -> Any:
        torch.manual_seed(1)
        shape = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=TARGETS, init_lora_weights=False, lora_alpha=1)
        return get_peft_model(prepare_model_for_kbit_training(model, use_gradient_checkpointing=False), shape).eval()

    @torch.no_grad()
    def measured(model: Any) -> str:  # by hand: `perplexity` is a door of ours
        losses = torch.stack([model(ids, labels=ids).loss for ids in rows])
        return f"perplexity {losses.mean().exp():.3f}"

    def answer(model: Any) -> Any:
        with torch.no_grad():
            model.generate(input_ids=rows[0][:, :8], max_new_tokens=2, do_sample=False)
        return model

    def saved(guard: Callable[[Any], Any]) -> str:
        answer(guard(read(name))).save_pretrained(out / "saved")
        return measured(guard(AutoModelForCausalLM.from_pretrained(out / "saved", device_map={"": DEVICE}).eval()))

    def trained(guard: Callable[[Any], Any]) -> str:
        model = answer(adapted(guard(read(name)))).train()
        model(rows[0], labels=rows[0]).loss.backward()
        return "trains"

    def merged(guard: Callable[[Any], Any]) -> str:
        return measured(guard(answer(adapted(guard(read(name)))).merge_and_unload()))

    def odd(guard: Callable[[Any], Any]) -> str:
        config = AutoConfig.from_pretrained(name, n_embd=48)
        AutoModelForCausalLM.from_config(config).save_pretrained(out / "odd")
        answer(guard(read(out / "odd")))
        return "answers"

    def decoded(guard: Callable[[Any], Any]) -> str:
        torch.manual_seed(0)
        layer, weight = Linear4bit(48, 64, quant_type="nf4"), torch.randn(64, 48)
        layer.weight.data = weight.clone()
        layer = guard(layer.to(DEVICE))
        error = dequantize_4bit(layer.weight.data, layer.weight.quant_state).cpu() - weight
        return f"largest error {(error.abs().max() / weight.abs().max()):.2f} of the largest weight"

    expected, right = (
        measured(apply_bitsandbytes_workarounds_(read(name))),
        measured(adapted(apply_bitsandbytes_workarounds_(read(name))).merge_and_unload()),
    )
    acts = {
        "decoded: rows of 48": decoded,  # first, since what mends it does so for the whole process
        "48 units wide, asked": odd,
        f"saved after an answer; right is {expected}": saved,
        "trained after an answer": trained,
        f"merged after an answer; right is {right}": merged,
    }
    return {"gpu": GPU, "packs": bool(has_avx512bf16()), "rows": {told: _both(act) for told, act in acts.items()}}


def _both(act: Callable[[Callable[[Any], Any]], str]) -> dict[str, str]:
    """What an act leads to: left to bitsandbytes, and with a model that came through one of our doors."""
    try:
        plain = act(lambda model: model)
    except (RuntimeError, AssertionError) as error:
        plain = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return {"plain": plain, "ours": act(apply_bitsandbytes_workarounds_)}


def main(stage: str, precision: str, run: Path) -> None:
    torch.set_num_threads(1)
    act: Callable[[Path, str, Path], dict[str, Any]] = globals()[f"of_{stage}"]
    gc.collect()
    before = peak_mib()
    with tempfile.TemporaryDirectory() as name:
        told = act(run, precision, Path(name) / "out")
    print(json.dumps(told | {"peak": round((peak_mib() - before) * 2**20)}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
