"""The push stage: which kind a folder has and what is added to it; tests/hub/ has the requests to the Hub."""

import gzip
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_recipes.core.arguments import parse_arguments
from rlhf_recipes.core.errors import UserError
from rlhf_recipes.hub.push import files_to_push, retry_command
from rlhf_recipes.hub.repos import Repo
from rlhf_recipes.stages import push
from rlhf_recipes.stages.push import PushArguments, repo_type_of, run_push


def filled(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["config.json", "model.safetensors", "train.jsonl"], "model"),
        (["adapter_config.json", "samples.jsonl"], "model"),
        (["tokenizer_config.json", "vocab.json"], "model"),
        (["value_head.safetensors"], "model"),
        (["recipe.yaml", "metrics.json", "completions.jsonl"], "model"),
        (["train.jsonl.gz"], "dataset"),
        (["recipe.yaml", "data/train-00000-of-00001.parquet"], "dataset"),
        (["corpus_only.csv"], "dataset"),
    ],
)
def test_the_kind_of_a_folder_follows_from_its_files(names: list[str], kind: str, tmp_path: Path) -> None:
    assert repo_type_of(filled(tmp_path, *names)) == kind


def test_a_folder_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is neither a stage's output nor a dataset"):
        repo_type_of(filled(tmp_path, "letter.docx", "pictures/cat.png"))
    with pytest.raises(UserError, match="no folder to push"):
        run_push(PushArguments())


def test_the_card_of_a_dataset_names_the_file_of_each_split(tmp_path: Path) -> None:
    rows = [{"prompt": "one", "an|swer": 1}, {"prompt": "two", "an|swer": 2}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "train-00000-of-00002.jsonl").write_text(text)
    (tmp_path / "train-00001-of-00002.jsonl").write_text(text)
    (tmp_path / "test.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    made: Any = push._dataset_cards(tmp_path)["README.md"]
    front, _, body = made.decode().removeprefix("---\n").partition("\n---\n")
    (config,) = yaml.safe_load(front)["configs"]
    assert config["data_files"] == [
        {"split": "test", "path": ["test.jsonl.gz"]},
        {"split": "train", "path": ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"]},
    ]
    assert "| train | 4 | prompt, an\\|swer |" in body and "| test | 2 | prompt, an\\|swer |" in body
    (tmp_path / "README.md").write_text("mine")
    assert push._dataset_cards(tmp_path) == {}


def test_the_command_to_retry_repeats_the_given_flags(tmp_path: Path) -> None:
    repo = Repo("me/model", private=False, revision="side")
    command = retry_command(tmp_path / "a b", repo, ["--base_model", "me/sft"])
    words = shlex.split(command)[4:]
    (arguments,) = parse_arguments(push.PushArguments, argv=words)
    assert (arguments.folder, arguments.hub_model_id, arguments.base_model) == (
        str(tmp_path / "a b"),
        "me/model",
        "me/sft",
    )
    assert (arguments.hub_private_repo, arguments.hub_revision) == (False, "side")


def test_base_model_id_replaces_only_the_base_in_an_adapter_config(tmp_path: Path) -> None:
    for place in ("", "value_model/", "checkpoint-3/"):
        filled(tmp_path, f"{place}adapter_config.json").joinpath(f"{place}adapter_config.json").write_text(
            json.dumps({"base_model_name_or_path": "runs/sft", "r": 4})
        )
    changed = push._rebased_adapters(tmp_path, "me/sft")
    assert set(changed) == {"adapter_config.json", "value_model/adapter_config.json"}
    assert all(json.loads(text) == {"base_model_name_or_path": "me/sft", "r": 4} for text in changed.values())  # type: ignore[arg-type]
    assert "runs/sft" in (tmp_path / "adapter_config.json").read_text()


def test_hidden_files_and_broken_links_are_not_pushed(tmp_path: Path) -> None:
    filled(
        tmp_path, "config.json", ".env", ".git/config", "value_model/.cache/x", "value_model/config.json", ".saving/a"
    )
    (tmp_path / "gone.json").symlink_to(tmp_path / "nowhere")
    assert [name for name, _ in files_to_push(tmp_path)] == ["config.json", "value_model/config.json"]
