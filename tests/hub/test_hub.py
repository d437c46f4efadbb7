"""Pushing to the Hub, against one on this machine: what is asked for arrives whole, and nothing else is ever sent."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from programs import hub_faults as faults
from programs import small_runs

from rlhf_recipes.core.arguments import parse_arguments, requested_values
from rlhf_recipes.core.errors import UserError, one_line_errors
from rlhf_recipes.core.secrets import SECRET_ARGUMENTS, redact, redact_command
from rlhf_recipes.folders.card import model_card
from rlhf_recipes.hub.repos import HubArguments, check_push

GOOD, READ, WRONG = faults.GOOD, faults.READ, faults.WRONG
SECRET_TEXTS = (GOOD, READ, WRONG, faults.SIGNATURE)


@pytest.fixture(scope="module")
def hub() -> Iterator[Any]:
    with faults.Hub() as hub:
        hub.tokens = {GOOD: ("me", True), READ: ("me", False)}
        yield hub


@pytest.fixture(scope="module")
def client(hub: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    client = faults.Client(hub.address, tmp_path_factory.mktemp("home"))
    yield client
    client.close()


@pytest.fixture
def push(client: Any) -> Callable[..., Any]:
    """(folder, repo, further words, token) -> how the stage `push` ended; no secret is in what it said."""

    def act(folder: Path, repo: str, *words: str, token: str | None = GOOD) -> Any:
        said = client.stage(*faults.words(folder, repo, *words), token=token)
        require_no_secret(said.out + said.err)
        return said

    return act


def require_no_secret(text: str) -> None:
    assert [secret for secret in SECRET_TEXTS if secret in text] == []


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# What can go wrong on the way.


@pytest.mark.parametrize("case", faults.CASES, ids=lambda case: case.name)
def test_a_fault_leaves_the_repo_whole_and_a_second_push_completes_it(
    case: Any, hub: Any, client: Any, push: Callable[..., Any], tmp_path: Path
) -> None:
    number = 2 * faults.CASES.index(case)
    old, folder = (faults.make_folder(tmp_path / str(seed), seed) for seed in (number, number + 1))
    repo, new = f"me/fault-{number}", faults.pushed_of(folder)
    if not case.new:
        assert push(old, repo).code == 0
    before, commits, local = hub.files(repo), hub.commits(repo), contents(folder)
    said = faults.first_try(client, hub, case, folder, repo)
    require_no_secret(said.out + said.err)
    assert contents(folder) == local
    if case.killed:
        assert said.code == -9 and hub.files(repo) in (before, new)
    elif case.pushed:
        assert said.code == 0 and "pushed" in said.out
        assert hub.files(repo) == new and hub.commits(repo) == commits + 1
    else:
        assert said.code == 2 and "pushed" not in said.out and "Traceback" not in said.err
        assert said.err.count("error:") == 1 and said.last.startswith("error: ") and case.says in said.last
        assert case.token is None or f"push it with: python -m rlhf_recipes push --folder {folder} " in said.last
        assert case.spoils or (hub.files(repo) == before and hub.commits(repo) == commits)
    assert all(said.waited.count(wait) >= case.waits.count(wait) for wait in case.waits)
    assert push(folder, repo).code == 0
    assert hub.files(repo) == new and contents(folder) == local
    assert hub.repos["models", repo].private


def test_every_fault_was_met(hub: Any) -> None:
    """The list above asks of each endpoint that a push comes by that something goes wrong there."""
    assert {endpoint for endpoint, _, _ in hub.requests} >= set(faults.STEPS)
    assert not [path for endpoint, _, path in hub.requests if endpoint == "unknown"]


# What is pushed, and where to.


def test_what_a_run_needs_to_go_on_stays_here(hub: Any, push: Callable[..., Any], tmp_path: Path) -> None:
    folder = faults.make_folder(tmp_path / "run", 90)
    said = push(folder, "me/files")
    assert (
        said.out
        == f"pushed {folder} to {hub.address}/me/files/commit/{hub.repos['models', 'me/files'].at('main').oid}\n"
    )
    assert sorted(hub.files("me/files")) == sorted(faults.PUSHED)
    puts = hub.count("put")
    assert push(folder, "me/files").code == 0  # again: nothing is sent, no commit is made
    assert hub.commits("me/files") == 1 and hub.count("put") == puts


def test_large_files_go_in_parts_and_long_lists_come_in_pages(
    hub: Any, client: Any, push: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = faults.make_folder(tmp_path / "run", 91)
    monkeypatch.setattr(hub, "part_size", 65_536)
    monkeypatch.setattr(hub, "page_size", 2)
    with hub.failing(faults.Fault("put", "cut", amount=20_000, times=1, skip=2)):
        assert push(folder, "me/parts").code == 0
    assert hub.files("me/parts") == faults.pushed_of(folder) and hub.count("complete") >= 2


def test_weights_of_an_earlier_push_do_not_stay_beside_the_new_ones(
    hub: Any, push: Callable[..., Any], tmp_path: Path
) -> None:
    """transformers would read model.safetensors, whatever model.safetensors.index.json lists."""
    folder = faults.make_folder(tmp_path / "run", 92)
    assert push(folder, "me/stale").code == 0
    hub.repos["models", "me/stale"].at("main").files.update(
        {"LICENSE": b"mine", "last-checkpoint/model.safetensors": b"x"}
    )
    for name in ("model-00001-of-00001.safetensors", "model.safetensors.index.json"):
        (folder / name).write_bytes(b"{}")
    (folder / "model.safetensors").unlink()
    (folder / "value_model" / "model.safetensors").unlink()
    assert push(folder, "me/stale").code == 0
    kept = {*faults.PUSHED, "model-00001-of-00001.safetensors", "model.safetensors.index.json"}
    kept |= {"LICENSE", "last-checkpoint/model.safetensors"}
    assert set(hub.files("me/stale")) == kept - {"model.safetensors", "value_model/model.safetensors"}


def test_private_unless_told_otherwise_and_never_into_a_public_repo(
    hub: Any, push: Callable[..., Any], tmp_path: Path
) -> None:
    folder = faults.make_folder(tmp_path / "run", 93)
    assert push(folder, "me/open", "--hub_private_repo", "false").code == 0
    assert not hub.repos["models", "me/open"].private
    (folder / "config.json").write_text("{}")
    before = hub.files("me/open")
    said = push(folder, "me/open")
    assert said.code == 2 and "me/open is public on the Hub" in said.last and hub.files("me/open") == before
    assert push(folder, "me/open", "--hub_private_repo", "false").code == 0
    assert hub.files("me/open")["config.json"] == b"{}"


def test_to_a_branch(hub: Any, push: Callable[..., Any], tmp_path: Path) -> None:
    folder = faults.make_folder(tmp_path / "run", 94)
    said = push(folder, "me/branches", "--hub_revision", "second")
    assert said.code == 0
    assert hub.files("me/branches") == {} and hub.files("me/branches", revision="second") == faults.pushed_of(folder)


@pytest.mark.parametrize(
    ("folder", "words", "says"),
    [
        (None, [], "no folder to push"),
        ("nowhere", [], "no such folder"),
        ("empty", [], "is neither a stage's output nor a dataset"),
        ("run", ["--hub_model_id", "alone"], "has no owner; give it as owner/name"),
        ("run", ["--hub_model_id", "me/a b"], "hub_model_id me/a b"),
        ("run", ["--hub_model_id", "datasets/me/a"], "give it as owner/name"),
        ("run", ["--base_model", "me/base"], "holds no adapter"),
    ],
)
def test_a_mistake_is_one_line_before_anybody_is_asked(
    folder: str | None, words: list[str], says: str, hub: Any, client: Any, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    faults.make_folder(tmp_path / "run", 95)
    asked = len(hub.requests)
    place = ["--folder", str(tmp_path / folder)] if folder else []
    said = client.stage("push", *place, "--hub_model_id", "me/x", *words, token=GOOD)
    assert said.code == 2 and said.err.strip().count("\n") == 0 and says in said.last
    assert len(hub.requests) == asked and said.met == []


def test_offline_is_said(client: Any, tmp_path: Path) -> None:
    said = client.stage(*faults.words(faults.make_folder(tmp_path / "run", 96), "me/x"), token=GOOD, offline=True)
    assert said.code == 2 and "while HF_HUB_OFFLINE=1; unset it" in said.last and said.met == []


@pytest.mark.parametrize("token", [f"{GOOD[:20]} {GOOD[20:]}", f"{GOOD}\n{GOOD}", f"{GOOD}é"])
def test_a_token_that_cannot_be_sent_is_refused_and_not_shown(token: str, client: Any, tmp_path: Path) -> None:
    folder = faults.make_folder(tmp_path / "run", 97)
    said = client.stage(*faults.words(folder, "me/x", "--hub_token", token))
    assert said.code == 2 and "give it as it was issued" in said.last and said.met == []
    require_no_secret(said.err)
    assert GOOD[20:] not in said.err


def test_a_repo_without_a_push_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="nothing is pushed without push_to_hub"):
        check_push(HubArguments(hub_model_id="me/x"))
    check_push(HubArguments())
    with pytest.raises(UserError, match="no repo to push to"):
        check_push(HubArguments(push_to_hub=True))


# What is written down.


def test_a_token_is_in_no_recipe_and_no_command() -> None:
    from trl import ModelConfig

    from rlhf_recipes.stages.sft import SFTArguments, SFTConfig

    argv = ["--hub_token", GOOD, "--eos_token", "<|endoftext|>", "--push_to_hub", "true", "--hub_model_id", "me/x"]
    arguments = parse_arguments(SFTArguments, ModelConfig, SFTConfig, argv=argv)
    assert requested_values(*arguments) == {"eos_token": "<|endoftext|>", "push_to_hub": True, "hub_model_id": "me/x"}
    assert requested_values(HubArguments(hub_token=GOOD)) == {} and GOOD not in repr(HubArguments(hub_token=GOOD))
    for words in (
        ["--hub_token", GOOD],
        [f"--hub_token={GOOD}"],
        ["--hub-token", "plain-one"],
        ["--hub-token=plain-one"],
    ):
        told = " ".join(redact_command(["sft", *words, "--seed", "3"]))
        assert told.startswith("sft --hub") and told.endswith("*** --seed 3") and "plain-one" not in told
        require_no_secret(told)


def test_fields_that_could_hold_a_secret_are_known() -> None:
    """A new one, of this house or of a library, has to be looked at: into SECRET_ARGUMENTS with it, or into this list."""
    from importlib import import_module
    from typing import get_type_hints

    harmless = {
        "eos_token",
        "pad_token",
        "stop_token",
        "average_tokens_across_devices",
        "include_num_input_tokens_seen",
    }
    stages = [path.stem for path in (Path(sys.modules["rlhf_recipes"].__path__[0]) / "stages").glob("[!_]*.py")]
    names: set[str] = set()
    for stage in stages:
        hints = get_type_hints(getattr(import_module(f"rlhf_recipes.stages.{stage}"), f"run_{stage}"))
        names |= {field for name, kind in hints.items() if name != "return" for field in kind.__dataclass_fields__}
    risky = {
        name for name in names if re.search(r"_token$|api_key|secret|passw|credential|average_tokens|seen$", name)
    }
    assert risky == harmless | SECRET_ARGUMENTS


def test_an_error_does_not_say_a_token(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), one_line_errors():
        parse_arguments(HubArguments, argv=["--push_to_hub", "true", GOOD])
    told = capsys.readouterr().err
    assert "unexpected argument '***'" in told
    assert redact("hf_transfer, hf_hub_download and hf_reviews_of_many_films_and_books stay") == (
        "hf_transfer, hf_hub_download and hf_reviews_of_many_films_and_books stay"
    )


HOSTILE = [
    "a | b", "a\n---\nlicense: mit\n---\n# Mine", "`code` ``more``", "<script>alert(1)</script>", "[x](javascript:alert(1))",
    "![x](http://elsewhere/pixel.png)", "*bold* ~~gone~~ &lt;", "```\n# out of the fence\n```", "\u2028line\rline",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_becomes_markup_in_a_card(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a name, a value, a parent, a word of the command line and a line of the recipe."""
    monkeypatch.setattr(sys, "argv", ["recipes/sft.py", "--dataset_name", text])
    recipe = yaml.safe_dump({"dataset_name": text, "odd": "a\n```\n# out\n"}, sort_keys=False)
    told = model_card("sft", "Title", {"model": text, text: "me/other"}, {text: text, "loss": 0.5}, recipe, [], "")
    front, _, body = told.removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(front) == {"library_name": "transformers", "tags": ["rlhf-recipes", "sft"]}
    fence = re.search(r"^(`{3,})yaml\n(.*?)\n {0,3}\1`*$", body, re.MULTILINE | re.DOTALL)  # as CommonMark closes it
    assert fence is not None and yaml.safe_load(fence[2]) == yaml.safe_load(recipe)
    above = body[: fence.start()]
    assert len(re.findall(r"^#", above, re.MULTILINE)) == 2, "the title and the limits"
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in re.findall(r"^\|.*$", above, re.MULTILINE)] == [3] * 4
    (parent,) = re.findall(r"^- model: (`+)( ?)(.*)\2\1$", above, re.MULTILINE)
    assert parent[2] == " ".join(text.split()) and parent[0] not in re.findall("`+", parent[2])
    plain = re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", above)  # less what stands as code
    assert not re.search(r"(?<!\\)[<\[`*~&]", plain)


