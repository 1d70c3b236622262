"""The virtual environment that heareval runs in.

heareval 2021.1.3 pins numpy 1.19.2 and numba 0.48, which no current Python can install, so it cannot be an ordinary
dependency of this project. It does not really need them: installed without its dependencies, beside the versions in
kit-requirements.txt, it runs with a few patches (see `evaluation.kit`).
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import venv
from pathlib import Path

from hear_encoders.files import atomic_write, read_json, write_json

ROOT = Path(__file__).parents[1]
REQUIREMENTS = Path(__file__).parent / "kit-requirements.txt"
CONSTRAINTS = ROOT / "constraints.txt"
HEAREVAL = "heareval==2021.1.3"
DEFAULT_ENVIRONMENT = ".heareval"
STAMP_FILE = "kit.json"


def setup(environment: Path) -> bool:
    """Create the environment, or complete an unfinished or outdated one.

    Args:
        environment: its folder: new, empty, or a virtual environment.

    Returns:
        False if it was already complete and its requirements have not changed since.

    Raises:
        ValueError: the folder holds something else.
        subprocess.CalledProcessError: pip failed, and has printed why.
    """
    stamp, stamp_file = {"requirements": _requirements_hash()}, environment / STAMP_FILE
    if stamp_file.is_file() and read_json(stamp_file) == stamp:
        return False
    if environment.exists() and any(environment.iterdir()) and not (environment / "pyvenv.cfg").is_file():
        raise ValueError(f"{environment} is not a virtual environment, and not empty")
    if not python(environment).is_file():
        venv.create(environment, with_pip=True)
    constraints = environment / "constraints.txt"
    with atomic_write(constraints) as file:
        file.write(other_constraints(CONSTRAINTS.read_text(), REQUIREMENTS.read_text()).encode())
    # -I ignores PYTHONPATH: with this checkout on it, pip would believe that the project is installed.
    pip = [str(python(environment)), "-I", "-m", "pip", "install", "--disable-pip-version-check"]
    subprocess.run([*pip, "-r", str(REQUIREMENTS), "-c", str(constraints)], check=True)
    subprocess.run([*pip, "--no-deps", HEAREVAL], check=True)
    subprocess.run([*pip, str(ROOT), "-c", str(constraints)], check=True)
    write_json(stamp_file, stamp)
    return True


def python(environment: Path) -> Path:
    """Return the path of a virtual environment's interpreter."""
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def check(environment: Path) -> None:
    """Raise FileNotFoundError unless `setup` has completed this environment."""
    if not (environment / STAMP_FILE).is_file():
        raise FileNotFoundError(
            f"{environment} is not a complete heareval environment: run `python -m evaluation setup {environment}`"
        )


def other_constraints(constraints: str, requirements: str) -> str:
    """Return the lines of `constraints` whose packages `requirements` does not pin."""
    pinned = {_package(line) for line in requirements.splitlines() if "==" in line.partition("#")[0].partition(";")[0]}
    kept = [line for line in constraints.splitlines() if _package(line) and _package(line) not in pinned]
    return "\n".join(kept) + "\n"


def _package(line: str) -> str:
    """Return the normalized package name at the start of a requirements line; empty for a comment."""
    name = re.match(r"[\w.-]*", line).group()
    return re.sub(r"[-_.]+", "-", name).lower()


def _requirements_hash() -> str:
    digest = hashlib.sha256(HEAREVAL.encode())
    for path in (REQUIREMENTS, CONSTRAINTS, ROOT / "pyproject.toml"):
        digest.update(path.read_bytes())
    return digest.hexdigest()
