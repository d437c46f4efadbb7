"""The package as others install it: version bounds, pins, console command, wheel, citation, templates.

`make check-extras` adds what needs the network: that every extra resolves, and that every lower bound can be reached.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import rlhf_recipes
from rlhf_recipes.__main__ import STAGES, main

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CORE = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = {extra: [Requirement(line) for line in lines] for extra, lines in PROJECT["optional-dependencies"].items()}
PINS = {
    canonicalize_name(pin.name): pin
    for pin in map(
        Requirement,
        re.findall(r"^[^#\s].*$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE),
    )
}
# What constraints.txt must leave possible for packages that are often installed beside this one. gradio 6 and trackio,
# which needs gradio's client, refuse pillow 13; a resolver then falls back to releases that are years old.
COMPANION_LIMITS = ("pillow<13", "huggingface-hub>=1.16,<3", "numpy>=1,<3", "pandas>=1,<4", "protobuf>=5,<8")


def pinned(name: str) -> str:
    """Return the version that constraints.txt pins for a package."""
    return next(iter(PINS[canonicalize_name(name)].specifier)).version


def declared() -> list[Requirement]:
    """Return the direct dependencies, those of the extras included, that apply to Python 3.11 on this platform."""
    everything = CORE + [requirement for lines in EXTRAS.values() for requirement in lines]
    return [each for each in everything if not each.marker or each.marker.evaluate({"python_version": "3.11"})]


def test_every_dependency_has_a_lower_bound_and_a_core_one_an_upper_bound() -> None:
    everything = {"": CORE} | EXTRAS
    without = [
        f"{extra}: {requirement}"
        for extra, requirements in everything.items()
        for requirement in requirements
        if not any(part.operator == ">=" for part in requirement.specifier)
    ]
    unlimited = [str(each) for each in CORE if not any(part.operator == "<" for part in each.specifier)]
    assert (without, unlimited) == ([], [])
    assert len(CORE) > 15 and len(EXTRAS) >= 6 and all(EXTRAS.values())


def test_pins_are_exact_and_inside_the_declared_ranges() -> None:
    assert [str(pin) for pin in PINS.values() if [part.operator for part in pin.specifier] != ["=="]] == []
    outside = [
        f"{requirement} against {pinned(requirement.name)}"
        for requirement in declared()
        if canonicalize_name(requirement.name) in PINS and not requirement.specifier.contains(pinned(requirement.name))
    ]
    assert outside == []


def test_every_dependency_of_the_tests_is_pinned() -> None:
    names = {canonicalize_name(requirement.name) for requirement in (*CORE, *EXTRAS["dev"], *EXTRAS["tensorboard"])}
    assert names - set(PINS) - {"tomli"} == set(), "tomli is for Python 3.10, the pins are for 3.11"


@pytest.mark.parametrize("limit", COMPANION_LIMITS)
def test_pins_leave_room_for_common_companions(limit: str) -> None:
    requirement = Requirement(limit)
    assert requirement.specifier.contains(pinned(requirement.name))


def test_the_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert PROJECT["version"] == rlhf_recipes.__version__ == citation["version"]
    assert Version(PROJECT["version"]).release and citation["license"] == PROJECT["license"]


def test_the_citation_has_what_the_format_requires() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert [set(author) & {"name", "family-names"} for author in citation["authors"]]


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_an_issue_form_is_valid(name: str) -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= set(form)
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields) > 3
    assert all(field["attributes"]["label"] for field in fields)
    stages = [field["attributes"]["options"] for field in fields if field["id"] == "stage"]
    assert all(set(STAGES) <= set(options) for options in stages) and len(stages) == (name == "bug")


def test_every_make_target_is_described_and_every_command_of_contributing_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())  # type: ignore[index]
    described = set(re.findall(r"^([a-z-]+):.*## \S", makefile, re.MULTILINE))
    assert phony == described and len(phony) > 12
    shown = set(re.findall(r"^make ([a-z-]+)", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert shown <= phony and {"test", "test-all", "test-oldest", "test-newest", "check", "docs"} <= shown


def test_the_workflow_calls_make_targets_that_exist() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    targets = set(re.findall(r"^(?:step )?make ([a-z-]+)", "\n".join([*commands, script]), re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets <= set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    assert {"test", "test-slow", "test-oldest", "test-newest", "docs", "check", "quickstart"} <= targets


def run_cli(program: list[str], *words: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process; `path` is searched for the package first."""
    environment = os.environ | ({"PYTHONPATH": str(path)} if path else {})
    return subprocess.run([*program, *words], capture_output=True, text=True, env=environment, timeout=120)


