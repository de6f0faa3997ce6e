"""A flipped bit anywhere in a run's folder: the same end, an earlier checkpoint that is said, or a refusal.

Never a traceback, never other numbers with status 0.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bft_megatron.checkpoint.recovery import newest_whole
from bft_megatron.errors import UserError
from bft_megatron.hf.architectures import read_config
from bft_megatron.hf.seal import SEAL
from bft_megatron.hf.tensors import Weight
from bft_megatron.hf.torch_dist import newest_checkpoint
from bft_megatron.hf.weights import weights
from bft_megatron.run import metrics
from bft_megatron.run.folder import RunFolder
from tests.helpers.background import arguments
from tests.helpers.checkpoints import assert_same_tensors
from tests.helpers.commands import run_command
from tests.helpers.runs import read_metrics
from tests.helpers.world import run_world

SEED = int(os.environ.get("SEED", "20261101"))
SECONDS = float(os.environ.get("FUZZ_SECONDS", "10"))


def _flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def _draw(rng: random.Random, files: list[Path]) -> tuple[Path, int]:
    file = rng.choice(sorted(path for path in files if path.stat().st_size))
    return file, rng.randrange(8 * file.stat().st_size)


def _choose(root: Path) -> int:
    with (root / f"console-{dist.get_rank()}").open("w") as console:
        return newest_whole(RunFolder(root), console)


def _choose_and_check(root: Path, harmed: Path, bit: int, sealed: bool) -> None:
    """On rank 0: flip a bit, start, check the choice, and put all back."""
    folder = RunFolder(root)
    checkpoint, aside = folder.checkpoint(6), folder.checkpoints / "damaged_iter_0000006"
    seal = checkpoint / SEAL
    _flip(harmed, bit)
    if not sealed:
        seal.rename(root / SEAL)
    dist.broadcast_object_list([True])
    wrong = _wrong(root, harmed, _choose(root), sealed)
    assert wrong is None, f"SEED={SEED}: bit {bit} of {harmed.name}, {'' if sealed else 'not '}sealed: {wrong}"
    if aside.exists():
        aside.rename(checkpoint)
    if not sealed:
        (root / SEAL).rename(seal)
    if harmed != folder.tracker:
        _flip(harmed, bit)
    folder.write_tracker(6)


def _wrong(root: Path, harmed: Path, newest: int, sealed: bool) -> str | None:
    folder, said = RunFolder(root), (root / "console-0").read_text()
    if folder.tracker.read_text() != str(newest):
        return "the tracker does not name it"
    if harmed == folder.tracker:
        return None if newest == 6 else f"step {newest}"
    if newest == 4:
        return None if f"checkpoint of step 6 is damaged ({harmed.name}" in said else said
    if sealed:
        return f"step {newest} with a flip, {said}"
    assert_same_tensors(folder.checkpoint(6), folder.checkpoints / "copy")
    return None if "has no seal.json" in said else said


def _flip_and_choose(root: Path, seconds: float) -> int:
    """Flips of the newest checkpoint's files and of the tracker, one after another -> how many."""
    if dist.get_rank() != 0:
        while _goes_on():
            _choose(root)
        return 0
    rng, until, flips, folder = random.Random(SEED), time.monotonic() + seconds, 0, RunFolder(root)
    files = [*folder.checkpoint(6).iterdir(), folder.tracker]
    checked = [file for file in files if file.name not in (SEAL, ".metadata", folder.tracker.name)]
    while time.monotonic() < until:
        sealed = rng.random() < 0.7
        _choose_and_check(root, *_draw(rng, files if sealed else checked), sealed)
        flips += 1
    dist.broadcast_object_list([False])
    return flips


def _goes_on() -> bool:
    box = [True]
    dist.broadcast_object_list(box)
    return box[0]


def test_flips_of_the_newest_checkpoint_are_found_and_said(undisturbed: Path, tmp_path: Path):
    """Without a seal nothing tells of a flip in `.metadata`, whose place is between two steps of a save alone."""
    root = tmp_path / "run"
    shutil.copytree(undisturbed, root)
    shutil.copytree(RunFolder(root).checkpoint(6), root / "checkpoints" / "copy")
    flips, _ = run_world(2, _flip_and_choose, root, SECONDS / 3, megatron=True, timeout=SECONDS + 120)
    print(f"{flips} flips")
    assert flips > 5


