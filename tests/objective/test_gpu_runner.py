"""What `make test-gpu` makes of a part's tests, from pytest's own report of such tests."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from tests.gpu import __main__ as runner

TESTS = """
import pytest

def test_good(): ...

@pytest.mark.skip(reason="one card")
def test_skipped(): ...

def test_bad():
    assert False
"""


PLAIN = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def outcome(folder: Path) -> runner.Outcome:
    (folder / "test_part.py").write_text(TESTS)
    report = folder / "report.xml"
    words = ["-m", "pytest", "-p", "no:cacheprovider", f"--junit-xml={report}", "test_part.py"]
    subprocess.run([sys.executable, *words], cwd=folder, env=PLAIN, capture_output=True, check=False)
    return runner.read("part", report, 2.0)


def test_a_part_is_whole_where_every_test_ran_and_passed(tmp_path: Path):
    failed = outcome(tmp_path)
    whole = replace(failed, failed=0, skipped=0)
    skipped = replace(whole, skipped=1)
    assert [each.good for each in (failed, skipped, whole)] == [False, True, True]
    assert [each.whole for each in (failed, skipped, whole)] == [False, False, True]
    assert [" ".join(str(each).split()) for each in (failed, whole)] == [
        "FAILED part 1 passed, 1 skipped, 1 failed, 2 s",
        "passed part 3 passed, 0 skipped, 0 failed, 2 s",
    ]


def test_a_part_without_a_report_broke_off(tmp_path: Path):
    broken = runner.read("part", tmp_path / "none.xml", 480.0)
    assert not broken.good
    assert str(broken).endswith("broke off, 480 s")


def test_every_file_is_a_part():
    files = {runner.file_of(part) for part in runner.PARTS}
    assert files == {f"tests/gpu/{file.name}" for file in Path(runner.__file__).parent.glob("test_*.py")}
