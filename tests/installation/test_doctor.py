"""`bft-megatron doctor` says what is there, what is missing, and what is there and does not work."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from bft_megatron.installation import driver, parts
from tests.helpers.commands import ROOT

TOPOLOGY = """
\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\x1b[0m
GPU0\t X \tNV18\tSYS\tPIX\t0-47\t0
GPU1\tNV18\t X \tSYS\tPXB\t0-47\t0
GPU2\tSYS\tSYS\t X \tNODE\t48-95\t1
NIC0\tPIX\tPXB\tNODE\t X

Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes
"""


def doctor(packages: Path) -> subprocess.CompletedProcess[str]:
    """The command with these packages before the installed ones."""
    environment = os.environ | {"PYTHONPATH": f"{packages}:{ROOT}", "COLUMNS": "200"}
    words = [sys.executable, "-m", "bft_megatron", "doctor"]
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300, check=False)


def distribution(packages: Path, name: str, release: str) -> None:
    """Metadata of an installed distribution, without files."""
    info = packages / f"{name.replace('-', '_')}-{release}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n")


@pytest.mark.skipif(parts.version("transformer-engine") is not None, reason="Transformer Engine is installed")
def test_what_is_missing_is_said_with_its_cost_and_the_command(tmp_path: Path):
    done = doctor(tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.split() == ["megatron-core", version("megatron-core")] for line in lines)
    [engine] = [i for i, line in enumerate(lines) if line.startswith("Transformer Engine")]
    assert lines[engine].split()[-1] == "missing"
    assert "fused norms" in (says := " ".join(line.strip() for line in lines[engine + 1 : engine + 4]))
    assert f"{parts.INSTALL} installs it" in says
    assert (ROOT / parts.INSTALL).exists()
    assert lines[-2].startswith("missing, and runs go on without: ")
    assert "Transformer Engine" in lines[-2]
    assert lines[-1] == "nothing is wrong"


def test_what_is_there_and_does_not_work_is_wrong(tmp_path: Path):
    broken = tmp_path / "transformer_engine"
    broken.mkdir()
    (broken / "__init__.py").write_text("")
    (broken / "pytorch.py").write_text("raise ImportError('undefined symbol: _ZN3c104cuda9SetDeviceEa')\n")
    distribution(tmp_path, "transformer-engine", "2.20.2")
    distribution(tmp_path, "apex", "0.9.10.dev0")  # PyPI's, without kernels
    distribution(tmp_path, "datasets", "2.21.0")
    done = doctor(tmp_path)
    assert done.returncode == 1
    assert "undefined symbol: _ZN3c104cuda9SetDeviceEa" in done.stdout
    assert "PyPI's project of the same name" in done.stdout
    assert done.stdout.splitlines()[-1] == "wrong: datasets, Transformer Engine, apex"
    assert re.search(r'datasets +2\.21\.0\n +is not of the releases .*: pip install "datasets\S+"', done.stdout)


@pytest.mark.parametrize(
    ("cuda", "newest", "state"),
    [(None, (13, 0), "wrong"), ("13.0", (12, 9), "wrong"), ("13.2", (13, 0), "good"), ("12.8", (13, 0), "good")],
)
def test_torch_and_driver_fit_by_the_major_release_of_cuda(
    cuda: str | None, newest: tuple[int, int], state: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("torch.version.cuda", cuda)
    monkeypatch.setattr(driver, "newest_cuda", lambda: newest)
    assert parts.torch_and_driver()[-1].state == state


def test_links_between_gpus_are_read_from_the_topology():
    assert driver.topology_links(TOPOLOGY) == {"NV18", "SYS"}
    assert driver.topology_links("") == set()
