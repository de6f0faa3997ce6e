"""What keeps a checkpoint from being read and is not its content renames nothing and ends no good run."""

from __future__ import annotations

import resource
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from bft_megatron.checkpoint import recovery
from bft_megatron.errors import Unreadable
from bft_megatron.run.folder import RunFolder
from tests.helpers.background import arguments
from tests.helpers.commands import run_command
from tests.helpers.world import run_world


@pytest.fixture
def folder(undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A copy with checkpoints 2, 4, 6; attempts follow each other fast."""
    shutil.copytree(undisturbed, tmp_path / "run")
    monkeypatch.setattr(recovery, "PAUSES", (0.2, 0.4))
    return RunFolder(tmp_path / "run")


def _tree(folder: RunFolder) -> set[str]:
    return {str(path.relative_to(folder.root)) for path in folder.checkpoints.rglob("*")}


def _choose(root: Path, before: Callable[[], None]) -> int | str:
    with (root / f"console-{dist.get_rank()}").open("w") as console:
        before()
        try:
            return recovery.newest_whole(RunFolder(root), console)
        except Unreadable as e:
            return str(e)
        finally:
            _limit_files(resource.getrlimit(resource.RLIMIT_NOFILE)[1])


def _nothing() -> None:
    pass


def _io_error(file: Path) -> None:
    """Reading one's own memory at address 0 is an input/output error, whoever reads."""
    file.rename(file.with_name("kept-" + file.name))
    file.symlink_to("/proc/self/mem")


def _mend(file: Path) -> None:
    file.with_name("kept-" + file.name).replace(file)


@pytest.mark.parametrize(
    "name", ["iter_0000006/metadata.json", "iter_0000006/seal.json", RunFolder(Path()).tracker.name]
)
def test_an_input_output_error_ends_the_start_on_all_ranks_and_changes_nothing(folder: RunFolder, name: str):
    _io_error(folder.checkpoints / name)
    before = _tree(folder)
    first, second = run_world(2, _choose, folder.root, _nothing, megatron=True)
    assert first == second
    assert first == (
        f"rank 0 cannot read {folder.checkpoints / name}: Input/output error, in 3 attempts over 0.6 seconds; "
        "nothing was changed, the same command tries again"
    )
    assert _tree(folder) == before
    _mend(folder.checkpoints / name)
    assert run_world(2, _choose, folder.root, _nothing, megatron=True) == [6, 6]


def test_an_error_that_passes_is_waited_for(folder: RunFolder):
    seal = folder.checkpoint(6) / "seal.json"
    _io_error(seal)

    def mend_soon() -> None:
        if dist.get_rank() == 0:
            threading.Timer(0.3, _mend, [seal]).start()

    assert run_world(2, _choose, folder.root, mend_soon, megatron=True) == [6, 6]
    assert (folder.root / "console-0").read_text() == ""


def _no_more_files() -> None:
    if dist.get_rank() == 1:
        _limit_files(3)


def _limit_files(n: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (n, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def _no_more_memory() -> None:
    if dist.get_rank() == 1:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + (8 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


@pytest.mark.parametrize(
    ("lacking", "said"), [(_no_more_files, "Too many open files"), (_no_more_memory, "Cannot allocate memory")]
)
def test_what_one_rank_lacks_ends_the_start_on_all(folder: RunFolder, lacking: Callable[[], None], said: str):
    before = _tree(folder)
    first, second = run_world(2, _choose, folder.root, lacking, megatron=True)
    assert first == second
    assert str(first).startswith(f"rank 1 cannot read {folder.checkpoint(6)}")
    assert said in str(first)
    assert _tree(folder) == before


def test_the_command_ends_with_1_and_one_line(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    (folder.root / "done").unlink()
    _io_error(folder.checkpoint(6) / "metadata.json")
    assert run_command(monkeypatch, *arguments(folder.root)) == 1
    said = capfd.readouterr().out
    assert said.count("nothing was changed") == 1, said
