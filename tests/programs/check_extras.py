"""Resolve every extra against constraints.txt, and every lower bound of pyproject.toml: `make check-extras`.

Needs the network, for the metadata of packages only: nothing is installed. Exits with 1 and one line for each extra that
does not resolve and for each lower bound that cannot be reached, because another dependency requires a newer release.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
PYTHONS = ("3.10", "3.11", "3.12")
# Often installed beside this package. A resolver that finds no recent release falls back to one years old; the bounds
# make that an error.
COMPANIONS = ("gradio>=6", "trackio>=0.30", "wandb>=0.25", "tensorboard>=2.18")


def resolve(python: str, *options: str, extras: list[str], more: tuple[str, ...] = ()) -> dict[str, str]:
    """Return the version of each package that a resolver chooses for the project with `extras`, by canonical name.

    Raises:
        RuntimeError: nothing satisfies all requirements; the message is the resolver's.
    """
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate"]
    command += ["--no-python-downloads", "--python-version", python, *options]
    command += [word for extra in extras for word in ("--extra", extra)] + ["pyproject.toml", "-"]
    result = subprocess.run(
        command, cwd=ROOT, input="\n".join(more), capture_output=True, text=True, env=os.environ | {"NO_COLOR": "1"}
    )
    if result.returncode:
        raise RuntimeError(" ".join(result.stderr.split()))
    pairs = re.findall(r"^([\w.-]+)==(\S+)", result.stdout, re.MULTILINE)
    return {canonicalize_name(name): version for name, version in pairs}


def unreachable(python: str, extra: str | None) -> list[str]:
    """Return a line for each lower bound that the lowest resolution exceeds."""
    lines = [*PROJECT["dependencies"], *(EXTRAS[extra] if extra else [])]
    chosen = resolve(python, "--resolution", "lowest-direct", extras=[extra] if extra else [])
    problems = []
    for requirement in map(Requirement, lines):
        if requirement.marker and not requirement.marker.evaluate({"python_version": python}):
            continue
        floor = next(part.version for part in requirement.specifier if part.operator == ">=")
        version = chosen[canonicalize_name(requirement.name)]
        # A resolver takes the lowest release that exists, so 2.0.0 for >=2.
        if not Requirement(f"x=={floor}").specifier.contains(version):
            problems.append(f"Python {python}: {requirement} resolves to {version}; raise the lower bound")
    return problems


def main() -> int:
    """Resolve all of it; return 1 if anything fails."""
    problems: list[str] = []
    groups = [[extra] for extra in EXTRAS] + [list(EXTRAS)]
    for python in PYTHONS:
        started = time.monotonic()
        for extras in groups:
            try:
                chosen = resolve(python, "-c", "constraints.txt", extras=extras)
                if len(extras) > 1:
                    chosen = resolve(python, "-c", "constraints.txt", extras=extras, more=COMPANIONS)
                    names = [Requirement(companion).name for companion in COMPANIONS]
                    print(f"Python {python}:", *(f"{name} {chosen[name]}" for name in names))
            except RuntimeError as error:
                problems.append(f"Python {python}, extras {', '.join(extras)}: {error}")
        for extra in (None, *EXTRAS):
            try:
                problems += unreachable(python, extra)
            except RuntimeError as error:
                problems.append(f"Python {python}, lower bounds, extra {extra}: {error}")
        print(f"Python {python}: {len(EXTRAS)} extras, {time.monotonic() - started:.0f} s")
    print("\n".join(dict.fromkeys(problems)) or "Every extra resolves and every lower bound can be reached.")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
