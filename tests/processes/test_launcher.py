"""The port at which the ranks of one machine meet."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from bft_megatron.processes import launcher


def test_the_port_is_none_that_the_kernel_gives_to_others():
    first, last = map(int, launcher.EPHEMERAL.read_text().split())
    assert not first <= launcher._free_port() <= last


def test_a_port_where_the_kernel_gives_all_of_them_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launcher, "EPHEMERAL", tmp_path / "range")
    launcher.EPHEMERAL.write_text("1024\t65535\n")
    with socket.socket() as s:
        s.bind(("", launcher._free_port()))
