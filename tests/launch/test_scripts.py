"""The launch scripts and the image without a cluster: linters, the composed srun line, the base's packages held.

What becomes of a job on a real Slurm is in tests/slurm.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT

BIN = Path(sys.executable).parent
SCRIPTS = sorted(str(path.relative_to(ROOT)) for path in (*ROOT.glob("launch/*.sh"), ROOT / "find-python.sh"))


@pytest.mark.parametrize(
    "words", [["shellcheck", "--external-sources", *SCRIPTS, ".ci/run"], ["hadolint", "Dockerfile"]], ids=lambda w: w[0]
)
def test_linter_has_nothing_to_say(words: list[str]):
    done = subprocess.run([BIN / words[0], *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def srun_line(**variables: str) -> list[str]:
    """The words of the command that starts the ranks of a job of two nodes."""
    slurm = {"SLURM_NTASKS": "16", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "96"}
    job = {"RUN": "/runs/a", "attempt": "12.0", "MASTER_ADDR": "n1", "MASTER_PORT": "10012", "tasks": "8"}
    script = (
        ". launch/lib.sh; command=(bft-megatron); compose_container; "
        "compose_step recipes/tiny.yaml train.lr=1e-5; printf '%q ' \"${srun_line[@]}\""
    )
    environment = {"PATH": os.environ["PATH"], **slurm, **job, **variables}
    done = subprocess.run(
        ["bash", "-uc", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    # bash quotes what has line ends as $'...', which shlex does not know: only the ranks' own script has any.
    return shlex.split(done.stdout)


STEP = [
    *("srun", "--nodes=2", "--ntasks=16", "--ntasks-per-node=8", "--cpus-per-task=12", "--cpu-bind=none"),
    *("--kill-on-bad-exit=1", "--wait=300"),
]


def test_srun_line():
    words = srun_line()
    assert words[: len(STEP)] == STEP
    assert words[len(STEP) : len(STEP) + 2] == ["bash", "-c"]
    assert words[-6:] == ["rank", "/runs/a/launch/12.0", "bft-megatron", "train", "recipes/tiny.yaml", "train.lr=1e-5"]


def test_srun_line_with_a_container():
    """pyxis: the image, the working folder at the same path inside, no packages of the user's home."""
    words = srun_line(CONTAINER_IMAGE="/images/bft.sqsh")
    container = [
        *("--container-image=/images/bft.sqsh", f"--container-mounts={ROOT}:{ROOT}"),
        *(f"--container-workdir={ROOT}", "--no-container-mount-home"),
    ]
    assert words[: len(STEP) + 5] == [*STEP, *container, "bash"]
    words = srun_line(CONTAINER_IMAGE="nvcr.io#team/bft:1", CONTAINER_MOUNTS="/data:/data,/runs:/runs")
    assert "--container-image=nvcr.io#team/bft:1" in words
    assert "--container-mounts=/data:/data,/runs:/runs" in words


def test_srun_line_with_ft_launcher():
    """One launcher a node, which starts the ranks and meets the others at the first node."""
    words = srun_line(FT_LAUNCHER="1", FT_OPTIONS="--max-restarts=3")
    assert words[1:5] == ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=96"]
    launcher = ["ft_launcher", "--nnodes=2", "--nproc-per-node=8", "--rdzv-backend=c10d", "--rdzv-endpoint=n1:10012"]
    train = ["-m", "bft_megatron", "train", "recipes/tiny.yaml", "train.lr=1e-5"]
    assert words[-11:] == [*launcher, "--max-restarts=3", *train]


def image(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run some of launch/image.py."""
    script = f"import image; from pathlib import Path; image.RECORD = Path({str(folder)!r}) / 'base.txt'; {code}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "launch")}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)


def test_the_base_image_keeps_its_packages(tmp_path: Path):
    held = image("print('\\n'.join(image.base_packages()))", tmp_path).stdout.split()
    assert f"torch=={version('torch')}" in held
    assert not [line for line in held if line.startswith(("transformers", "datasets"))]
    (tmp_path / "base.txt").write_text("\n".join(held))
    assert image("image.verify()", tmp_path).returncode == 0
    (tmp_path / "base.txt").write_text("torch==2.12.0a0+nv26.6")
    done = image("image.verify()", tmp_path)
    assert done.returncode == 1
    assert "torch==2.12.0a0+nv26.6" in done.stderr


@pytest.mark.parametrize(("says", "problem"), [("exit 1", "has no torch that loads"), ("echo", "has a torch for CPUs")])
def test_transformer_engine_needs_a_torch_for_gpus(says: str, problem: str, tmp_path: Path):
    python = tmp_path / "python"  # a stand-in, so that nothing can be installed
    python.write_text(f"#!/bin/sh\n{says}\n")
    python.chmod(0o755)
    script = ["bash", "launch/install_gpu.sh", python]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {python} {problem}: install the one for your CUDA first\n"
