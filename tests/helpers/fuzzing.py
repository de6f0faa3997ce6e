"""How long the fuzzers run: FUZZ_SECONDS in the environment; left out, as long as a test may take."""

from __future__ import annotations

import os


def examples(usual: int, a_second: int = 30) -> int:
    """Return the number of hypothesis' examples: `usual`, or as many as fit into FUZZ_SECONDS at `a_second`."""
    seconds = os.environ.get("FUZZ_SECONDS")
    return max(usual, int(float(seconds) * a_second)) if seconds else usual