def test_a_card_says_what_it_came_from_and_what_it_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "sft").mkdir(parents=True)
    monkeypatch.setattr(
        sys, "argv", [str(tmp_path / "sft.py"), "--model_name_or_path", "runs/sft", "--hub_token", GOOD]
    )
    told = model_card(
        "ppo", "T", {"model": "runs/sft", "reward": "me/reward_model", "prompts": "me/rows"}, {"kl": 1.5}, "", [], ""
    )
    assert yaml.safe_load(told.split("---")[1])["datasets"] == ["me/rows"] and "base_model" not in told.split("---")[1]
    assert "- model: `runs/sft`" in told and str(tmp_path) not in told
    assert "Command: `sft.py --model_name_or_path runs/sft --hub_token '***'`" in told
    assert "has not been tested for safety" in told and "## Limits" in told
    told = model_card("ppo", "T", {"model": "me/base/value_model", "prompts": "me/a, me/b"}, {}, "", [], "")
    front = yaml.safe_load(told.split("---")[1])
    assert (front["base_model"], front["datasets"]) == ("me/base", ["me/a", "me/b"])


# Whole stages.


FEW = {"max_steps": 2, "save_steps": 1}


@pytest.fixture
def run(client: Any, runs: Path) -> Callable[..., Any]:
    """(stage, out, token, **flags) -> how it ended; names that begin with `hub:` are ids of the Hub, others folders."""

    def act(stage: str, out: str, token: str | None = GOOD, **changes: Any) -> Any:
        words = small_runs.flags(stage, runs, out, **(FEW | changes))
        said = client.stage(stage, *(word.removeprefix("hub:") for word in words), token=token)
        require_no_secret(said.out + said.err)
        return said

    return act


