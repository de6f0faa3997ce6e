"""A training run on one card against the same run on the CPU, and a resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEPS = 8


def train(output: Path, *fields: str, status: int = 0) -> list[dict[str, float]]:
    """Run `train recipes/tiny.yaml` with these fields -> its lines of metrics.jsonl."""
    command = [sys.executable, "-m", "bft_megatron", "train", "recipes/tiny.yaml", f"train.iterations={STEPS}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [*command, f"output={output}", *fields],
        cwd=ROOT,
        env=environment,
        timeout=400,
        check=False,
        capture_output=True,
        text=True,
    )
    logs = "".join(path.read_text()[-3000:] for path in sorted((output / "logs").glob("*")))
    assert done.returncode == status, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}\n{logs}"
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    return train(tmp_path_factory.mktemp("cpu"), "device=cpu")


@pytest.mark.parametrize(
    ("fields", "allowed"),
    [
        pytest.param((), 2e-4, id="fp32"),
        pytest.param(("data.packing=false", "train.micro_batch_size=2"), 2e-4, id="fp32-padded"),
        pytest.param(("objective.head=chunked", "objective.kernels=triton"), 2e-4, id="fp32-chunked-triton"),
        pytest.param(("train.precision=bf16",), 3e-2, id="bf16"),
        pytest.param(
            ("train.precision=bf16", "objective.head=chunked", "objective.kernels=triton"), 3e-2, id="bf16-triton"
        ),
    ],
)
def test_a_run_is_the_cpus(fields: tuple[str, ...], allowed: float, on_cpu: list[dict[str, float]], tmp_path: Path):
    found = train(tmp_path / "gpu", *fields)
    padded = any("packing" in field for field in fields)
    expected = train(tmp_path / "cpu", "device=cpu", *fields) if padded else on_cpu
    for mine, cpus in zip(found, expected, strict=True):
        for name in ("loss", "lm_loss", "mean_p", "mean_confidence"):
            assert mine[name] == pytest.approx(cpus[name], rel=allowed), (mine["iteration"], name)
        if "grad_norm" in cpus:
            assert mine["grad_norm"] == pytest.approx(cpus["grad_norm"], rel=10 * allowed), mine["iteration"]


def test_a_resumed_run_goes_the_same_way(tmp_path: Path):
    whole = train(tmp_path / "whole", "train.precision=bf16", "train.save_every=4")
    train(tmp_path / "cut", "train.precision=bf16", "train.save_every=4")
    folder = tmp_path / "cut"
    subprocess.run(["rm", "-r", str(folder / "checkpoints" / f"iter_{STEPS:07d}"), str(folder / "done")], check=True)
    (folder / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("4")
    again = train(folder, "train.precision=bf16", "train.save_every=4")
    for mine, first in zip(again, whole, strict=True):
        for name in ("loss", "lm_loss", "mean_p"):
            assert mine[name] == pytest.approx(first[name], rel=1e-3), mine["iteration"]
