"""The README is the product's face: what it tells people to type is typed here."""

import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("recipes/**/README.md")), *sorted(ROOT.glob("docs/*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
RECIPE = re.compile(
    r"^(?:\S+/)?(?:python|torchrun.*?|accelerate launch.*?) (?:recipes/(\w+)\.py|-m rlhf_recipes (\w+))(?: (.*))?$"
)
SMALL = ", corpus=60, demonstrations=24, preferences=24, prompts=16, test=8"


def commands_of(page: Path) -> list[str]:
    """Every command line of a page: the lines of its bash blocks, and what stands in backticks and starts a recipe."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = [line for kind, body in FENCE.findall(text) if kind == "bash" for line in body.splitlines()]
    quoted = re.findall(r"`((?:python|accelerate launch) [^`\n]*recipes[^`\n]*)`", FENCE.sub("", text))
    lines = [line.split(" #")[0].strip() for line in blocks]
    return [line for line in lines + quoted if line and not line.startswith("#") and "..." not in line]


COMMANDS = [(page, command) for page in PAGES for command in commands_of(page)]


def test_commands_are_found() -> None:
    """The patterns above still match what the README is written in."""
    assert len([command for page, command in COMMANDS if page.name == "README.md" and page.parent == ROOT]) >= 9


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=lambda value: value if isinstance(value, str) else "")
def test_every_command_is_understood(page: Path, command: str) -> None:
    """A make target exists, as do a benchmark and its flags; a recipe's flags and YAML parse into its dataclasses."""
    from rlhf_recipes.core.arguments import parse_arguments

    words = shlex.split(command)
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert words[1] in targets
        return
    if words[1].startswith("benchmarks/"):
        program = (ROOT / words[1]).read_text(encoding="utf-8")
        assert all(f'"{word}"' in program for word in words if word.startswith("--"))
        return
    found = RECIPE.match(" ".join(word for word in words if "=" not in word or word.startswith("--")))
    assert found is not None, f"{page}: neither make nor a recipe: {command}"
    stage = found[1] or found[2]
    for place in re.findall(r"--config_file (\S+)", command):
        assert (ROOT / place).is_file()
    flags = shlex.split(found[3] or "")
    flags = [str(ROOT / word) if word.endswith(".yaml") else word for word in flags]
    run = getattr(import_module(f"rlhf_recipes.stages.{stage}"), f"run_{stage}")
    types = [hint for name, hint in get_type_hints(run).items() if name != "return"]
    assert len(parse_arguments(*types, argv=flags)) == len(types)


def test_the_python_chain_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's eight lines, on a world of a few rows: every stage reads what the one before it left."""
    monkeypatch.chdir(tmp_path)
    chain = next(body for kind, body in FENCE.findall(PAGES[0].read_text(encoding="utf-8")) if kind == "python")
    lines = [line for line in chain.splitlines() if line.strip()]
    assert len(lines) == 8
    exec(chain.replace('write_world("world")', f'write_world("world"{SMALL})'), {})
    from transformers import AutoModelForCausalLM

    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / "out" / name) for name in ("sft", "ppo"))
    moved = [not a.equal(b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert all(moved)  # PPO trained every weight of the very model that fine-tuning left
    import json

    models = json.loads((tmp_path / "out/eval/metrics.json").read_text(encoding="utf-8"))["models"]
    assert {name: set(values) >= {"reward_score", "kl", "eos_share"} for name, values in models.items()} == {
        "sft": True,
        "ppo": True,
    }


def test_the_trainer_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_model: Any, tokenizer: Any
) -> None:
    """The README's PPOTrainer snippet, with a model and a dataset under the names it uses."""
    from datasets import Dataset

    monkeypatch.chdir(tmp_path)
    blocks = [body for kind, body in FENCE.findall(PAGES[0].read_text(encoding="utf-8")) if kind == "python"]
    make_model().save_pretrained("out/sft")
    tokenizer.save_pretrained("out/sft")
    exec(
        blocks[1].replace("512", "16"), {"dataset": Dataset.from_dict({"prompt": ["one", "two", "three", "four"] * 4})}
    )
    assert list((tmp_path / "out" / "short").glob("checkpoint-*/model.safetensors"))