def to(repo: str, **more: Any) -> dict[str, Any]:
    return {"push_to_hub": True, "hub_model_id": repo} | more


def require_pushed(hub: Any, folder: Path, repo: str) -> dict[str, bytes]:
    """The repo is private, holds the folder less its checkpoints, and no file of either holds a secret."""
    held = hub.files(repo)
    assert hub.repos["models", repo].private and held
    assert held == {name: content for name, content in contents(folder).items() if not name.startswith("checkpoint-")}
    for content in (*contents(folder).values(), *held.values()):
        require_no_secret(content.decode("latin-1"))
    return held


def test_a_run_that_is_not_asked_to_push_meets_nobody(run: Callable[..., Any], runs: Path) -> None:
    """From local files and a local model: no report, no count of a download, no look at the Hub."""
    for stage, changes in (("sft", {"use_peft": True, "lora_r": 4}), ("reward", {}), ("ppo", {"max_steps": 1})):
        said = run(stage, f"alone-{stage}", token=None, **changes)
        assert said.code == 0, said.err
        assert said.met == []


def test_a_local_folder_that_is_named_like_a_repo_is_looked_for_nowhere_else(
    client: Any, runs: Path, repos: Path, hub: Any
) -> None:
    """PPO with an adapter of its own on a merged adapter: peft would ask the Hub for the base's configuration."""
    (runs / "out").mkdir()
    (runs / "out" / "lora").symlink_to(repos / "adapter")
    words = small_runs.flags("ppo", runs, "out/ppo", **FEW, model_name_or_path="out/lora", use_peft=True, lora_r=4)
    here = """
import os, sys
from rlhf_recipes.__main__ import main
os.chdir(runs)
sys.argv = ["rlhf_recipes", "ppo", *words.split("|")]
main()
from rlhf_recipes.models import load_causal_lm, load_config
assert load_config("out/ppo").n_layer == load_causal_lm("out/ppo").config.n_layer == 2
"""
    asked = len(hub.requests)
    said = client.program(here, token=GOOD, runs=runs, words="|".join(words).replace(f"{runs}/", ""))
    assert said.code == 0, said.err
    assert said.met == [] and len(hub.requests) == asked


