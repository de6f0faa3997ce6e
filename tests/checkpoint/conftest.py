"""One run that nothing disturbed, for all tests here to be compared with or to be damaged as a copy."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoint.runs import Run


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder, with the checkpoints of steps 2, 4 and 6."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    with Run(out, "train.save_every=2", "train.keep_last=3") as run:
        assert run.end() == 0, run.said
    return out
