"""One run that nothing disturbed, for all tests here to be compared with or to be damaged as a copy."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.background import arguments
from tests.helpers.commands import run_command


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder, with the checkpoints of steps 2, 4 and 6."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        assert run_command(patch, *arguments(out, "train.save_every=2", "train.keep_last=3")) == 0
    return out