def test_the_console_command_is_installed() -> None:
    """`pip install` puts it beside this interpreter."""
    command = shutil.which("rlhf-recipes", path=str(Path(sys.executable).parent))
    assert command, "rlhf-recipes is not installed; run make install"
    assert PROJECT["scripts"] == {"rlhf-recipes": "rlhf_recipes.__main__:main"}
    version = run_cli([command], "--version")
    assert (version.returncode, version.stdout) == (0, f"rlhf-recipes {rlhf_recipes.__version__}\n")
    unknown = run_cli([command], "trian")
    assert unknown.returncode == 2 and unknown.stderr.startswith("error: unknown stage 'trian'; choose one of ")


def test_help_names_every_stage(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for words in ([], ["-h"], ["--help"]):
        monkeypatch.setattr(sys, "argv", ["rlhf-recipes", *words])
        main()
        text = capsys.readouterr().out
        assert text.startswith("usage: rlhf-recipes STAGE") and all(stage in text for stage in STAGES)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's wheel, built offline from a copy of the sources."""
    pytest.importorskip("setuptools", minversion="77.0.1")
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    program = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", program, "out"], cwd=folder, capture_output=True, check=True, timeout=300)
    return next((folder / "out").glob("*.whl"))


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    source = ROOT / "src"
    expected = {
        (Path(folder) / name).relative_to(source).as_posix()
        for folder, _, names in os.walk(source / "rlhf_recipes", followlinks=True)  # quickstart/configs is a link
        for name in names
        if not folder.endswith("__pycache__")
    }
    names = set(zipfile.ZipFile(wheel).namelist())
    assert expected - names == set() and len(expected) > 80
    assert {name for name in names - expected if ".dist-info/" not in name} == set()


def test_the_wheel_runs_from_anywhere(wheel: Path, tmp_path: Path) -> None:
    """Unpacked where nothing else is, it starts with the console command's function and with `python -m`."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    (points,) = tmp_path.glob("*.dist-info/entry_points.txt")
    assert "rlhf-recipes = rlhf_recipes.__main__:main" in points.read_text(encoding="utf-8")
    program = "import rlhf_recipes.__main__ as cli; print(cli.__file__); cli.main()"
    by_function = run_cli([sys.executable, "-c", program], "--help", path=tmp_path)
    assert by_function.returncode == 0 and by_function.stdout.startswith(str(tmp_path))
    by_module = run_cli([sys.executable, "-m", "rlhf_recipes"], "--version", path=tmp_path)
    assert by_module.stdout == f"rlhf-recipes {rlhf_recipes.__version__}\n"


@pytest.mark.parametrize("word", ["asked", "what_was_asked", "ForTheTime", "for the\n# time", "cut weights apart"])
def test_the_search_for_dialect_finds_a_phrase(word: str, tmp_path: Path) -> None:
    """In identifiers and over a line break, too."""
    import dialect

    path = tmp_path / "page.md"
    path.write_text(f"first line\n{word}\n", encoding="utf-8")
    assert [(number, reason) for _, number, _, _, reason in dialect.hits_in(path)] == [(2, None)]


@pytest.mark.parametrize(
    "word", ["for the time being", "task", "the value_prior", "standard", "a stand-in", "override"]
)
def test_the_search_for_dialect_leaves_plain_english(word: str, tmp_path: Path) -> None:
    import dialect

    path = tmp_path / "page.md"
    path.write_text(word, encoding="utf-8")
    assert list(dialect.hits_in(path)) == []
