"""constraints.txt is a lock of pyproject.toml: one exact version of everything that is asked for, within its range."""

from __future__ import annotations

import re
import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers.commands import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LINES = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
ASKED = [
    *PROJECT["project"]["dependencies"],
    *PROJECT["project"]["optional-dependencies"]["hf"],
    *PROJECT["project"]["optional-dependencies"]["megatron"],
    *PROJECT["dependency-groups"]["dev"],
    *PROJECT["dependency-groups"]["docs"],
]


def test_every_line_is_one_exact_version():
    locked = [Requirement(line) for line in LINES]
    assert all(r.url is None and [s.operator for s in r.specifier] == ["=="] for r in locked)
    names = [canonicalize_name(r.name) for r in locked]
    assert len(names) == len(set(names))


def test_everything_that_is_asked_for_is_locked_within_its_range():
    locked = {canonicalize_name(name): version for name, version in (line.split("==") for line in LINES)}
    for text in ASKED:
        wanted = Requirement(text)
        assert wanted.specifier.contains(locked[canonicalize_name(wanted.name)]), text


def test_the_lowest_that_is_asked_for_is_what_the_core_tests_run_on():
    """`make test-torch`, by its defaults in the Makefile."""
    makefile = (ROOT / "Makefile").read_text()
    project = PROJECT["project"]
    words = [*project["dependencies"], *project["optional-dependencies"]["hf"]]
    asked = {r.name: r.specifier for r in map(Requirement, words)}
    tested = dict(re.findall(r"(transformers|datasets)==([\d.]+)", re.search(r"^LOWEST \?= (.*)$", makefile, re.M)[1]))
    tested["torch"] = re.search(r"^TORCH \?= (.*)$", makefile, re.M)[1]
    assert len(tested) == 3
    for name, release in tested.items():
        [lowest] = [s.version for s in asked[name] if s.operator == ">="]
        assert release == f"{lowest}.0", name
