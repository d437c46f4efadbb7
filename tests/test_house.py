"""The rules of the house that are not about imports: lengths, one word, a light entrance, plain words."""

import ast
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "rlhf_recipes"
STAGES = SOURCE / "stages"
CONFIGS = ROOT / "recipes" / "configs"

DOOR_LINES, FILE_LINES, FUNCTION_LINES = 45, 300, 60
SOURCE_FILES = sorted(SOURCE.rglob("*.py"))
DOOR_FILES = sorted((ROOT / "recipes").glob("*.py"))
STAGE_WORDS = sorted(path.stem for path in STAGES.glob("*.py") if not path.stem.startswith("_"))
RUN_YAMLS = sorted(CONFIGS.glob("*/*.yaml"))
NEEDS_NO_YAML = {"push", "quickstart"}  # two flags are all there is to say; its defaults are the run

WHERE = set(
    "compute_environment distributed_type use_cpu gpu_ids num_machines num_processes main_process_port machine_rank "
    "main_process_ip rdzv_backend same_network fsdp_config deepspeed_config".split()
)
WHAT = {"gradient_clipping", "gradient_accumulation_steps", "train_batch_size", "mixed_precision"}  # inside those two
HEAVY = {"accelerate", "datasets", "matplotlib", "numpy", "peft", "sklearn", "torch", "transformers", "trl"}

# Written as patterns that do not match themselves, so that this file needs no exception.
PRIVATE_WORDS = re.compile(
    r"/wor[k]/|/tm[p]/brief|/roo[t]/|/opt/pyp[i]|\bshared/(dat[a]|desig[n]|hook[s])|before-sto[p]"
)
TEXT_SUFFIXES = set(".cfg .css .html .jinja .js .json .md .py .svg .toml .txt .yaml .yml".split()) | {""}
HOUSE_FOLDERS = ("src", "recipes", "tests", "docs", "benchmarks", "accelerate_configs", ".ci", ".github")


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def functions_of(path: Path) -> Iterator[tuple[str, int]]:
    """Yields (name, lines) of each function of a file, methods and inner functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


def house_files() -> list[Path]:
    """Every text file that belongs to the project: the house's folders, and what lies beside them; nothing that is made."""
    below = (path for folder in HOUSE_FOLDERS for path in (ROOT / folder).rglob("*"))
    beside = (path for path in ROOT.iterdir() if path.name != ".git")
    return [
        path
        for path in (*below, *beside)
        if path.is_file() and path.suffix in TEXT_SUFFIXES and not {"__pycache__", ".venvs", "logs"} & set(path.parts)
    ]


def test_files_and_doors_stay_short() -> None:
    long_files = {str(path.relative_to(ROOT)): lines_of(path) for path in SOURCE_FILES if lines_of(path) > FILE_LINES}
    long_doors = {path.name: lines_of(path) for path in DOOR_FILES if lines_of(path) > DOOR_LINES}
    assert len(SOURCE_FILES) > 25 and len(DOOR_FILES) >= 7
    assert (long_files, long_doors) == ({}, {})


def test_functions_stay_short() -> None:
    sizes = {
        f"{path.relative_to(ROOT)}:{name}": lines
        for path in (*SOURCE_FILES, *DOOR_FILES)
        for name, lines in functions_of(path)
    }
    assert len(sizes) > 100
    assert {name: lines for name, lines in sizes.items() if lines > FUNCTION_LINES} == {}


def test_one_word_opens_four_doors() -> None:
    """A stage, its recipe, a YAML that feeds it and its test carry the same word."""
    doors = [path.stem for path in DOOR_FILES]
    assert doors == STAGE_WORDS and len(doors) >= 7
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests" / "stages").glob("test_*.py")}
    assert set(doors) - tests == set()
    fed = {path.stem for path in RUN_YAMLS}
    assert set(doors) - fed - NEEDS_NO_YAML == set()
    assert fed - set(doors) == set(), "a YAML is named after the recipe that it feeds"


