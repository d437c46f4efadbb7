"""Resolve every extra against constraints.txt, and every lower bound of pyproject.toml: `make check-extras`.

Needs the network, for the metadata of packages only: nothing is installed. Exits with 1 and one line for each extra that
does not resolve and for each lower bound that cannot be reached, because another dependency requires a newer release.
"""

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

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


def unresolved(python: str, extras: list[str]) -> list[str]:
    """Resolve `extras` against constraints.txt; all of them together with the companions. Returns what went wrong."""
    companions = COMPANIONS if len(extras) == len(EXTRAS) else ()
    try:
        chosen = resolve(python, "-c", "constraints.txt", extras=extras, more=companions)
    except RuntimeError as error:
        return [f"Python {python}, extras {', '.join(extras)}: {error}"]
    if companions:
        names = [Requirement(companion).name for companion in companions]
        print(f"Python {python}, all extras:", *(f"{name} {chosen[name]}" for name in names), flush=True)
    return []


def unreachable(python: str, extra: str | None) -> list[str]:
    """Return a line for each lower bound, of one extra or of the package itself, that the lowest resolution exceeds."""
    try:
        chosen = resolve(python, "--resolution", "lowest-direct", extras=[extra] if extra else [])
    except RuntimeError as error:
        return [f"Python {python}, lower bounds, {extra or 'no'} extra: {error}"]
    problems = []
    for requirement in map(Requirement, EXTRAS[extra] if extra else PROJECT["dependencies"]):
        if requirement.marker and not requirement.marker.evaluate({"python_version": python}):
            continue
        floor = next(part.version for part in requirement.specifier if part.operator == ">=")
        version = chosen[canonicalize_name(requirement.name)]
        if Version(floor) != Version(version):
            problems.append(f"Python {python}: {requirement} resolves to {version}; raise the lower bound")
    return problems


def main() -> int:
    """Resolve all of it; return 1 if anything fails."""
    started = time.monotonic()
    with ThreadPoolExecutor(8) as pool:  # the time goes into waiting for the package index
        jobs = [
            pool.submit(unresolved, python, extras) for python in PYTHONS for extras in ([extra] for extra in EXTRAS)
        ]
        jobs += [pool.submit(unresolved, python, list(EXTRAS)) for python in PYTHONS]
        jobs += [pool.submit(unreachable, python, extra) for python in PYTHONS for extra in (None, *EXTRAS)]
        problems = [line for job in jobs for line in job.result()]
    print("\n".join(problems) or "Every extra resolves and every lower bound can be reached.")
    print(f"{len(jobs)} resolutions in {time.monotonic() - started:.0f} s")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
