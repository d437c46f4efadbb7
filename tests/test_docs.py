"""README and docs: links, commands, imports, and the names of options, metrics, files and tests are checked."""

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "rlhf_recipes"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")),
    ROOT / "benchmarks" / "results" / "diary.md",
    *sorted(ROOT.glob("recipes/**/README.md")),
    *DOCS,
]
STAGES = sorted(path.stem for path in (SOURCE / "stages").glob("*.py") if path.stem != "__init__")

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
STARTS = ("python ", "accelerate launch ", "torchrun ", "make ", "rlhf-recipes ")
RECIPE = re.compile(
    r"^(?:(?:\S+/)?(?:python|torchrun.*?|accelerate launch.*?) (?:recipes/(\w+)\.py|-m rlhf_recipes (\w+))"
    r"|rlhf-recipes (?:show )?(\w+))(?: (.*))?$"
)
OLD_NAMES = {"CHANGELOG.md"}  # names packages and modules that no longer exist
OTHER_LIBRARY = "# needs trl=="  # the first line of a block that shows another library


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def commands_in(page: Path) -> list[str]:
    """Return the commands of a page: the lines of its bash blocks, and code in backticks that starts a program."""
    text = text_of(page).replace("\\\n", " ")
    blocks = [line for language, body in FENCE.findall(text) if language == "bash" for line in body.splitlines()]
    quoted = [code for code in CODE.findall(FENCE.sub("", text)) if code.startswith(STARTS)]
    lines = [" ".join(line.split(" #")[0].split()) for line in blocks + quoted]
    complete = [line for line in lines if line.startswith(STARTS) and not re.search(r"\.\.\.|[<>]", line)]
    return [line for line in complete if line != "python -m rlhf_recipes"]


def anchors_of(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text_of(page)), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


@cache
def argument_names(stage: str) -> set[str]:
    """Return the names of all options that a stage accepts."""
    return {name for kind in dataclasses_of(stage) for name in kind.__dataclass_fields__}


def dataclasses_of(stage: str) -> list[Any]:
    run = getattr(import_module(f"rlhf_recipes.stages.{stage}"), f"run_{stage}")
    return [hint for name, hint in get_type_hints(run).items() if name != "return"]