@pytest.mark.parametrize("word", STAGE_WORDS)
def test_a_stage_tells_its_story_under_its_own_name(word: str) -> None:
    """`stages/<word>.py` defines `run_<word>` and one `...Arguments`, and its door calls that function."""
    tree = ast.parse((STAGES / f"{word}.py").read_text(encoding="utf-8"))
    assert f"run_{word}" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    arguments = [node.name for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Arguments")]
    assert len(arguments) == 1
    door = ast.parse((ROOT / "recipes" / f"{word}.py").read_text(encoding="utf-8"))
    called = [node.func for node in ast.walk(door) if isinstance(node, ast.Call)]
    assert f"run_{word}" in {function.id for function in called if isinstance(function, ast.Name)}
    assert ast.get_docstring(door), "a door is a plate: In, Out, Launch, Next"


def dataclasses_of(word: str) -> list[type]:
    """The dataclasses that a stage is called with, in order: what its door and `python -m rlhf_recipes` parse."""
    run = getattr(importlib.import_module(f"rlhf_recipes.stages.{word}"), f"run_{word}")
    return [hint for name, hint in get_type_hints(run).items() if name != "return"]


@pytest.mark.parametrize("word", STAGE_WORDS)
def test_a_door_parses_what_its_stage_is_called_with(word: str) -> None:
    door = ast.parse((ROOT / "recipes" / f"{word}.py").read_text(encoding="utf-8"))
    (parsing,) = [
        node for node in ast.walk(door) if isinstance(node, ast.Call) and ast.unparse(node.func) == "parse_arguments"
    ]
    assert [ast.unparse(argument) for argument in parsing.args] == [kind.__name__ for kind in dataclasses_of(word)]


@pytest.mark.parametrize("path", RUN_YAMLS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_yaml_is_understood(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each key of each shipped YAML arrives in the dataclasses of its stage; parsing alone leaves nothing behind."""
    from rlhf_recipes.core.arguments import parse_arguments, requested_values

    monkeypatch.chdir(tmp_path)
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    arguments = parse_arguments(*dataclasses_of(path.stem), argv=["--config", str(path)])
    assert set(requested_values(*arguments)) == set(written) and len(written) > 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", sorted({path.parent for path in RUN_YAMLS}), ids=lambda folder: folder.name)
def test_a_run_tells_how_to_repeat_it(folder: Path) -> None:
    """The README beside the YAMLs of a run gives the launch line of each."""
    told = (folder / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in sorted(folder.glob("*.yaml")) if f"{folder.name}/{path.name}" not in told] == []


def test_the_package_opens_without_its_libraries() -> None:
    """A fresh interpreter that imports the package has loaded none of the heavy libraries."""
    program = "import json, sys, rlhf_recipes; print(json.dumps(sorted(sys.modules)))"
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=SOURCE.parent, capture_output=True, text=True, check=True
    )
    loaded = set(json.loads(answer.stdout))
    assert "rlhf_recipes" in loaded
    assert loaded & HEAVY == set()


def test_the_project_speaks_of_itself_alone() -> None:
    """No file names a place that exists on one machine only."""
    files = house_files()
    assert len(files) > 60
    told = {
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in files
        for match in PRIVATE_WORDS.finditer(path.read_text(encoding="utf-8", errors="replace"))
    }
    assert told == set()


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_launch_file_says_where_and_never_what(path: Path) -> None:
    """Accelerate's own parser takes it, and precision or accumulation, which change what is learnt, are not in it."""
    from accelerate.commands.config.config_args import load_config_from_file

    asked = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert set(asked) <= WHERE
    assert not WHAT & {*asked.get("fsdp_config", {}), *asked.get("deepspeed_config", {})}
    assert load_config_from_file(str(path)).num_processes == asked["num_processes"]


def test_every_mutation_has_its_one_place() -> None:
    """Else `make mutations` would break nothing, and call it noticed or not."""
    import mutations

    astray = [each.name for each in mutations.MUTATIONS if (SOURCE / each.file).read_text().count(each.old) != 1]
    assert not astray
