"""Every damage to a checkpoint is found, and the run goes on from the newest one that is whole."""

from __future__ import annotations

import io
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint import FileSystemReader

from bft_megatron.checkpoint import integrity
from bft_megatron.checkpoint.recovery import newest_whole
from bft_megatron.errors import UserError
from bft_megatron.hf.seal import SEAL
from bft_megatron.run.folder import RunFolder
from tests.helpers.background import arguments
from tests.helpers.checkpoints import assert_same_tensors
from tests.helpers.commands import run_command
from tests.helpers.runs import read_metrics
from tests.helpers.world import run_world


def _shard(checkpoint: Path) -> Path:
    return checkpoint / "__0_0.distcp"


def _largest(checkpoint: Path) -> Any:
    return max(FileSystemReader(checkpoint).read_metadata().storage_data.values(), key=lambda info: info.length)


def _flip_in_a_tensor(checkpoint: Path) -> None:
    """Eight bytes in the middle of the largest record's data: Megatron loads this without a word."""
    largest = _largest(checkpoint)
    _flip(checkpoint / largest.relative_path, largest.offset + largest.length // 2, 8)


def _flip_in_a_zip_directory(checkpoint: Path) -> None:
    """The name of a member, which Python's zipfile takes and torch does not find."""
    largest = _largest(checkpoint)
    file = checkpoint / largest.relative_path
    record = file.read_bytes()[largest.offset : largest.offset + largest.length]
    for at in (record.index(b"data.pkl"), record.rindex(b"data.pkl")):  # before the member, and in the directory
        _flip(file, largest.offset + at, 1, 1)


def _flip(path: Path, at: int, n: int = 1, mask: int = 0xFF) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        data = file.read(n)
        file.seek(at)
        file.write(bytes(b ^ mask for b in data))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip_in_metadata(checkpoint: Path) -> None:
    """In the name of a tensor: it unpickles."""
    data = (checkpoint / ".metadata").read_bytes()
    (checkpoint / ".metadata").write_bytes(data.replace(b"decoder.final_layernorm", b"decoder.fiNAl_layernorm"))


def _rename_in_seal(checkpoint: Path) -> None:
    (checkpoint / SEAL).write_text((checkpoint / SEAL).read_text().replace("__0_0.distcp", "__0_1.distcp"))


def _become_fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _become_another_step(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.with_name("iter_0000002").rename(checkpoint)


Harm = Callable[[Path], object]

FOUND_WITHOUT_SEAL: list[tuple[Harm, str]] = [
    (lambda c: _cut(_shard(c)), "__0_0.distcp: .* bytes, should be"),
    (lambda c: _shard(c).unlink(), "__0_0.distcp: No such file"),
    (lambda c: (_shard(c).unlink(), _shard(c).mkdir()), "__0_0.distcp: "),
    (lambda c: (c / ".metadata").unlink(), "^.metadata: No such file"),
    (lambda c: _become_fifo(c / ".metadata"), "^.metadata: is no regular file"),
    (lambda c: (c / "metadata.json").unlink(), "metadata.json: No such file"),
    (lambda c: (c / "metadata.json").write_text(""), "metadata.json: JSONDecodeError"),
    (lambda c: _flip(c / "metadata.json", 5, mask=1), "metadata.json: TypeError: .*sharded_backend"),
    (lambda c: _flip(c / "metadata.json", 5, mask=0x80), "metadata.json: UnicodeDecodeError"),
]

DAMAGES: list[tuple[Harm, str]] = [
    *FOUND_WITHOUT_SEAL,
    (_flip_in_a_tensor, "__._0.distcp: bytes from 0 have CRC-32"),
    (_flip_in_a_zip_directory, "__._0.distcp: bytes from 0 have CRC-32"),
    (lambda c: _shard(c).write_bytes(bytes(_shard(c).stat().st_size)), "__0_0.distcp: bytes from 0 have CRC-32"),
    (lambda c: _cut(c / ".metadata"), "^.metadata: .* bytes, should be"),
    (_flip_in_metadata, "^.metadata: bytes from 0 have CRC-32"),
    (lambda c: _flip(c / "metadata.json", 61, mask=8), "metadata.json: bytes from 0 have CRC-32"),  # a version
    (lambda c: _cut(c / SEAL), "seal.json: JSONDecodeError"),
    (lambda c: _flip(c / SEAL, 3, mask=1), "seal.json: KeyError"),
    (_rename_in_seal, "seal.json: .* does not match its own CRC-32"),
    (lambda c: _become_fifo(c / SEAL), "^seal.json: is no regular file"),
    (_become_another_step, "seal.json: .*it is that of iter_0000002"),
]

UNSEALED: list[tuple[Harm, str]] = [
    *FOUND_WITHOUT_SEAL,
    (_flip_in_a_tensor, "__._0.distcp: record at .* does not match its CRC-32"),
    (_flip_in_a_zip_directory, "__._0.distcp: record at .*data"),
    (lambda c: _shard(c).write_bytes(bytes(_shard(c).stat().st_size)), "__0_0.distcp: record at .* not a zip file"),
    (_become_another_step, "__._0.distcp: it is that of step 2"),
    (lambda c: _cut(c / ".metadata"), "^.metadata: "),
    (lambda c: _flip((c / ".metadata"), (c / ".metadata").read_bytes().index(b"common_state")), "^.metadata: "),
]


@pytest.fixture
def folder(undisturbed: Path, tmp_path: Path) -> RunFolder:
    """A copy with checkpoints 2, 4, 6."""
    shutil.copytree(undisturbed, tmp_path / "run")
    return RunFolder(tmp_path / "run")


def test_an_undamaged_checkpoint_is_whole_whoever_reads_which_share(folder: RunFolder):
    assert [integrity.damage(folder.checkpoint(6), rank, 3) for rank in range(3)] == [None] * 3


@pytest.mark.parametrize(("harm", "said"), DAMAGES)
def test_each_damage_is_found_by_one_of_the_ranks_and_named(folder: RunFolder, harm: Harm, said: str):
    harm(folder.checkpoint(6))
    found = [integrity.damage(folder.checkpoint(6), rank, 3) for rank in range(3)]
    assert any(re.search(said, fault) for fault in found if fault), found


@pytest.mark.parametrize(("harm", "said"), UNSEALED)
def test_a_deleted_seal_does_not_hide_a_damage(folder: RunFolder, harm: Harm, said: str):
    harm(folder.checkpoint(6))
    (folder.checkpoint(6) / SEAL).unlink()
    found = [integrity.damage(folder.checkpoint(6), rank, 3) for rank in range(3)]
    assert any(re.search(said, fault) for fault in found if fault), found


def test_retention_sees_sizes_alone(folder: RunFolder):
    """In milliseconds, after every save."""
    checkpoint = folder.checkpoint(6)
    assert integrity.damage(checkpoint, contents=False) is None
    _flip_in_a_tensor(checkpoint)
    assert integrity.damage(checkpoint, contents=False) is None
    _cut(_shard(checkpoint))
    assert "should be" in str(integrity.damage(checkpoint, contents=False))
    (checkpoint / SEAL).unlink()
    assert "should be" in str(integrity.damage(checkpoint, contents=False))


def test_a_flip_anywhere_in_a_records_data_is_found(folder: RunFolder):
    """Of every tenth record, in the data of its largest member."""
    checkpoint = folder.checkpoint(6)
    for info in list(FileSystemReader(checkpoint).read_metadata().storage_data.values())[::10]:
        path = checkpoint / info.relative_path
        before = path.read_bytes()
        record = before[info.offset : info.offset + info.length]
        with zipfile.ZipFile(io.BytesIO(record)) as archive:
            data = archive.read(max(archive.infolist(), key=lambda member: member.file_size))
        _flip(path, info.offset + record.index(data), 8)
        assert "CRC-32" in str(integrity.damage(checkpoint))
        path.write_bytes(before)
    assert integrity.damage(checkpoint) is None


def _choose(root: Path) -> int | str:
    with (root / f"console-{_rank()}").open("w") as console:
        try:
            return newest_whole(RunFolder(root), console)
        except UserError as e:
            return str(e)


def _rank() -> int:
    import torch.distributed as dist

    return dist.get_rank()


def _names(folder: RunFolder) -> set[str]:
    return {path.name for path in folder.checkpoints.iterdir() if path.is_dir()}


def test_falls_back_over_two_damaged_ones_and_an_empty_tracker(folder: RunFolder):
    _flip_in_a_tensor(folder.checkpoint(6))
    _shard(folder.checkpoint(4)).unlink()
    folder.tracker.write_text("")
    assert run_world(2, _choose, folder.root, megatron=True) == [2, 2]
    assert _names(folder) == {"iter_0000002", "damaged_iter_0000004", "damaged_iter_0000006"}
    assert folder.tracker.read_text() == "2"
    said = (folder.root / "console-0").read_text()
    assert "checkpoint of step 6 is damaged (" in said
    assert "renamed to damaged_iter_0000004, using step 2" in said
    assert (folder.root / "console-1").read_text() == ""


def test_a_deleted_seal_is_said(folder: RunFolder):
    (folder.checkpoint(6) / SEAL).unlink()
    assert run_world(2, _choose, folder.root, megatron=True) == [6, 6]
    assert "the checkpoint of step 6 has no seal.json" in (folder.root / "console-0").read_text()


def _seal_again(root: Path) -> None:
    integrity.seal(RunFolder(root).checkpoint(6))


def test_what_matches_its_checksums_and_cannot_be_read_is_set_aside(folder: RunFolder):
    _flip_in_a_zip_directory(folder.checkpoint(6))
    run_world(2, _seal_again, folder.root)
    assert run_world(2, _choose, folder.root, megatron=True) == [4, 4]
    said = (folder.root / "console-0").read_text()
    assert re.search(r"step 6 is damaged \(__._0.distcp: record at \d+: \w+Error", said)


def test_folders_of_other_names_are_left_alone(folder: RunFolder):
    odd = {"iter_²", "iter_abc", "iter_", "iter_0000002.bak", "iter_" + "9" * 200, "iter_6"}
    for name in odd:
        (folder.checkpoints / name).mkdir()
    assert run_world(2, _choose, folder.root, megatron=True) == [6, 6]
    assert _names(folder) == odd | {"iter_0000002", "iter_0000004", "iter_0000006"}


def test_a_missing_tracker_and_one_that_lags_behind_are_mended(folder: RunFolder):
    for write in (
        folder.tracker.unlink,
        lambda: folder.tracker.write_text("4"),
        lambda: folder.tracker.write_bytes(b"\xb6"),
        lambda: folder.tracker.write_text("²"),
        lambda: folder.tracker.write_text("9" * 5000),
    ):
        write()
        assert run_world(2, _choose, folder.root, megatron=True) == [6, 6]
        assert folder.tracker.read_text() == "6"


def test_what_an_unfinished_save_left_is_removed_not_kept_as_damaged(folder: RunFolder):
    for name in ("metadata.json", SEAL):
        (folder.checkpoint(6) / name).unlink()
    folder.tracker.write_text("4")
    assert run_world(2, _choose, folder.root, megatron=True) == [4, 4]
    assert _names(folder) == {"iter_0000002", "iter_0000004"}


def test_a_sealed_checkpoint_is_never_taken_for_an_unfinished_save(folder: RunFolder):
    folder.tracker.write_text("2")
    for iteration in (4, 6):
        (folder.checkpoint(iteration) / "metadata.json").unlink()
    assert run_world(2, _choose, folder.root, megatron=True) == [2, 2]
    names = {"iter_0000002", "damaged_iter_0000004", "damaged_iter_0000006"}
    assert _names(folder) == names
    folder.tracker.unlink()
    (folder.checkpoint(2) / "metadata.json").unlink()
    assert all("holds no whole checkpoint" in message for message in run_world(2, _choose, folder.root, megatron=True))
    assert _names(folder) == names


def test_with_no_whole_one_left_it_refuses_and_touches_nothing(folder: RunFolder):
    for iteration in (2, 4, 6):
        _cut(_shard(folder.checkpoint(iteration)))
    before = _names(folder)
    for message in run_world(2, _choose, folder.root, megatron=True):
        assert "holds no whole checkpoint (step 6: __0_0.distcp:" in message
        assert "remove this folder to train from the start" in message
    assert _names(folder) == before
    shutil.rmtree(folder.checkpoints)
    folder.checkpoints.mkdir()
    folder.write_tracker(6)
    assert all("the folders are gone" in message for message in run_world(2, _choose, folder.root, megatron=True))


def test_a_first_save_that_was_cut_short_means_starting_from_the_beginning(folder: RunFolder):
    for iteration in (2, 4):
        shutil.rmtree(folder.checkpoint(iteration))
    for name in ("metadata.json", SEAL):
        (folder.checkpoint(6) / name).unlink()
    folder.tracker.unlink()
    assert run_world(2, _choose, folder.root, megatron=True) == [0, 0]
    assert _names(folder) == set()


@pytest.mark.parametrize(
    "harm",
    [
        lambda c: (c / ".metadata").unlink(),
        lambda c: _shard(c).write_bytes(b""),
        lambda c: _become_fifo(_shard(c)),
        lambda c: _cut(c / SEAL),
        lambda c: ((c / SEAL).unlink(), (c / ".metadata").unlink()),
        _become_another_step,
        shutil.rmtree,
    ],
)
def test_a_run_is_not_done_without_all_of_its_last_checkpoint(folder: RunFolder, harm: Harm):
    assert folder.is_done(6)
    harm(folder.checkpoint(6))
    assert not folder.is_done(6)


def test_a_run_with_damage_goes_on_to_the_same_end(
    folder: RunFolder, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """It was done. The metrics have a strange line too, and the folder a strange name."""
    _cut(_shard(folder.checkpoint(6)))
    (folder.checkpoints / "iter_²").mkdir()
    folder.metrics.write_bytes(b"\xb0\n" + folder.metrics.read_bytes())
    assert run_command(monkeypatch, *arguments(folder.root, "train.save_every=2", "train.keep_last=3")) == 0
    said = capfd.readouterr().out
    assert "6 steps from step 4" in said
    assert "metrics.jsonl: 1 damaged lines (1) are set aside in metrics.rejected.jsonl" in said
    assert read_metrics(folder.metrics) == read_metrics(undisturbed / "metrics.jsonl")
    assert_same_tensors(folder.checkpoint(6), RunFolder(undisturbed).checkpoint(6))
