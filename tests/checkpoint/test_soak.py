"""A short soak: a rank killed in a save and one at a random moment; `make soak` kills thirty."""

from __future__ import annotations

import random
from pathlib import Path

from tests.checkpoint.runs import STEPS
from tests.checkpoint.soak import differences, finish, kill_once


def test_a_run_whose_ranks_are_killed_ends_with_the_same_bits(undisturbed: Path, tmp_path: Path):
    out, rng = tmp_path / "killed", random.Random(4)
    kills = [kill_once(out, STEPS, moment, rng) for moment in ("in a save", "in a step")]
    assert all(kills)
    finish(out, STEPS)
    assert differences(out, undisturbed, STEPS) == []
