"""Pushes to a local Hub server: complete or not at all, no secret is sent or printed, no connection unless requested."""

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

WRITE_TOKEN, READ_TOKEN, UNKNOWN_TOKEN = faults.WRITE_TOKEN, faults.READ_TOKEN, faults.UNKNOWN_TOKEN
SECRETS = (WRITE_TOKEN, READ_TOKEN, UNKNOWN_TOKEN, faults.SIGNATURE)


@pytest.fixture(scope="module")
def hub() -> Iterator[Any]:
    with faults.Hub() as hub:
        hub.tokens = {WRITE_TOKEN: ("me", True), READ_TOKEN: ("me", False)}
        yield hub


@pytest.fixture(scope="module")
def client(hub: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    client = faults.Client(hub.address, tmp_path_factory.mktemp("home"))
    yield client
    client.close()


@pytest.fixture
def push(client: Any) -> Callable[..., Any]:
    """Return a function that runs the stage `push` and requires that its output has no secret."""

    def push(folder: Path, repo: str, *flags: str, token: str | None = WRITE_TOKEN) -> Any:
        result = client.stage(*faults.push_arguments(folder, repo, *flags), token=token)
        require_no_secret(result.out + result.err)
        return result

    return push


def require_no_secret(text: str) -> None:
    assert [secret for secret in SECRETS if secret in text] == []


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Faults.


@pytest.mark.parametrize("case", faults.CASES, ids=lambda case: case.name)
def test_a_push_is_atomic_under_faults_and_a_second_push_completes_it(
    case: Any, hub: Any, client: Any, push: Callable[..., Any], tmp_path: Path
) -> None:
    number = 2 * faults.CASES.index(case)
    old, folder = (faults.make_folder(tmp_path / str(seed), seed) for seed in (number, number + 1))
    repo, new = f"me/fault-{number}", faults.files_to_push(folder)
    if not case.new_repo:
        assert push(old, repo).code == 0
    before, commits, local = hub.files(repo), hub.commits(repo), contents(folder)
    result = faults.push_with_faults(client, hub, case, folder, repo)
    require_no_secret(result.out + result.err)
    assert contents(folder) == local
    if case.killed:
        assert result.code == -9 and hub.files(repo) in (before, new)
    elif case.pushed:
        assert result.code == 0 and "pushed" in result.out
        assert hub.files(repo) == new and hub.commits(repo) == commits + 1
    else:
        assert result.code == 2 and "pushed" not in result.out and "Traceback" not in result.err
        assert (
            result.err.count("error:") == 1
            and result.last_line.startswith("error: ")
            and case.message in result.last_line
        )
        assert (
            case.token is None or f"push it with: python -m rlhf_recipes push --folder {folder} " in result.last_line
        )
        assert case.corrupts or (hub.files(repo) == before and hub.commits(repo) == commits)
    assert all(result.waited.count(wait) >= case.waits.count(wait) for wait in case.waits)
    assert push(folder, repo).code == 0
    assert hub.files(repo) == new and contents(folder) == local
    assert hub.repos["models", repo].private


def test_faults_cover_every_endpoint_of_a_push(hub: Any) -> None:
    """After the tests above, every endpoint of a push has been requested; each has a fault in CASES."""
    assert {endpoint for endpoint, _, _ in hub.requests} >= set(faults.STEPS)
    assert not [path for endpoint, _, path in hub.requests if endpoint == "unknown"]


# Files, repos and branches.


def test_files_for_resuming_are_not_pushed(hub: Any, push: Callable[..., Any], tmp_path: Path) -> None:
    folder = faults.make_folder(tmp_path / "run", 90)
    result = push(folder, "me/files")
    assert (
        result.out
        == f"pushed {folder} to {hub.address}/me/files/commit/{hub.repos['models', 'me/files'].at('main').oid}\n"
    )
    assert sorted(hub.files("me/files")) == sorted(faults.PUSHED)
    puts = hub.count("put")
    assert push(folder, "me/files").code == 0  # again: nothing is sent, no commit is made
    assert hub.commits("me/files") == 1 and hub.count("put") == puts


def test_large_files_are_sent_in_parts_and_long_listings_read_in_pages(
    hub: Any, client: Any, push: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = faults.make_folder(tmp_path / "run", 91)
    monkeypatch.setattr(hub, "part_size", 65_536)
    monkeypatch.setattr(hub, "page_size", 2)
    with hub.failing(faults.Fault("put", "disconnect", amount=20_000, times=1, skip=2)):
        assert push(folder, "me/parts").code == 0
    assert hub.files("me/parts") == faults.files_to_push(folder) and hub.count("complete") >= 2


def test_weights_of_an_earlier_push_are_deleted(hub: Any, push: Callable[..., Any], tmp_path: Path) -> None:
    """transformers prefers model.safetensors to the shards of model.safetensors.index.json."""
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
    expected = {*faults.PUSHED, "model-00001-of-00001.safetensors", "model.safetensors.index.json"}
    expected |= {"LICENSE", "last-checkpoint/model.safetensors"}
    assert set(hub.files("me/stale")) == expected - {"model.safetensors", "value_model/model.safetensors"}


def test_repos_are_private_by_default_and_public_repos_are_refused(
    hub: Any, push: Callable[..., Any], tmp_path: Path
) -> None:
    folder = faults.make_folder(tmp_path / "run", 93)
    assert push(folder, "me/open", "--hub_private_repo", "false").code == 0
    assert not hub.repos["models", "me/open"].private
    (folder / "config.json").write_text("{}")
    before = hub.files("me/open")
    result = push(folder, "me/open")
    assert result.code == 2 and "me/open is public on the Hub" in result.last_line and hub.files("me/open") == before
    assert push(folder, "me/open", "--hub_private_repo", "false").code == 0
    assert hub.files("me/open")["config.json"] == b"{}"


def test_push_to_a_branch(hub: Any, push: Callable[..., Any], tmp_path: Path) -> None:
    folder = faults.make_folder(tmp_path / "run", 94)
    result = push(folder, "me/branches", "--hub_revision", "second")
    assert result.code == 0
    assert hub.files("me/branches") == {}
    assert hub.files("me/branches", revision="second") == faults.files_to_push(folder)


@pytest.mark.parametrize(
    ("folder", "flags", "message"),
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
def test_invalid_arguments_are_one_line_errors_before_any_request(
    folder: str | None, flags: list[str], message: str, hub: Any, client: Any, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    faults.make_folder(tmp_path / "run", 95)
    requests = len(hub.requests)
    folder_flags = ["--folder", str(tmp_path / folder)] if folder else []
    result = client.stage("push", *folder_flags, "--hub_model_id", "me/x", *flags, token=WRITE_TOKEN)
    assert result.code == 2 and result.err.strip().count("\n") == 0 and message in result.last_line
    assert len(hub.requests) == requests and result.connections == []


def test_offline_mode_is_a_one_line_error(client: Any, tmp_path: Path) -> None:
    result = client.stage(
        *faults.push_arguments(faults.make_folder(tmp_path / "run", 96), "me/x"), token=WRITE_TOKEN, offline=True
    )
    assert result.code == 2 and "while HF_HUB_OFFLINE=1; unset it" in result.last_line and result.connections == []


@pytest.mark.parametrize(
    "token", [f"{WRITE_TOKEN[:20]} {WRITE_TOKEN[20:]}", f"{WRITE_TOKEN}\n{WRITE_TOKEN}", f"{WRITE_TOKEN}é"]
)
def test_an_invalid_token_is_refused_and_not_printed(token: str, client: Any, tmp_path: Path) -> None:
    folder = faults.make_folder(tmp_path / "run", 97)
    result = client.stage(*faults.push_arguments(folder, "me/x", "--hub_token", token))
    assert result.code == 2 and "give it as it was issued" in result.last_line and result.connections == []
    require_no_secret(result.err)
    assert WRITE_TOKEN[20:] not in result.err


def test_hub_model_id_and_push_to_hub_need_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="nothing is pushed without push_to_hub"):
        check_push(HubArguments(hub_model_id="me/x"))
    check_push(HubArguments())
    with pytest.raises(UserError, match="no repo to push to"):
        check_push(HubArguments(push_to_hub=True))


# Recipes, commands and cards.


def test_tokens_are_neither_in_recipes_nor_in_commands() -> None:
    from trl import ModelConfig

    from rlhf_recipes.stages.sft import SFTArguments, SFTConfig

    argv = ["--hub_token", WRITE_TOKEN, "--eos_token", "<|endoftext|>"]
    argv += ["--push_to_hub", "true", "--hub_model_id", "me/x"]
    arguments = parse_arguments(SFTArguments, ModelConfig, SFTConfig, argv=argv)
    assert requested_values(*arguments) == {"eos_token": "<|endoftext|>", "push_to_hub": True, "hub_model_id": "me/x"}
    with_token = HubArguments(hub_token=WRITE_TOKEN)
    assert requested_values(with_token) == {} and WRITE_TOKEN not in repr(with_token)
    for flags in (
        ["--hub_token", WRITE_TOKEN],
        [f"--hub_token={WRITE_TOKEN}"],
        ["--hub-token", "plain-one"],
        ["--hub-token=plain-one"],
    ):
        command = " ".join(redact_command(["sft", *flags, "--seed", "3"]))
        assert command.startswith("sft --hub") and command.endswith("*** --seed 3") and "plain-one" not in command
        require_no_secret(command)


def test_arguments_that_may_hold_secrets_are_listed() -> None:
    """A new argument, of this package or of a library, belongs into SECRET_ARGUMENTS or into this list."""
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
        names |= {field for name, type_ in hints.items() if name != "return" for field in type_.__dataclass_fields__}
    suspicious = {
        name for name in names if re.search(r"_token$|api_key|secret|passw|credential|average_tokens|seen$", name)
    }
    assert suspicious == harmless | SECRET_ARGUMENTS


def test_errors_do_not_print_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), one_line_errors():
        parse_arguments(HubArguments, argv=["--push_to_hub", "true", WRITE_TOKEN])
    stderr = capsys.readouterr().err
    assert "unexpected argument '***'" in stderr
    assert redact("hf_transfer, hf_hub_download and hf_reviews_of_many_films_and_books stay") == (
        "hf_transfer, hf_hub_download and hf_reviews_of_many_films_and_books stay"
    )


HOSTILE = [
    "a | b", "a\n---\nlicense: mit\n---\n# Mine", "`code` ``more``", "<script>alert(1)</script>", "[x](javascript:alert(1))",
    "![x](http://example.com/pixel.png)", "*bold* ~~gone~~ &lt;", "```\n# out of the fence\n```", "\u2028line\rline",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_text_does_not_become_markup_in_a_card(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text is a name, a value, a parent, a command-line argument and a line of the recipe."""
    monkeypatch.setattr(sys, "argv", ["recipes/sft.py", "--dataset_name", text])
    recipe = yaml.safe_dump({"dataset_name": text, "odd": "a\n```\n# out\n"}, sort_keys=False)
    card = model_card("sft", "Title", {"model": text, text: "me/other"}, {text: text, "loss": 0.5}, recipe, [], "")
    front, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(front) == {"library_name": "transformers", "tags": ["rlhf-recipes", "sft"]}
    # The end of a code block by CommonMark's rules.
    fence = re.search(r"^(`{3,})yaml\n(.*?)\n {0,3}\1`*$", body, re.MULTILINE | re.DOTALL)
    assert fence is not None and yaml.safe_load(fence[2]) == yaml.safe_load(recipe)
    before_recipe = body[: fence.start()]
    assert len(re.findall(r"^#", before_recipe, re.MULTILINE)) == 2, "the headings are the title and the limits"
    table = re.findall(r"^\|.*$", before_recipe, re.MULTILINE)
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in table] == [3] * 4
    (parent,) = re.findall(r"^- model: (`+)( ?)(.*)\2\1$", before_recipe, re.MULTILINE)
    assert parent[2] == " ".join(text.split()) and parent[0] not in re.findall("`+", parent[2])
    without_code = re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", before_recipe)
    assert not re.search(r"(?<!\\)[<\[`*~&]", without_code)


def test_card_names_parents_command_and_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "sft").mkdir(parents=True)
    monkeypatch.setattr(
        sys, "argv", [str(tmp_path / "sft.py"), "--model_name_or_path", "runs/sft", "--hub_token", WRITE_TOKEN]
    )
    card = model_card(
        "ppo", "T", {"model": "runs/sft", "reward": "me/reward_model", "prompts": "me/rows"}, {"kl": 1.5}, "", [], ""
    )
    assert yaml.safe_load(card.split("---")[1])["datasets"] == ["me/rows"] and "base_model" not in card.split("---")[1]
    assert "- model: `runs/sft`" in card and str(tmp_path) not in card
    assert "Command: `sft.py --model_name_or_path runs/sft --hub_token '***'`" in card
    assert "has not been tested for safety" in card and "## Limits" in card
    card = model_card("ppo", "T", {"model": "me/base/value_model", "prompts": "me/a, me/b"}, {}, "", [], "")
    front = yaml.safe_load(card.split("---")[1])
    assert (front["base_model"], front["datasets"]) == ("me/base", ["me/a", "me/b"])


# Whole stages.


SHORT_RUN = {"max_steps": 2, "save_steps": 1}


@pytest.fixture
def run(client: Any, runs: Path) -> Callable[..., Any]:
    """Return a function (stage, out, token, **flags) that runs a stage; values with the prefix `hub:` are Hub ids."""

    def run(stage: str, out: str, token: str | None = WRITE_TOKEN, **changes: Any) -> Any:
        flags = small_runs.flags(stage, runs, out, **(SHORT_RUN | changes))
        result = client.stage(stage, *(flag.removeprefix("hub:") for flag in flags), token=token)
        require_no_secret(result.out + result.err)
        return result

    return run


def push_to(repo: str, **more: Any) -> dict[str, Any]:
    return {"push_to_hub": True, "hub_model_id": repo} | more


def require_pushed(hub: Any, folder: Path, repo: str) -> dict[str, bytes]:
    """Check that the repo is private, equals the folder without checkpoints, and contains no secret. Return its files."""
    files = hub.files(repo)
    assert hub.repos["models", repo].private and files
    assert files == {name: content for name, content in contents(folder).items() if not name.startswith("checkpoint-")}
    for content in (*contents(folder).values(), *files.values()):
        require_no_secret(content.decode("latin-1"))
    return files


def test_runs_without_push_make_no_connection(run: Callable[..., Any], runs: Path) -> None:
    """With local files and models there is no telemetry, no download count, and no request to the Hub."""
    for stage, changes in (("sft", {"use_peft": True, "lora_r": 4}), ("reward", {}), ("ppo", {"max_steps": 1})):
        result = run(stage, f"local-{stage}", token=None, **changes)
        assert result.code == 0, result.err
        assert result.connections == []


def test_a_local_folder_named_like_a_repo_makes_no_request(
    client: Any, runs: Path, pushed_folders: Path, hub: Any
) -> None:
    """PPO with a new adapter on a merged adapter: peft would request the base's config from the Hub."""
    (runs / "out").mkdir()
    (runs / "out" / "lora").symlink_to(pushed_folders / "adapter")
    flags = small_runs.flags(
        "ppo", runs, "out/ppo", **SHORT_RUN, model_name_or_path="out/lora", use_peft=True, lora_r=4
    )
    program = """
import os, sys
from rlhf_recipes.__main__ import main
os.chdir(runs)
sys.argv = ["rlhf_recipes", "ppo", *flags.split("|")]
main()
from rlhf_recipes.models import load_causal_lm, load_config
assert load_config("out/ppo").n_layer == load_causal_lm("out/ppo").config.n_layer == 2
"""
    requests = len(hub.requests)
    result = client.program(program, token=WRITE_TOKEN, runs=runs, flags="|".join(flags).replace(f"{runs}/", ""))
    assert result.code == 0, result.err
    assert result.connections == [] and len(hub.requests) == requests


def test_sft_pushes_with_the_token_flag(run: Callable[..., Any], hub: Any, runs: Path) -> None:
    result = run("sft", "sft", token=None, **push_to("me/sft", hub_token=WRITE_TOKEN))
    assert result.code == 0 and result.out.rstrip().splitlines()[-1].startswith(
        f"pushed {runs / 'sft'} to {hub.address}/me/sft/"
    )
    files = require_pushed(hub, runs / "sft", "me/sft")
    expected = {"README.md", "config.json", "model.safetensors", "recipe.yaml", "metrics.json", "tokenizer.json"}
    assert expected <= set(files)
    assert (
        "hub_token" not in yaml.safe_load(files["recipe.yaml"]) and "--hub_token '***'" in files["README.md"].decode()
    )
    assert yaml.safe_load(files["recipe.yaml"])["hub_model_id"] == "me/sft"
    assert hub.commits("me/sft") == 1
    progress = json.loads((runs / "sft" / "checkpoint-2" / "progress_0.json").read_text())
    assert progress["requested"]["dataset_name"] and "hub_token" not in json.dumps(progress)


@pytest.fixture(scope="module")
def pushed_folders(hub: Any, client: Any, runs: Path) -> Path:
    """Push a model, a reward model, an adapter on the model, and datasets, for later stages. Return their folder."""
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
        assert client.stage(*faults.push_arguments(runs / name, f"me/{name}"), token=WRITE_TOKEN).code == 0
    result = client.stage(*faults.push_arguments(runs / "adapter", "me/adapter"), token=WRITE_TOKEN)
    assert result.code == 0 and "so nobody else can load it" in result.err
    result = client.stage(
        *faults.push_arguments(runs / "adapter", "me/adapter", "--base_model", "me/model"), token=WRITE_TOKEN
    )
    assert result.code == 0 and "nobody else" not in result.err
    return runs


LOADS = {
    "a model": """
        from transformers import AutoModelForCausalLM
        local, remote = (AutoModelForCausalLM.from_pretrained(name) for name in (f"{runs}/model", "me/model"))
        """,
    "a reward model": """
        from transformers import AutoModelForSequenceClassification
        names = (f"{runs}/reward_model", "me/reward_model")
        local, remote = (AutoModelForSequenceClassification.from_pretrained(name) for name in names)
        """,
    "an adapter": """
        from peft import AutoPeftModelForCausalLM
        from transformers import AutoModelForCausalLM
        local, remote = (AutoPeftModelForCausalLM.from_pretrained(name) for name in (f"{runs}/adapter", "me/adapter"))
        loaded = AutoModelForCausalLM.from_pretrained("me/adapter")
        assert any("lora_" in name for name, _ in loaded.named_parameters())
        """,
    "an adapter, loaded by a stage": """
        from rlhf_recipes.models import is_adapter, load_causal_lm
        assert is_adapter("me/adapter") and not is_adapter("me/model") and not is_adapter("me/nowhere")
        local, remote = (load_causal_lm(name) for name in (f"{runs}/adapter", "me/adapter"))
        """,
}


@pytest.mark.parametrize("artifact", LOADS)
def test_pushed_models_load_by_their_ids(artifact: str, client: Any, pushed_folders: Path) -> None:
    import textwrap

    compare = """
        import torch
        ids = torch.tensor([[5, 6, 7, 257]])
        assert torch.equal(local(ids).logits, remote(ids).logits)
        """
    result = client.program(
        textwrap.dedent(LOADS[artifact]) + textwrap.dedent(compare), token=WRITE_TOKEN, runs=pushed_folders
    )
    assert result.code == 0, result.err


def test_pushed_tokenizers_and_datasets_load_by_their_ids(client: Any, pushed_folders: Path, hub: Any) -> None:
    result = client.program(
        """
from datasets import load_dataset
from transformers import AutoTokenizer
assert AutoTokenizer.from_pretrained("me/model")("a cat").input_ids == list(b"a cat")
rows = load_dataset("me/prompts")
local = {name: len(open(f"{runs}/prompts/{name}.jsonl").readlines()) for name in ("train", "test")}
assert {name: len(split) for name, split in rows.items()} == local
assert rows["train"].column_names == ["prompt"]
""",
        token=WRITE_TOKEN,
        runs=pushed_folders,
    )
    assert result.code == 0, result.err
    files = hub.files("me/prompts", "dataset")
    assert {name: files[name] for name in files if name != "README.md"} == contents(pushed_folders / "prompts")
    card = files["README.md"].decode()
    for split in ("train", "test"):
        rows = (pushed_folders / "prompts" / f"{split}.jsonl").read_text().splitlines()
        assert f"| {split} | {len(rows)} | prompt |" in card
    assert hub.repos["datasets", "me/prompts"].private and not (pushed_folders / "prompts" / "README.md").exists()


def test_a_private_repo_cannot_be_loaded_without_a_token(run: Callable[..., Any], pushed_folders: Path) -> None:
    result = run("sft", "none", token=None, model_name_or_path="hub:me/model")
    assert result.code == 2 and not (pushed_folders / "none").exists()
    assert re.match(
        r"error: .*model me/model cannot be loaded .*; if the repo is private, log in with", result.last_line
    )


def test_stages_read_and_push_repos(run: Callable[..., Any], hub: Any, client: Any, pushed_folders: Path) -> None:
    """SFT from a model and rows; PPO from the pushed adapter with a value model; PPO again from that model."""
    base = {"model_name_or_path": "hub:me/model", "dataset_name": "hub:me/demonstrations"}
    result = run("sft", "next-lora", **base, use_peft=True, lora_r=4, **push_to("me/next-lora"))
    assert result.code == 0, result.err
    files = require_pushed(hub, pushed_folders / "next-lora", "me/next-lora")
    front = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert (front["base_model"], front["datasets"], front["library_name"]) == (
        "me/model",
        ["me/demonstrations"],
        "peft",
    )
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "me/model"

    ppo_flags = {
        "dataset_name": "hub:me/prompts",
        "reward": "hub:me/reward_model",
        "max_steps": 1,
        "value_model": "me/reward_model",
    }
    result = run("ppo", "next-ppo", model_name_or_path="hub:me/next-lora", **ppo_flags, **push_to("me/next-ppo"))
    assert result.code == 0, result.err
    files = require_pushed(hub, pushed_folders / "next-ppo", "me/next-ppo")
    assert {"model.safetensors", "value_model/config.json", "value_model/model.safetensors"} <= set(files)

    ppo_flags["value_model"] = "me/next-ppo/value_model"
    result = run("ppo", "last-ppo", model_name_or_path="hub:me/next-ppo", **ppo_flags)
    assert result.code == 0, result.err
    result = client.program(
        """
import torch
from transformers import AutoModelForSequenceClassification
local = AutoModelForSequenceClassification.from_pretrained(f"{runs}/next-ppo/value_model")
remote = AutoModelForSequenceClassification.from_pretrained("me/next-ppo", subfolder="value_model")
assert all(torch.equal(a, b) for a, b in zip(local.parameters(), remote.parameters(), strict=True))
""",
        token=WRITE_TOKEN,
        runs=pushed_folders,
    )
    assert result.code == 0, result.err


def test_a_shared_base_reward_model_loads_by_its_id(run: Callable[..., Any], hub: Any, pushed_folders: Path) -> None:
    lora = {"model_name_or_path": "hub:me/model", "use_peft": True, "lora_r": 4}
    result = run("reward", "shared-base", **lora, **push_to("me/shared-base"))
    assert result.code == 0, result.err
    assert {"adapter_config.json", "config.json"} <= set(
        require_pushed(hub, pushed_folders / "shared-base", "me/shared-base")
    )
    result = run(
        "ppo", "shared-base-ppo", **lora, dataset_name="hub:me/prompts", reward="hub:me/shared-base", max_steps=1
    )
    assert result.code == 0, result.err


def test_tokenizer_stage_pushes_and_pretrain_reads_it(client: Any, hub: Any, pushed_folders: Path) -> None:
    push_flags = ["--push_to_hub", "true", "--hub_model_id", "me/tokens"]
    out = ["--output_dir", f"{pushed_folders}/tokens", "--vocab_size", "300"]
    result = client.stage("tokenizer", "--dataset_name", "me/text", *out, *push_flags, token=WRITE_TOKEN)
    assert result.code == 0 and f"pushed {pushed_folders}/tokens to " in result.out, result.err
    require_pushed(hub, pushed_folders / "tokens", "me/tokens")
    flags = ["--dataset_name", "me/text", "--tokenizer_name", "me/tokens"]
    flags += ["--output_dir", f"{pushed_folders}/from-tokens"]
    result = client.stage(
        "pretrain", *flags, "--model_size", "tiny", "--max_length", "16", "--max_steps", "1", token=WRITE_TOKEN
    )
    assert result.code == 0, result.err


def test_trainer_push_to_hub(client: Any, runs: Path, hub: Any) -> None:
    """Call `push_to_hub` on a trainer without a stage: the card is pushed, pickles and checkpoints are not."""
    flags = small_runs.flags("ppo", runs, "called", **SHORT_RUN, save_strategy="no", hub_model_id="me/called")
    result = client.program(
        """
from trl import ModelConfig
from rlhf_recipes.core.arguments import parse_arguments
from rlhf_recipes.stages.ppo import PPOArguments, PPOConfig, build_ppo_trainer
trainer = build_ppo_trainer(*parse_arguments(PPOArguments, ModelConfig, PPOConfig, argv=flags.split("|")))
trainer.train()
print(trainer.push_to_hub("By hand", dataset_name="someone/prompts"))
""",
        token=WRITE_TOKEN,
        flags="|".join(flags),
    )
    assert result.code == 0, result.err
    files = hub.files("me/called")
    assert {"model.safetensors", "config.json", "README.md", "value_model/value_head.safetensors"} <= set(files)
    assert "training_args.bin" not in files and "someone/prompts" in files["README.md"].decode()
    assert (
        hub.repos["models", "me/called"].at("main").message == "By hand" and hub.repos["models", "me/called"].private
    )


# Failed pushes around training.


def test_missing_write_access_is_found_before_the_folder_changes(
    run: Callable[..., Any], hub: Any, runs: Path
) -> None:
    assert run("sft", "kept", token=None).code == 0
    before = contents(runs / "kept")
    result = run("sft", "kept", token=READ_TOKEN, overwrite=True, **push_to("me/kept"))
    assert result.code == 2 and result.last_line.startswith(
        "error: me/kept cannot be pushed to: the token has no write access there"
    )
    assert contents(runs / "kept") == before and ("models", "me/kept") not in hub.repos
    hub.make("me/kept")  # the repo exists and the token can read it
    result = run("sft", "kept", token=READ_TOKEN, overwrite=True, **push_to("me/kept"))
    assert result.code == 2 and result.last_line.startswith(
        "error: me/kept cannot be pushed to: the token has no write access there"
    )
    assert contents(runs / "kept") == before
    result = run("sft", "fresh", token=None, **push_to("me/kept"))
    assert result.code == 2 and "no token" in result.last_line and not (runs / "fresh").exists()


def test_a_run_whose_push_failed_is_pushed_when_started_again(run: Callable[..., Any], hub: Any, runs: Path) -> None:
    with hub.failing(faults.Fault("commit", status=503)):
        result = run("sft", "late", resume="auto", **push_to("me/late"))
    assert result.code == 2 and "Traceback" not in result.err
    assert result.last_line.startswith(f"error: {runs}/late was not pushed to me/late: the Hub answers 503")
    assert hub.files("me/late") == {} and (runs / "late" / "recipe.yaml").is_file()
    before = contents(runs / "late")
    result = run("sft", "late", resume="auto", **push_to("me/late"))
    assert result.code == 0 and "is finished" in result.err and f"pushed {runs}/late to" in result.out
    assert (
        contents(runs / "late")
        == before
        == require_pushed(hub, runs / "late", "me/late")
        | {name: content for name, content in before.items() if name.startswith("checkpoint-")}
    )


def test_checkpoints_are_pushed_during_training_and_are_complete(
    run: Callable[..., Any], hub: Any, runs: Path, tmp_path: Path
) -> None:
    from rlhf_recipes.folders.checkpoints import find_damage

    result = run("sft", "steady", **push_to("me/steady", hub_strategy="checkpoint"))
    assert result.code == 0, result.err
    commits = [commit.files for commit in hub.repos["models", "me/steady"].branches["main"]]
    assert len(commits) == 1 + 2 * 2 + 1
    assert (
        b"Training in progress" not in commits[-1]["README.md"]
        and b"Training in progress, step 1" in commits[1]["README.md"]
    )
    assert (
        not any("optimizer" in name for name in commits[1])
        and commits[1]["model.safetensors"] != commits[3]["model.safetensors"]
    )
    for name, content in hub.files("me/steady").items():
        if name.startswith("last-checkpoint/"):
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
    assert find_damage(tmp_path / "last-checkpoint") is None
    assert contents(tmp_path / "last-checkpoint") == contents(runs / "steady" / "checkpoint-2")


def test_a_failed_checkpoint_push_does_not_stop_training(run: Callable[..., Any], hub: Any, runs: Path) -> None:
    with hub.failing(faults.Fault("commit", status=403, times=2)):
        result = run("sft", "on", **push_to("me/on", hub_strategy="all_checkpoints"))
    assert result.code == 0, result.err
    assert result.err.count("The training continues") == 2 and "checkpoint-1 was not pushed to me/on" in result.err
    assert set(hub.files("me/on")) >= {"model.safetensors", "README.md", "recipe.yaml"}


# Connections of processes.

GUARD = """
import os, sys

def log_connection(event, details):
    if event == "socket.getaddrinfo":
        host = str(details[0])
    elif event == "socket.connect" and isinstance(details[1], tuple):
        host = str(details[1][0])
    else:
        return
    if host not in ("None", "localhost", "::1", "0.0.0.0") and not host.startswith("127."):
        with open(os.environ["CONNECTIONS"], "a") as stream:
            print(host, sys.argv, file=stream)
        raise PermissionError(f"{host} is not this machine")

sys.addaudithook(log_connection)
"""


def run_guarded(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """Run Python with network features enabled. Return the exit code, the output, and the hosts it tried to contact."""
    import os
    import subprocess

    (folder / "guard").mkdir(exist_ok=True)
    (folder / "guard" / "sitecustomize.py").write_text(GUARD)
    (folder / "connections").touch()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "DISABLE_"))}
    environment |= {
        "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "home"), "HF_TOKEN": WRITE_TOKEN,
        "CONNECTIONS": str(folder / "connections"),
        "PYTHONPATH": f"{folder / 'guard'}{os.pathsep}{Path(__file__).parents[2] / 'src'}", "CI": "",
    }  # fmt: skip
    process = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    return process.returncode, process.stdout + process.stderr, (folder / "connections").read_text()


def test_connection_guard_logs_every_host(tmp_path: Path) -> None:
    """The guard logs a host name, an IP address, and telemetry of a library that ignores errors."""
    for program in (
        "import socket; socket.getaddrinfo('huggingface.co', 443)",
        "import socket; socket.create_connection(('192.0.2.1', 80), 1)",
        "from huggingface_hub.utils import send_telemetry as send; from huggingface_hub.utils import _telemetry as t; "
        "send('x'); t._TELEMETRY_QUEUE.join()",
    ):
        before = (tmp_path / "connections").read_text() if (tmp_path / "connections").exists() else ""
        *_, connections = run_guarded(tmp_path, "-c", program)
        assert len(connections) > len(before), program


def test_every_client_of_huggingface_hub_has_a_read_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub creates a new client after each failed connection."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http, close_session, get_session

    from rlhf_recipes.hub import requests

    before = _http._GLOBAL_CLIENT_FACTORY
    try:
        for _ in range(2):
            requests.api("a-token")
        for _ in range(2):
            assert get_session().timeout.read == requests.READ_TIMEOUT
            close_session()
        assert _http._GLOBAL_CLIENT_FACTORY.make is before
    finally:
        set_client_factory(before)


@pytest.mark.slow
def test_stages_make_no_connection_by_default(tmp_path: Path) -> None:
    """Run all stages on a small world, each in a new process, with relative folders and network features enabled."""
    from rlhf_recipes import write_world

    write_world(tmp_path / "world", 0, corpus=80, demonstrations=48, preferences=48, prompts=40, test=12)
    two_steps = ["--max_steps", "2", "--save_steps", "1", "--report_to", "none"]
    lora = ["--use_peft", "true", "--lora_r", "4"]
    sft = ["--model_name_or_path", "out/sft"]
    reward = ["--reward", "out/reward", "rlhf_recipes.quickstart:gold_score", "--dataset_name", "world/prompts"]
    short = ["--per_device_train_batch_size", "4", "--response_length", "8"]
    pairs = ["--dataset_name", "world/preferences"]
    stages = {
        "tokenizer": ["--dataset_name", "world/corpus", "--vocab_size", "400"],
        "pretrain": [
            "--dataset_name",
            "world/corpus",
            "--tokenizer_name",
            "out/tokenizer",
            "--model_size",
            "tiny",
            *two_steps,
        ],
        "sft": ["--dataset_name", "world/demonstrations", "--model_name_or_path", "out/pretrain", *two_steps, *lora],
        "reward": [*pairs, *sft, *two_steps],
        "ppo": [*reward, *sft, *two_steps, *short, *lora],
        "dpo": [*pairs, *sft, *two_steps],
        "rloo": [*reward, *sft, *two_steps, *short[:2], "--num_generations", "2", "--max_completion_length", "8"],
        "eval": ["--models", "out/sft", "out/ppo", "--dataset_name", "world/prompts", "--reward_model", "out/reward"],
    }
    for stage, flags in stages.items():
        code, output, connections = run_guarded(
            tmp_path, "-m", "rlhf_recipes", stage, *flags, "--output_dir", f"out/{stage}"
        )
        assert code == 0, output
        assert connections == "", f"{stage}: {connections}"
        require_no_secret(output)
