"""The README is what people try first: its length, its order and its Python examples are tested."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parent.parent / "README.md"
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINES = 120
SECTIONS = ["Stages", "Measured", "From Python", "More"]
SMALL_WORLD = ", corpus=60, demonstrations=24, preferences=24, prompts=16, test=8"


def python_blocks() -> list[str]:
    return PYTHON_BLOCK.findall(README.read_text(encoding="utf-8"))


def test_readme_is_short_and_ordered() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= LINES
    assert [line.removeprefix("## ") for line in lines if line.startswith("## ")] == SECTIONS
    assert sum(line.startswith("![") for line in lines) == 1


def test_python_pipeline_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The eight lines run on a world of a few rows: every stage reads what the stage before it left."""
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    pipeline = python_blocks()[0]
    assert len([line for line in pipeline.splitlines() if line.strip()]) == 8
    exec(pipeline.replace('write_world("world")', f'write_world("world"{SMALL_WORLD})'), {})
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / "out" / name) for name in ("sft", "ppo"))
    changed = [not old.equal(new) for old, new in zip(before.parameters(), after.parameters(), strict=True)]
    assert all(changed)  # PPO trained every weight of the model that sft left
    models = json.loads((tmp_path / "out/eval/metrics.json").read_text(encoding="utf-8"))["models"]
    measured = {name: set(values) >= {"reward_score", "kl", "eos_share"} for name, values in models.items()}
    assert measured == {"sft": True, "ppo": True}


def test_trainer_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_model: Any, tokenizer: Any
) -> None:
    """The PPOTrainer example runs with a model and a dataset under the names that it uses."""
    from datasets import Dataset

    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained("out/sft")
    tokenizer.save_pretrained("out/sft")
    dataset = Dataset.from_dict({"prompt": ["one", "two", "three", "four"] * 4})
    exec(python_blocks()[1].replace("512", "16"), {"dataset": dataset})
    assert list((tmp_path / "out" / "short").glob("checkpoint-*/model.safetensors"))