def test_flips_of_the_metrics_leave_the_other_lines_as_they_are(undisturbed: Path, tmp_path: Path):
    rng, until = random.Random(SEED), time.monotonic() + SECONDS / 15
    before, file = (undisturbed / "metrics.jsonl").read_bytes(), tmp_path / "metrics.jsonl"
    lines = before.splitlines(keepends=True)
    while time.monotonic() < until:
        file.write_bytes(before)
        bit = rng.randrange(8 * len(before))
        _flip(file, bit)
        metrics.drop_after(file, 6)
        kept = file.read_bytes()
        lost = [line for line in lines if line not in kept]
        assert len(lost) <= 2, f"SEED={SEED}: bit {bit}: {lost}"  # a flipped newline joins two
        assert all(line["iteration"] <= 6 for line in metrics.read(file))


def test_flips_of_a_checkpoint_refuse_its_export_or_leave_its_tensors(undisturbed: Path, tmp_path: Path):
    rng, until = random.Random(SEED), time.monotonic() + SECONDS / 6
    checkpoint, refused = tmp_path / "iter_0000006", 0
    table = weights(read_config(undisturbed / "model"))
    expected = _tensors(RunFolder(undisturbed).checkpoint(6), table)
    shutil.copytree(RunFolder(undisturbed).checkpoint(6), checkpoint)
    while time.monotonic() < until:
        harmed, bit = _draw(rng, list(checkpoint.iterdir()))
        _flip(harmed, bit)
        found = _tensors(checkpoint, table)
        which = f"SEED={SEED}: bit {bit} of {harmed.name}: {found}"
        if isinstance(found, str):
            assert harmed.name in found, which
            refused += 1
        else:
            assert all(map(torch.equal, found, expected)), which
        _flip(harmed, bit)
    assert refused


def _tensors(checkpoint: Path, table: list[Weight]) -> list[torch.Tensor] | str:
    """Return a tensor of each weight, or why the checkpoint is refused."""
    try:
        whole = newest_checkpoint(checkpoint.parent, 6)
        return [whole.read_tensor(weight, 0) for weight in table]
    except UserError as e:
        return str(e)


def _interrupted(undisturbed: Path, root: Path) -> RunFolder:
    """A run as a kill after step 5 leaves it, with checkpoints 2 and 4."""
    shutil.copytree(undisturbed, root)
    folder = RunFolder(root)
    shutil.rmtree(folder.checkpoint(6))
    folder.write_tracker(4)
    folder.mark_unfinished("running")
    lines = folder.metrics.read_bytes().splitlines(keepends=True)
    folder.metrics.write_bytes(b"".join(line for line in lines if b'"iteration": 6' not in line))
    return folder


def _same_end(folder: RunFolder, undisturbed: Path, harmed: Path) -> None:
    assert_same_tensors(folder.checkpoint(6), RunFolder(undisturbed).checkpoint(6))
    assert (folder.root / "done").exists()
    if harmed != folder.metrics:
        assert read_metrics(folder.metrics) == read_metrics(undisturbed / "metrics.jsonl")
        return
    steps = [line["iteration"] for line in metrics.read(folder.metrics) if line["iteration"] > 4]
    assert steps == [5, 6, 6]  # the last validation too


def test_a_run_with_a_flip_ends_as_undisturbed_or_is_refused(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    rng, until, runs = random.Random(SEED), time.monotonic() + SECONDS / 2, 0
    while time.monotonic() < until:
        folder = _interrupted(undisturbed, tmp_path / f"{runs}")
        harmed, bit = _draw(rng, [path for path in folder.root.rglob("*") if path.is_file()])
        _flip(harmed, bit)
        capfd.readouterr()
        which = f"SEED={SEED}: bit {bit} of {harmed.relative_to(folder.root)}"
        try:
            status = run_command(monkeypatch, *arguments(folder.root, "train.save_every=2", "train.keep_last=3"))
        except BaseException as e:
            e.add_note(which)
            raise
        said = "".join(capfd.readouterr())
        which += f": status {status}, {said}"
        assert "Traceback" not in said, which
        if status == 0:
            assert "step 4 is damaged" in said or "from step 4" in said, which
            _same_end(folder, undisturbed, harmed)
        else:
            assert status == 2, which
            assert harmed.name in said or str(folder.root) in said, which
        shutil.rmtree(folder.root)
        runs += 1
    print(f"{runs} runs")
    assert runs