def test_sft_pushes_with_the_token_of_its_flag(run: Callable[..., Any], hub: Any, runs: Path) -> None:
    said = run("sft", "sft", token=None, **to("me/sft", hub_token=GOOD))
    assert said.code == 0 and said.out.rstrip().splitlines()[-1].startswith(
        f"pushed {runs / 'sft'} to {hub.address}/me/sft/"
    )
    held = require_pushed(hub, runs / "sft", "me/sft")
    assert {"README.md", "config.json", "model.safetensors", "recipe.yaml", "metrics.json", "tokenizer.json"} <= set(
        held
    )
    assert "hub_token" not in yaml.safe_load(held["recipe.yaml"]) and "--hub_token '***'" in held["README.md"].decode()
    assert yaml.safe_load(held["recipe.yaml"])["hub_model_id"] == "me/sft"
    assert hub.commits("me/sft") == 1
    told = json.loads((runs / "sft" / "checkpoint-2" / "progress_0.json").read_text())
    assert told["requested"]["dataset_name"] and "hub_token" not in json.dumps(told)


@pytest.fixture(scope="module")
def repos(hub: Any, client: Any, runs: Path) -> Path:
    """Push what later stages read: a model, a reward model, an adapter on the model, and rows. Returns their folder."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(runs / "model")
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False
    )
    get_peft_model(model, lora).save_pretrained(runs / "adapter")
    AutoTokenizer.from_pretrained(runs / "model").save_pretrained(runs / "adapter")
    (runs / "adapter" / "README.md").unlink()
    for name in ("model", "reward_model", "demonstrations", "prompts", "text"):
        assert client.stage(*faults.words(runs / name, f"me/{name}"), token=GOOD).code == 0
    said = client.stage(*faults.words(runs / "adapter", "me/adapter"), token=GOOD)
    assert said.code == 0 and "so nobody else can load it" in said.err
    said = client.stage(*faults.words(runs / "adapter", "me/adapter", "--base_model", "me/model"), token=GOOD)
    assert said.code == 0 and "nobody else" not in said.err
    return runs


LOADS = {
    "a model": """
        from transformers import AutoModelForCausalLM
        here, there = (AutoModelForCausalLM.from_pretrained(name) for name in (f"{runs}/model", "me/model"))
        """,
    "a reward model": """
        from transformers import AutoModelForSequenceClassification
        names = (f"{runs}/reward_model", "me/reward_model")
        here, there = (AutoModelForSequenceClassification.from_pretrained(name) for name in names)
        """,
    "an adapter": """
        from peft import AutoPeftModelForCausalLM
        from transformers import AutoModelForCausalLM
        here, there = (AutoPeftModelForCausalLM.from_pretrained(name) for name in (f"{runs}/adapter", "me/adapter"))
        plain = AutoModelForCausalLM.from_pretrained("me/adapter")
        assert any("lora_" in name for name, _ in plain.named_parameters())
        """,
    "an adapter, as a stage reads it": """
        from rlhf_recipes.models import is_adapter, load_causal_lm
        assert is_adapter("me/adapter") and not is_adapter("me/model") and not is_adapter("me/nowhere")
        here, there = (load_causal_lm(name) for name in (f"{runs}/adapter", "me/adapter"))
        """,
}


@pytest.mark.parametrize("what", LOADS)
def test_what_was_pushed_loads_by_its_id(what: str, client: Any, repos: Path) -> None:
    import textwrap

    same = """
        import torch
        ids = torch.tensor([[5, 6, 7, 257]])
        assert torch.equal(here(ids).logits, there(ids).logits)
        """
    said = client.program(textwrap.dedent(LOADS[what]) + textwrap.dedent(same), token=GOOD, runs=repos)
    assert said.code == 0, said.err


def test_a_tokenizer_and_rows_load_by_their_ids(client: Any, repos: Path, hub: Any) -> None:
    said = client.program(
        """
