"""The virtual environment that heareval runs in.

heareval 2021.1.3 pins numpy 1.19.2 and numba 0.48, which no current Python installs, so it cannot share this
project's environment as an ordinary dependency. Its pins are only on paper: installed without its dependencies, beside
the versions in kit-requirements.txt, it runs (see `evaluation.kit` for what it needs besides).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import venv
from pathlib import Path

from hear_encoders.files import atomic_write, write_json

ROOT = Path(__file__).parents[1]
REQUIREMENTS = Path(__file__).parent / "kit-requirements.txt"
CONSTRAINTS = ROOT / "constraints.txt"
HEAREVAL = "heareval==2021.1.3"
DEFAULT_ENVIRONMENT = ".heareval"
STAMP_FILE = "kit.json"


def setup(environment: Path) -> bool:
    """Make the environment, or complete one that was begun.

    Args:
        environment: its directory. Nothing but a virtual environment may be there.

    Returns:
        False where it was complete already, for the same lists of requirements.

    Raises:
        ValueError: the directory holds something else.
        subprocess.CalledProcessError: pip failed; it has said why.
    """
    stamp, stamp_file = {"requirements": _requirements_hash()}, environment / STAMP_FILE
    if stamp_file.is_file() and json.loads(stamp_file.read_text()) == stamp:
        return False
    if environment.exists() and any(environment.iterdir()) and not (environment / "pyvenv.cfg").is_file():
        raise ValueError(f"{environment} is not empty and not a virtual environment")
    if not python(environment).is_file():
        venv.create(environment, with_pip=True)
    constraints = environment / "constraints.txt"
    with atomic_write(constraints) as file:
        file.write(other_constraints(CONSTRAINTS.read_text(), REQUIREMENTS.read_text()).encode())
    # -I: without PYTHONPATH, where pip would find this checkout and take the project for installed.
    pip = [str(python(environment)), "-I", "-m", "pip", "install", "--disable-pip-version-check"]
    subprocess.run([*pip, "-r", str(REQUIREMENTS), "-c", str(constraints)], check=True)
    subprocess.run([*pip, "--no-deps", HEAREVAL], check=True)
    subprocess.run([*pip, str(ROOT), "-c", str(constraints)], check=True)
    write_json(stamp_file, stamp)
    return True


def python(environment: Path) -> Path:
    """The interpreter of a virtual environment."""
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def check(environment: Path) -> None:
    """Raise FileNotFoundError where `setup` has not made this environment, or has not finished it."""
    if not (environment / STAMP_FILE).is_file():
        raise FileNotFoundError(
            f"{environment} is not an environment for heareval: make it with `python -m evaluation setup {environment}`"
        )


def other_constraints(constraints: str, requirements: str) -> str:
    """The lines of `constraints` about packages that `requirements` does not pin itself."""
    pinned = {_package(line) for line in requirements.splitlines() if "==" in line.partition("#")[0].partition(";")[0]}
    kept = [line for line in constraints.splitlines() if _package(line) and _package(line) not in pinned]
    return "\n".join(kept) + "\n"


def _package(line: str) -> str:
    """The normalised name that a line of requirements begins with; empty for a comment."""
    name = re.match(r"[\w.-]*", line).group()
    return re.sub(r"[-_.]+", "-", name).lower()


def _requirements_hash() -> str:
    digest = hashlib.sha256(HEAREVAL.encode())
    for path in (REQUIREMENTS, CONSTRAINTS, ROOT / "pyproject.toml"):
        digest.update(path.read_bytes())
    return digest.hexdigest()