def table_rows(page: Path, section: str) -> Iterator[list[str]]:
    """Yield the cells of the rows of each table in a section of a page, without its headers."""
    found = re.search(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", text_of(page), re.MULTILINE | re.DOTALL)
    assert found is not None, f"{name_of(page)} has no section {section}"
    for table in re.findall(r"(?:^\|.*\n)+", found[1], re.MULTILINE):
        for line in table.splitlines()[2:]:
            yield [cell.strip() for cell in line.strip("|").split("|")]


COMMANDS = sorted({(name_of(page), command) for page in PAGES for command in commands_in(page)})
FIRST_OF = {command: page for page, command in reversed(COMMANDS)}


def test_commands_are_found() -> None:
    """The patterns above match what the pages contain."""
    assert len(FIRST_OF) >= 50
    assert {page for page, _ in COMMANDS} >= {"README.md", *(f"docs/{stage}.md" for stage in STAGES)}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_resolve(page: Path) -> None:
    """Every link leads to a file of the repository, and every anchor to a heading."""
    broken = []
    for link in LINK.findall(FENCE.sub("", text_of(page))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.is_relative_to(ROOT) or not target.is_file() or (anchor and anchor not in anchors_of(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("command", FIRST_OF, ids=lambda command: f"{FIRST_OF[command]}: {command}")
def test_command_parses(command: str) -> None:
    """A make target exists; a program and its flags exist; the flags and YAML of a stage parse into its dataclasses."""
    from rlhf_recipes.core.arguments import parse_arguments

    words = shlex.split(command)
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", text_of(ROOT / "Makefile"), re.MULTILINE)
        assert words[1] in targets
        return
    for place in re.findall(r"--config_file (\S+)", command):
        assert (ROOT / place).is_file()
    if words[0] == "python" and words[1].endswith(".py") and not words[1].startswith("recipes/"):
        program = text_of(ROOT / words[1])
        assert all(f'"{word}"' in program for word in words if word.startswith("--"))
        return
    found = RECIPE.match(" ".join(word for word in words if "=" not in word or word.startswith("--")))
    if found is None:  # `accelerate launch --mixed_precision bf16`: options of the launcher without a stage
        assert words[:2] == ["accelerate", "launch"] and not any(".py" in word for word in words)
        return
    stage = found[1] or found[2] or found[3]
    assert stage in STAGES
    flags = [str(ROOT / word) if word.endswith(".yaml") else word for word in shlex.split(found[4] or "")]
    if flags == ["--help"]:
        return
    types = dataclasses_of(stage)
    assert len(parse_arguments(*types, argv=flags)) == len(types)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_blocks_parse_and_their_imports_exist(page: Path) -> None:
    blocks = [body for language, body in FENCE.findall(text_of(page)) if language == "python"]
    for block in blocks:
        if block.startswith(OTHER_LIBRARY):
            continue
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rlhf_recipes"):
                module = import_module(str(node.module))
                assert [
                    alias.name for alias in node.names if alias.name != "*" and not hasattr(module, alias.name)
                ] == []


@pytest.mark.parametrize("page", [page for page in PAGES if name_of(page) not in OLD_NAMES], ids=name_of)
def test_names_in_backticks_exist(page: Path) -> None:
    """Dotted names of the package, imports, files of the repository and tests exist."""
    missing = []
    for code in CODE.findall(FENCE.sub("", text_of(page))):
        for dotted in re.findall(r"^(?:from )?rlhf_recipes(?:\.\w+)+(?:[:.]\w+| import \w+)?$", code):
            missing += [] if dotted_name_exists(dotted.removeprefix("from ")) else [code]
        if re.fullmatch(r"(?:src|tests|recipes|benchmarks|accelerate_configs|docs)/[\w./-]+", code):
            missing += [] if (ROOT / code).exists() or "/." in code else [code]  # ignored by git: made at run time
        elif re.fullmatch(r"[a-z_]+/(?:[a-z_0-9]+/)*[a-z_0-9]+\.py", code):
            missing += [] if (SOURCE / code).is_file() else [code]
        if re.fullmatch(r"test_\w+(\.py)?", code):
            missing += [] if code in names_of_tests() or code in files_of_tests() else [code]
    assert missing == []


def dotted_name_exists(dotted: str) -> bool:
    """`rlhf_recipes.a.b`, `rlhf_recipes.a:b` and `rlhf_recipes.a import b`; the last part may be an attribute."""
    parts = re.split(r"[.:]| import ", dotted)
    for end in range(len(parts), 0, -1):
        try:
            value: Any = import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        return all(hasattr(value, name) and (value := getattr(value, name)) is not None for name in parts[end:])
    return False


@cache
def names_of_tests() -> frozenset[str]:
    """Return the names of all test functions."""
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "tests").rglob("test_*.py"))
    functions = (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    return frozenset(node.name for node in functions if node.name.startswith("test_"))


@cache
def files_of_tests() -> frozenset[str]:
    return frozenset(path.name for path in (ROOT / "tests").rglob("test_*.py"))


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "quickstart"])
def test_options_of_a_stage_page_exist(stage: str) -> None:
    """Each option in the first column of a stage's tables of options is an argument of the stage."""
    page = ROOT / "docs" / f"{stage}.md"
    named = {
        name.removeprefix("--")
        for cells in table_rows(page, "Options")
        for name in CODE.findall(cells[0])
        if re.fullmatch(r"(--)?[a-z_0-9]+", name)
    }
    assert len(named) >= 5
    assert named - argument_names(stage) == set()


def test_metrics_of_eval_page_are_those_that_eval_reports() -> None:
    from rlhf_recipes.evaluation import METRICS

    documented = {name for cells in table_rows(ROOT / "docs/eval.md", "Metrics") for name in CODE.findall(cells[0])}
    assert {name for name in documented if "<" not in name} == set(METRICS)


def test_hints_of_ppo_page_are_those_that_ppo_logs() -> None:
    """The names in the table of hints appear in the code that logs them."""
    hints = [cells[0].strip("*") for cells in table_rows(ROOT / "docs/ppo.md", "Hints")]
    code = text_of(SOURCE / "ppo" / "logging" / "hints.py")
    assert len(hints) >= 11 and [hint for hint in hints if f'"{hint}"' not in code] == []


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    """The pages that people read are in mkdocs.yml, each once, and no entry is missing from the repository."""
    import yaml

    config = yaml.safe_load(text_of(ROOT / "mkdocs.yml"))
    listed = [value for item in config["nav"] for value in leaves(item)]
    assert sorted(listed) == sorted(name_of(page) for page in PAGES)
    assert config["theme"]["font"] is False


def leaves(item: Any) -> Iterator[str]:
    """Yield the paths of an entry of the navigation."""
    if isinstance(item, str):
        yield item
    else:
        for value in item.values():
            for inner in value if isinstance(value, list) else [value]:
                yield from leaves(inner)


def test_guarantees_name_their_tests() -> None:
    """Each guarantee of PPO is listed with at least one test."""
    rows = list(table_rows(ROOT / "docs/ppo.md", "Guarantees"))
    assert len(rows) >= 26
    assert [cells[0] for cells in rows if not re.search(r"`test_\w+`", cells[-1])] == []


@pytest.mark.slow
def test_python_examples_of_ppo_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_model: Any, make_reward_model: Any, tokenizer: Any
) -> None:
    """The blocks of docs/ppo.md run in order, with models under the names that they use."""
    monkeypatch.chdir(tmp_path)
    for name, model in (("sft", make_model()), ("reward", make_reward_model())):
        model.save_pretrained(f"out/{name}")
        tokenizer.save_pretrained(f"out/{name}")
    names: dict[str, Any] = {}
    for language, body in FENCE.findall(text_of(ROOT / "docs/ppo.md")):
        if language == "python":
            exec(body, names)
    saved = {path.name for path in (tmp_path / "out").iterdir()}
    assert saved >= {"short", "several", "lora", "long", "own"}


def test_diagram_shows_every_room_on_its_floor() -> None:
    """The diagram of docs/architecture.md has the rooms and floors of rooms.py."""
    import rooms

    shown: dict[str, int] = {}
    floor = -1
    for line in text_of(ROOT / "docs" / "architecture.md").splitlines():
        if start := re.match(r"floor (\d+)", line):
            floor = int(start[1])
            shown |= dict.fromkeys(re.findall(r"([a-z]+)/ ", f"{line} "), floor)
    assert shown == rooms.FLOOR_OF | {"recipes": len(rooms.FLOORS)}


def test_update_is_explained_in_ten_files() -> None:
    rows = list(table_rows(ROOT / "docs/architecture.md", "One PPO update in ten files"))
    numbered = [cells for cells in rows if cells[0].isdigit()]
    assert [int(cells[0]) for cells in numbered] == list(range(1, 11))