from datasets import load_dataset
from transformers import AutoTokenizer
assert AutoTokenizer.from_pretrained("me/model")("a cat").input_ids == list(b"a cat")
rows = load_dataset("me/prompts")
here = {name: len(open(f"{runs}/prompts/{name}.jsonl").readlines()) for name in ("train", "test")}
assert {name: len(split) for name, split in rows.items()} == here
assert rows["train"].column_names == ["prompt"]
""",
        token=GOOD,
        runs=repos,
    )
    assert said.code == 0, said.err
    held = hub.files("me/prompts", "dataset")
    assert {name: held[name] for name in held if name != "README.md"} == contents(repos / "prompts")
    card = held["README.md"].decode()
    for split in ("train", "test"):
        assert f"| {split} | {len((repos / 'prompts' / f'{split}.jsonl').read_text().splitlines())} | prompt |" in card
    assert hub.repos["datasets", "me/prompts"].private and not (repos / "prompts" / "README.md").exists()


def test_a_private_repo_is_nobody_elses(run: Callable[..., Any], repos: Path) -> None:
    said = run("sft", "none", token=None, model_name_or_path="hub:me/model")
    assert said.code == 2 and not (repos / "none").exists()
    assert re.match(r"error: .*model me/model cannot be loaded .*; if the repo is private, log in with", said.last)


def test_the_next_stage_takes_ids_and_pushes_what_it_makes(
    run: Callable[..., Any], hub: Any, client: Any, repos: Path
) -> None:
    """sft from a model and rows, ppo from the pushed adapter with a value model, ppo once more from what that left."""
    base = {"model_name_or_path": "hub:me/model", "dataset_name": "hub:me/demonstrations"}
    said = run("sft", "next-lora", **base, use_peft=True, lora_r=4, **to("me/next-lora"))
    assert said.code == 0, said.err
    held = require_pushed(hub, repos / "next-lora", "me/next-lora")
    front = yaml.safe_load(held["README.md"].decode().split("---")[1])
    assert (front["base_model"], front["datasets"], front["library_name"]) == (
        "me/model",
        ["me/demonstrations"],
        "peft",
    )
    assert json.loads(held["adapter_config.json"])["base_model_name_or_path"] == "me/model"

    asked = {
        "dataset_name": "hub:me/prompts",
        "reward": "hub:me/reward_model",
        "max_steps": 1,
        "value_model": "me/reward_model",
    }
    said = run("ppo", "next-ppo", model_name_or_path="hub:me/next-lora", **asked, **to("me/next-ppo"))
    assert said.code == 0, said.err
    held = require_pushed(hub, repos / "next-ppo", "me/next-ppo")
    assert {"model.safetensors", "value_model/config.json", "value_model/model.safetensors"} <= set(held)

    asked["value_model"] = "me/next-ppo/value_model"
    said = run("ppo", "last-ppo", model_name_or_path="hub:me/next-ppo", **asked)
    assert said.code == 0, said.err
    said = client.program(
        """
