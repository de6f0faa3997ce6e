"""A save that cannot be written: one line with the file and the cause, and the same command goes on later."""

from __future__ import annotations

import contextlib
import re
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from bft_megatron.checkpoint.saving import Saving
from bft_megatron.run.folder import RunFolder
from bft_megatron.upstream import checkpoint_writer
from tests.helpers.background import arguments
from tests.helpers.commands import run_command
from tests.helpers.world import run_world


@pytest.mark.slow
def test_a_full_disk_in_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """/dev/full stands in for the place of one rank's file of the second save."""
    folder, saved = RunFolder(tmp_path / "run"), Saving.saved
    words = arguments(folder.root, "train.iterations=4", "train.save_every=2", "data.valid=null")

    def saved_and_filled(*args: Any) -> None:
        saved(*args)
        folder.checkpoint(4).mkdir(exist_ok=True)
        with contextlib.suppress(FileExistsError):
            (folder.checkpoint(4) / "__1_0.distcp").symlink_to("/dev/full")

    with monkeypatch.context() as patch:
        patch.setattr(Saving, "saved", saved_and_filled)
        assert run_command(monkeypatch, *words) == 1
    (line,) = re.findall(r"^rank .*", capfd.readouterr().out, re.MULTILINE)
    file = folder.checkpoint(4) / "__1_0.distcp"
    assert line.startswith(f"rank 0: checkpoint: rank 1: {file}: No space left on device (")
    assert re.search(r" MiB free\); after step 4; .*next start: from the checkpoint of step 2; command: ", line)

    assert run_command(monkeypatch, *words) == 0
    assert "removed what an unfinished save of step 4 left behind" in capfd.readouterr().out
    assert folder.is_done(4)


def _write(file: Path) -> str:
    """What a writer says that is given a megabyte and may write a tenth of it."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    from torch.distributed.checkpoint.filesystem import _StorageWriterTransforms

    checkpoint_writer.name_causes()
    tensor = torch.zeros(2**18)
    chunk = ChunkStorageMetadata(torch.Size([0]), tensor.size())
    data = TensorWriteData(chunk, TensorProperties.create_from_tensor(tensor), tensor.size())
    item = WriteItem(MetadataIndex("zeros"), WriteItemType.TENSOR, tensor_data=data)
    bucket = (file, file.name, ([], [(item, tensor)]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, resource.RLIM_INFINITY))
    try:
        FileSystemWriterAsync.write_preloaded_data([_StorageWriterTransforms()], 0, bucket, None, None, True)
    except RuntimeError as e:
        return str(e)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return "written"


def test_a_limit_on_the_size_of_files(tmp_path: Path):
    file = tmp_path / "__0_0.distcp"
    said = f"{file}: File too large (this process's limit on the size of a file: `ulimit -f`)"
    assert run_world(1, _write, file) == [said]
