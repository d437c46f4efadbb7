"""Rules of the layout that are not about imports: lengths, names, a light package import, configurations."""

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

RECIPE_LINES, FILE_LINES, FUNCTION_LINES = 45, 300, 60
# One class is not split because it is long: the trainer overrides what Trainer calls, and leaves the work to its parts.
LONGER_FILES = {"src/rlhf_recipes/ppo/trainer.py": 500}
SOURCE_FILES = sorted(SOURCE.rglob("*.py"))
RECIPE_FILES = sorted((ROOT / "recipes").glob("*.py"))
STAGE_WORDS = sorted(path.stem for path in STAGES.glob("*.py") if not path.stem.startswith("_"))
RUN_YAMLS = sorted(CONFIGS.glob("*/*.yaml"))
WITHOUT_YAML = {"push", "quickstart"}  # push has two flags; the quickstart runs with its defaults

LAUNCH_OPTIONS = set(
    "compute_environment distributed_type use_cpu gpu_ids num_machines num_processes main_process_port machine_rank "
    "main_process_ip rdzv_backend same_network fsdp_config deepspeed_config".split()
)
TRAINING_OPTIONS = {
    "gradient_clipping",
    "gradient_accumulation_steps",
    "train_batch_size",
    "mixed_precision",
}  # in the FSDP and DeepSpeed parts
HEAVY = {"accelerate", "datasets", "matplotlib", "numpy", "peft", "sklearn", "torch", "transformers", "trl"}

# These patterns do not match themselves, so that this file needs no exception.
PRIVATE_WORDS = re.compile(
    r"/wor[k]/|/tm[p]/brief|/roo[t]/|/opt/pyp[i]|\bshared/(dat[a]|desig[n]|hook[s])|before-sto[p]"
)
TEXT_SUFFIXES = set(".cfg .css .html .jinja .js .json .md .py .svg .toml .txt .yaml .yml".split()) | {""}
PROJECT_FOLDERS = ("src", "recipes", "tests", "docs", "benchmarks", "accelerate_configs", ".ci", ".github")


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def functions_of(path: Path) -> Iterator[tuple[str, int]]:
    """Yield (name, lines) of each function of a file, with methods and inner functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


def project_files() -> list[Path]:
    """Return the text files of the project's folders and of its root, without generated files."""
    below = (path for folder in PROJECT_FOLDERS for path in (ROOT / folder).rglob("*"))
    beside = (path for path in ROOT.iterdir() if path.name != ".git")
    return [
        path
        for path in (*below, *beside)
        if path.is_file() and path.suffix in TEXT_SUFFIXES and not {"__pycache__", ".venvs", "logs"} & set(path.parts)
    ]


def test_files_and_recipes_are_short() -> None:
    lines = {str(path.relative_to(ROOT)): lines_of(path) for path in SOURCE_FILES}
    long_files = {name: count for name, count in lines.items() if count > LONGER_FILES.get(name, FILE_LINES)}
    long_recipes = {path.name: lines_of(path) for path in RECIPE_FILES if lines_of(path) > RECIPE_LINES}
    assert len(SOURCE_FILES) > 25 and len(RECIPE_FILES) >= 7
    assert (long_files, long_recipes) == ({}, {})


def test_functions_are_short() -> None:
    sizes = {
        f"{path.relative_to(ROOT)}:{name}": lines
        for path in (*SOURCE_FILES, *RECIPE_FILES)
        for name, lines in functions_of(path)
    }
    assert len(sizes) > 100
    assert {name: lines for name, lines in sizes.items() if lines > FUNCTION_LINES} == {}


def test_stage_recipe_yaml_and_test_share_one_word() -> None:
    """A stage, its recipe, a YAML file of it and its test have the same name."""
    recipes = [path.stem for path in RECIPE_FILES]
    assert recipes == STAGE_WORDS and len(recipes) >= 7
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests" / "stages").glob("test_*.py")}
    assert set(recipes) - tests == set()
    configured = {path.stem for path in RUN_YAMLS}
    assert set(recipes) - configured - WITHOUT_YAML == set()
    assert configured - set(recipes) == set(), "a YAML file has the name of its recipe"