import torch
from transformers import AutoModelForSequenceClassification
here = AutoModelForSequenceClassification.from_pretrained(f"{runs}/next-ppo/value_model")
there = AutoModelForSequenceClassification.from_pretrained("me/next-ppo", subfolder="value_model")
assert all(torch.equal(a, b) for a, b in zip(here.parameters(), there.parameters(), strict=True))
""",
        token=GOOD,
        runs=repos,
    )
    assert said.code == 0, said.err


def test_a_reward_model_that_is_an_adapter_rides_on_the_policy_by_its_id(
    run: Callable[..., Any], hub: Any, repos: Path
) -> None:
    lora = {"model_name_or_path": "hub:me/model", "use_peft": True, "lora_r": 4}
    said = run("reward", "rider", **lora, **to("me/rider"))
    assert said.code == 0, said.err
    assert {"adapter_config.json", "config.json"} <= set(require_pushed(hub, repos / "rider", "me/rider"))
    said = run("ppo", "ridden", **lora, dataset_name="hub:me/prompts", reward="hub:me/rider", max_steps=1)
    assert said.code == 0, said.err


def test_a_tokenizer_is_pushed_and_read_by_its_id(client: Any, hub: Any, repos: Path) -> None:
    push = ["--push_to_hub", "true", "--hub_model_id", "me/tokens"]
    out = ["--output_dir", f"{repos}/tokens", "--vocab_size", "300"]
    said = client.stage("tokenizer", "--dataset_name", "me/text", *out, *push, token=GOOD)
    assert said.code == 0 and f"pushed {repos}/tokens to " in said.out, said.err
    require_pushed(hub, repos / "tokens", "me/tokens")
    words = ["--dataset_name", "me/text", "--tokenizer_name", "me/tokens", "--output_dir", f"{repos}/from-tokens"]
    said = client.stage(
        "pretrain", *words, "--model_size", "tiny", "--max_length", "16", "--max_steps", "1", token=GOOD
    )
    assert said.code == 0, said.err


def test_a_trainer_pushes_when_it_is_called(client: Any, runs: Path, hub: Any) -> None:
    """Without a stage around it, as `Trainer.push_to_hub`: card included, pickles and checkpoints not."""
    words = small_runs.flags("ppo", runs, "called", **FEW, save_strategy="no", hub_model_id="me/called")
    said = client.program(
        """
