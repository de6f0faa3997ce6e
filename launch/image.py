"""Installs the project in the Dockerfile: its requirements on top of the base image's own torch, which must not change.

`install PYPROJECT` records the base's versions of PACKAGES and installs the project's dependencies under these
constraints, without torch, whose pin is for machines without a base image. `verify` fails if a recorded version has
changed since.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

PACKAGES = re.compile(r"torch.*|triton|transformer[-_]engine.*|apex|flash[-_]attn.*|numpy|nvidia[-_].*")
"""Packages that were built for each other: another version of one breaks the others."""
RECORD = Path(__file__).with_name("base.txt")


def base_packages() -> list[str]:
    """Return `name==version` of each, from the installed metadata; `pip freeze` would name wheels that are gone."""
    found = {d.name: d.version for d in distributions() if PACKAGES.fullmatch(d.name.lower())}
    return [f"{name}=={version}" for name, version in sorted(found.items())]


def install(pyproject: Path) -> None:
    """Install the project's dependencies with the base's packages pinned."""
    before = base_packages()
    if not any(line.startswith("torch==") for line in before):
        sys.exit("the base image has no torch: take one of NVIDIA's PyTorch images as BASE_IMAGE")
    RECORD.write_text("\n".join(before) + "\n")
    project = tomllib.loads(pyproject.read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["hf"], *extras["megatron"]]
    wanted = [line for line in wanted if re.split(r"[^A-Za-z0-9_-]", line)[0] != "torch"]
    # Replaces the base's own PIP_CONSTRAINT, which pins far more than must stay.
    pip = ["env", f"PIP_CONSTRAINT={RECORD}", sys.executable, "-m", "pip", "install", "--no-cache-dir"]
    subprocess.run([*pip, *wanted, "setuptools>=77"], check=True)


def verify() -> None:
    """Fail if a package of the base has changed."""
    before, now = set(RECORD.read_text().split()), set(base_packages())
    if before - now:
        sys.exit(f"changed since the base image: {', '.join(sorted(before - now))}")


if __name__ == "__main__":
    if sys.argv[1] == "install":
        install(Path(sys.argv[2]))
    else:
        verify()