@pytest.mark.parametrize("word", STAGE_WORDS)
def test_a_stage_defines_its_run_function_and_arguments(word: str) -> None:
    """`stages/<word>.py` defines `run_<word>` and one `...Arguments`, and its recipe calls that function."""
    tree = ast.parse((STAGES / f"{word}.py").read_text(encoding="utf-8"))
    assert f"run_{word}" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    arguments = [node.name for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Arguments")]
    assert len(arguments) == 1
    recipe = ast.parse((ROOT / "recipes" / f"{word}.py").read_text(encoding="utf-8"))
    called = [node.func for node in ast.walk(recipe) if isinstance(node, ast.Call)]
    assert f"run_{word}" in {function.id for function in called if isinstance(function, ast.Name)}
    assert ast.get_docstring(recipe), "a recipe needs a docstring: In, Out, Launch, Next"


def dataclasses_of(word: str) -> list[type]:
    """Return the dataclasses that a stage is called with, in order: the recipe and the console command parse them."""
    run = getattr(importlib.import_module(f"rlhf_recipes.stages.{word}"), f"run_{word}")
    return [hint for name, hint in get_type_hints(run).items() if name != "return"]


@pytest.mark.parametrize("word", STAGE_WORDS)
def test_a_recipe_parses_the_dataclasses_of_its_stage(word: str) -> None:
    recipe = ast.parse((ROOT / "recipes" / f"{word}.py").read_text(encoding="utf-8"))
    (parsing,) = [
        node for node in ast.walk(recipe) if isinstance(node, ast.Call) and ast.unparse(node.func) == "parse_arguments"
    ]
    assert [ast.unparse(argument) for argument in parsing.args] == [kind.__name__ for kind in dataclasses_of(word)]


@pytest.mark.parametrize("path", RUN_YAMLS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_yaml_file_parses(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every key sets a field of the stage's dataclasses, and parsing writes nothing."""
    from rlhf_recipes.core.arguments import parse_arguments, requested_values

    monkeypatch.chdir(tmp_path)
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    arguments = parse_arguments(*dataclasses_of(path.stem), argv=["--config", str(path)])
    assert set(requested_values(*arguments)) == set(written) and len(written) > 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", sorted({path.parent for path in RUN_YAMLS}), ids=lambda folder: folder.name)
def test_the_readme_of_a_run_names_every_yaml_file(folder: Path) -> None:
    """The README has the launch line of each."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in sorted(folder.glob("*.yaml")) if f"{folder.name}/{path.name}" not in text] == []


def test_importing_the_package_loads_no_heavy_library() -> None:
    program = "import json, sys, rlhf_recipes; print(json.dumps(sorted(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=SOURCE.parent, capture_output=True, text=True, check=True
    )
    loaded = set(json.loads(result.stdout))
    assert "rlhf_recipes" in loaded
    assert loaded & HEAVY == set()


def test_no_file_names_a_path_of_one_machine() -> None:
    files = project_files()
    assert len(files) > 60
    hits = {
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in files
        for match in PRIVATE_WORDS.finditer(path.read_text(encoding="utf-8", errors="replace"))
    }
    assert hits == set()


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_launch_configurations_hold_no_training_options(path: Path) -> None:
    """Accelerate's parser reads them. Precision or accumulation would change results, so training arguments set them."""
    from accelerate.commands.config.config_args import load_config_from_file

    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert set(settings) <= LAUNCH_OPTIONS
    assert not TRAINING_OPTIONS & {*settings.get("fsdp_config", {}), *settings.get("deepspeed_config", {})}
    assert load_config_from_file(str(path)).num_processes == settings["num_processes"]


def test_every_mutation_matches_its_file_once() -> None:
    """Otherwise `make mutations` would change nothing, or more than it says; and the tests that it runs exist."""
    import mutations

    faulty = [each.name for each in mutations.MUTATIONS if (SOURCE / each.file).read_text().count(each.old) != 1]
    files = {file for each in mutations.MUTATIONS for file in each.files} | set(mutations.ARITHMETIC)
    assert faulty == [] and [file for file in sorted(files) if not (ROOT / file).is_file()] == []


def test_tests_are_named_by_behaviour() -> None:
    """A test's name says what holds, not the number of an item in a list."""
    names = [name for path in (ROOT / "tests").rglob("test_*.py") for name, _ in functions_of(path)]
    assert len(names) > 800
    assert [name for name in names if re.match(r"test_points?_\d", name)] == []