from trl import ModelConfig
from rlhf_recipes.core.arguments import parse_arguments
from rlhf_recipes.stages.ppo import PPOArguments, PPOConfig, build_ppo_trainer
trainer = build_ppo_trainer(*parse_arguments(PPOArguments, ModelConfig, PPOConfig, argv=words.split("|")))
trainer.train()
print(trainer.push_to_hub("By hand", dataset_name="someone/prompts"))
""",
        token=GOOD,
        words="|".join(words),
    )
    assert said.code == 0, said.err
    held = hub.files("me/called")
    assert {"model.safetensors", "config.json", "README.md", "value_model/value_head.safetensors"} <= set(held)
    assert "training_args.bin" not in held and "someone/prompts" in held["README.md"].decode()
    assert (
        hub.repos["models", "me/called"].at("main").message == "By hand" and hub.repos["models", "me/called"].private
    )


# A push that fails around a training.


def test_a_repo_that_may_not_be_written_to_is_found_before_the_folder_is_touched(
    run: Callable[..., Any], hub: Any, runs: Path
) -> None:
    assert run("sft", "kept", token=None).code == 0
    before = contents(runs / "kept")
    said = run("sft", "kept", token=READ, overwrite=True, **to("me/kept"))
    assert said.code == 2 and said.last.startswith(
        "error: me/kept cannot be pushed to: the token has no write access there"
    )
    assert contents(runs / "kept") == before and ("models", "me/kept") not in hub.repos
    hub.make("me/kept")  # it is there, and may be read
    said = run("sft", "kept", token=READ, overwrite=True, **to("me/kept"))
    assert said.code == 2 and said.last.startswith(
        "error: me/kept cannot be pushed to: the token has no write access there"
    )
    assert contents(runs / "kept") == before
    said = run("sft", "fresh", token=None, **to("me/kept"))
    assert said.code == 2 and "no token" in said.last and not (runs / "fresh").exists()


def test_a_training_whose_push_fails_is_whole_and_is_pushed_by_the_same_command(
    run: Callable[..., Any], hub: Any, runs: Path
) -> None:
    with hub.failing(faults.Fault("commit", status=503)):
        said = run("sft", "late", resume="auto", **to("me/late"))
    assert said.code == 2 and "Traceback" not in said.err
    assert said.last.startswith(f"error: {runs}/late was not pushed to me/late: the Hub answers 503")
    assert hub.files("me/late") == {} and (runs / "late" / "recipe.yaml").is_file()
    before = contents(runs / "late")
    said = run("sft", "late", resume="auto", **to("me/late"))
    assert said.code == 0 and "is finished" in said.err and f"pushed {runs}/late to" in said.out
    assert (
        contents(runs / "late")
        == before
        == require_pushed(hub, runs / "late", "me/late")
        | {name: content for name, content in before.items() if name.startswith("checkpoint-")}
    )


def test_checkpoints_are_pushed_as_they_come_and_can_be_gone_on_from(
    run: Callable[..., Any], hub: Any, runs: Path, tmp_path: Path
) -> None:
    from rlhf_recipes.folders.checkpoints import find_damage

    seen: list[dict[str, bytes]] = []
    said = run("sft", "steady", **to("me/steady", hub_strategy="checkpoint"))
    assert said.code == 0, said.err
    seen = [commit.files for commit in hub.repos["models", "me/steady"].branches["main"]]
    assert len(seen) == 1 + 2 * 2 + 1
    assert b"under way" not in seen[-1]["README.md"] and b"Training in progress, step 1" in seen[1]["README.md"]
    assert (
        not any("optimizer" in name for name in seen[1])
        and seen[1]["model.safetensors"] != seen[3]["model.safetensors"]
    )
    for name, content in hub.files("me/steady").items():
        if name.startswith("last-checkpoint/"):
            place = tmp_path / name
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(content)
    assert find_damage(tmp_path / "last-checkpoint") is None
    assert contents(tmp_path / "last-checkpoint") == contents(runs / "steady" / "checkpoint-2")


def test_a_checkpoint_that_cannot_be_pushed_does_not_end_the_training(
    run: Callable[..., Any], hub: Any, runs: Path
) -> None:
    with hub.failing(faults.Fault("commit", status=403, times=2)):
        said = run("sft", "on", **to("me/on", hub_strategy="all_checkpoints"))
    assert said.code == 0, said.err
    assert said.err.count("The training continues") == 2 and "checkpoint-1 was not pushed to me/on" in said.err
    assert set(hub.files("me/on")) >= {"model.safetensors", "README.md", "recipe.yaml"}


# A machine whose network is watched.

GUARD = """
import os, sys

