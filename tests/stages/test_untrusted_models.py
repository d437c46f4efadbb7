"""Models with code, and file names that point outside a folder: no code runs and no file is written without permission."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import small_runs

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.models.loading import load_causal_lm, load_config, load_reward_model, load_tokenizer
from rlhf_recipes.ppo.config import PPOConfig
from rlhf_recipes.ppo.trainer import PPOTrainer

CODE = """
from pathlib import Path
from transformers import GPT2Config, GPT2LMHeadModel

with Path({ran!r}).open("a") as stream:
    stream.write("ran ")

class OwnConfig(GPT2Config):
    model_type = "own"

class OwnModel(GPT2LMHeadModel):
    config_class = OwnConfig
"""


@pytest.fixture(scope="module")
def ran(runs: Path) -> Path:
    """The file that the code of the model writes when it is imported."""
    return runs / "ran"


@pytest.fixture(scope="module")
def with_code(runs: Path, ran: Path) -> Path:
    folder = runs / "with code"
    shutil.copytree(runs / "model", folder)
    (folder / "own.py").write_text(CODE.format(ran=str(ran)))
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": own}))
    return folder


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "ppo"])
def test_code_of_a_model_runs_only_with_its_flag(
    stage: str, with_code: Path, ran: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even if a user would answer yes to the question of transformers."""
    monkeypatch.setattr("builtins.input", lambda *words: "y")
    options = {"tokenizer_name": None} if stage == "pretrain" else {}
    with pytest.raises(UserError, match=r"contains Python code, .* pass --trust_remote_code true"):
        small_runs.run(stage, runs, f"untrusted {stage}", model_name_or_path=with_code.name, **options)
    assert not ran.exists() and not (runs / f"untrusted {stage}").exists()


@pytest.mark.parametrize("load", [load_config, load_causal_lm, load_reward_model])
def test_loading_functions_need_the_flag_for_code(
    load: Callable[..., Any], with_code: Path, ran: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *words: "y")
    with pytest.raises(UserError, match="contains Python code"):
        load(str(with_code))
    assert not ran.exists()


def test_the_trainer_needs_the_flag_for_code(with_code: Path, ran: Path, tmp_path: Path) -> None:
    args = PPOConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(UserError, match="contains Python code"):
        PPOTrainer(str(with_code), [len], args, [{"prompt": "a"}])
    assert not ran.exists()


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_model_with_code_trains_like_the_same_model_without(
    stage: str, with_code: Path, ran: Path, runs: Path
) -> None:
    own = small_runs.run(stage, runs, f"own {stage}", model_name_or_path=with_code.name, trust_remote_code=True)
    assert ran.read_text().startswith("ran")
    plain = small_runs.weights_in(small_runs.run(stage, runs, f"plain {stage}"))
    trained = small_runs.weights_in(own)
    assert trained.keys() == plain.keys() and all(torch.equal(trained[name], plain[name]) for name in plain)


@pytest.mark.parametrize("name", ["../../climbed", "/climbed", "deep\\climbed", ""])
def test_a_chat_template_is_not_saved_outside_the_folder(name: str, runs: Path, tmp_path: Path) -> None:
    """Of several templates, each is saved as a file with its name."""
    folder = tmp_path / "model"
    shutil.copytree(runs / "model", folder)
    (folder / "chat_template.jinja").unlink()
    said = json.loads((folder / "tokenizer_config.json").read_text())
    said["chat_template"] = [{"name": "default", "template": "a"}, {"name": name, "template": "b"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match=r"has a chat template named .*, which is no file name; rename it"):
        load_tokenizer(str(folder))
    with pytest.raises(UserError, match="has a chat template named"):
        small_runs.run("sft", runs, f"climbs {name!r}".replace("/", "-"), model_name_or_path=folder)
    assert not list(tmp_path.parent.rglob("climbed*"))


def test_several_chat_templates_with_plain_names_are_saved(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(runs / "model", folder)
    tokenizer = load_tokenizer(str(folder))
    tokenizer.chat_template = {"default": "a", "tool_use": "b"}
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(str(folder)).chat_template == {"default": "a", "tool_use": "b"}


def test_a_run_does_not_overwrite_the_base_of_an_adapter(runs: Path) -> None:
    small_runs.run("sft", runs, "adapter", **small_runs.LORA)
    shutil.copytree(runs / "model", runs / "based on")
    for folder in ("based on", "adapter"):
        config = runs / "adapter" / "adapter_config.json"
        config.write_text(
            json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(runs / "based on")})
        )
        with pytest.raises(UserError, match=f"holds the input {runs / folder}"):
            small_runs.run("ppo", runs, folder, model_name_or_path="adapter", overwrite=True)
    assert (runs / "based on" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"base_model_name_or_path": 3}', '{"base_model_name_or_path": "CYCLE"}']
)
def test_an_adapter_without_base_is_refused(content: str, runs: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(content.replace("CYCLE", str(tmp_path)))
    with pytest.raises(UserError):
        small_runs.run("ppo", runs, "on nothing", model_name_or_path=str(tmp_path))


def test_adapters_that_name_each_other_as_base_are_refused(runs: Path, tmp_path: Path) -> None:
    for one, other in ("ab", "ba"):
        (tmp_path / one).mkdir()
        config = {"base_model_name_or_path": str(tmp_path / other)}
        (tmp_path / one / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is its own base model"):
        small_runs.run("ppo", runs, "on nothing", model_name_or_path=str(tmp_path / "a"))


@pytest.mark.parametrize("named", ["model_name_or_path", "dataset_name", "reward"])
def test_a_run_does_not_overwrite_its_inputs(named: str, runs: Path) -> None:
    """Not by a path that leaves the output folder for an input either."""
    read = small_runs.flags("ppo", runs, "out")
    source = Path(read[read.index(f"--{named}") + 1])
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="holds the input"):
        small_runs.run("ppo", runs, f"missing/../{source.name}", overwrite=True)
    assert before == {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
