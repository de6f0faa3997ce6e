"""Configs are converted at the repository's root, without the environment variables that LLaMA-Factory reads."""

from __future__ import annotations

import pytest

from tests.helpers.commands import ROOT


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch):
    """LLaMA-Factory's paths, as ours, are relative to the current folder."""
    monkeypatch.chdir(ROOT)
    for name in ("BFT_GROUP_SIZE", "BFT_CONF_GAMMA", "USE_MCA", "USE_MEGATRON_BRIDGE"):
        monkeypatch.delenv(name, raising=False)