def watch(event, details):
    if event == "socket.getaddrinfo":
        place = str(details[0])
    elif event == "socket.connect" and isinstance(details[1], tuple):
        place = str(details[1][0])
    else:
        return
    if place not in ("None", "localhost", "::1", "0.0.0.0") and not place.startswith("127."):
        with open(os.environ["WATCHED"], "a") as stream:
            print(place, sys.argv, file=stream)
        raise PermissionError(f"{place} is elsewhere")

sys.addaudithook(watch)
"""


def watched(folder: Path, *words: str) -> tuple[int, str, str]:
    """A process with nothing switched off that may be switched off; how it ended, and whom it asked for."""
    import os
    import subprocess

    (folder / "guard").mkdir(exist_ok=True)
    (folder / "guard" / "sitecustomize.py").write_text(GUARD)
    (folder / "met").touch()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "DISABLE_"))}
    environment |= {
        "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "home"), "WATCHED": str(folder / "met"), "HF_TOKEN": GOOD,
        "PYTHONPATH": f"{folder / 'guard'}{os.pathsep}{Path(__file__).parents[2] / 'src'}", "CI": "",
    }  # fmt: skip
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr, (folder / "met").read_text()


def test_the_watch_sees_who_is_asked_for(tmp_path: Path) -> None:
    """Else the test below could not fail: a name, an address, and a library that swallows what happens to it."""
    for program in (
        "import socket; socket.getaddrinfo('huggingface.co', 443)",
        "import socket; socket.create_connection(('192.0.2.1', 80), 1)",
        "from huggingface_hub.utils import send_telemetry as send; from huggingface_hub.utils import _telemetry as t; "
        "send('x'); t._TELEMETRY_QUEUE.join()",
    ):
        before = (tmp_path / "met").read_text() if (tmp_path / "met").exists() else ""
        *_, met = watched(tmp_path, "-c", program)
        assert len(met) > len(before), program


def test_no_client_of_the_library_waits_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes a new one after each connection that was refused."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http, close_session, get_session

    from rlhf_recipes.hub import requests as asking

    before = _http._GLOBAL_CLIENT_FACTORY
    try:
        for _ in range(2):
            asking.api("a-token")
        for _ in range(2):
            assert get_session().timeout.read == asking.READ_TIMEOUT
            close_session()
        assert _http._GLOBAL_CLIENT_FACTORY.make is before
    finally:
        set_client_factory(before)


@pytest.mark.slow
def test_no_stage_asks_for_anybody_unless_it_is_told_to(tmp_path: Path) -> None:
    """The whole chain in small, as processes of their own, from relative folders, on a machine that is online."""
    from rlhf_recipes import write_world

    write_world(tmp_path / "runs", 0, corpus=80, demonstrations=48, preferences=48, prompts=40, test=12)
    few = ["--max_steps", "2", "--save_steps", "1", "--report_to", "none"]
    lora = ["--use_peft", "true", "--lora_r", "4"]
    sft = ["--model_name_or_path", "out/sft"]
    reward = ["--reward", "out/reward", "rlhf_recipes.quickstart:gold_score", "--dataset_name", "runs/prompts"]
    short = ["--per_device_train_batch_size", "4", "--response_length", "8"]
    pairs = ["--dataset_name", "runs/preferences"]
    stages = {
        "tokenizer": ["--dataset_name", "runs/corpus", "--vocab_size", "400"],
        "pretrain": [
            "--dataset_name",
            "runs/corpus",
            "--tokenizer_name",
            "out/tokenizer",
            "--model_size",
            "tiny",
            *few,
        ],
        "sft": ["--dataset_name", "runs/demonstrations", "--model_name_or_path", "out/pretrain", *few, *lora],
        "reward": [*pairs, *sft, *few],
        "ppo": [*reward, *sft, *few, *short, *lora],
        "dpo": [*pairs, *sft, *few],
        "rloo": [*reward, *sft, *few, *short[:2], "--num_generations", "2", "--max_completion_length", "8"],
        "eval": ["--models", "out/sft", "out/ppo", "--dataset_name", "runs/prompts", "--reward_model", "out/reward"],
    }
    for stage, words in stages.items():
        code, told, met = watched(tmp_path, "-m", "rlhf_recipes", stage, *words, "--output_dir", f"out/{stage}")
        assert code == 0, told
        assert met == "", f"{stage}: {met}"
        require_no_secret(told)
