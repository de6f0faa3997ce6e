"""One command at a time uses a folder, whatever becomes of the others, on one machine and on several."""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from bft_megatron.commands.request import read
from bft_megatron.errors import IN_USE, InUse, UserError
from bft_megatron.hf.export import written_whole
from bft_megatron.processes import lease, signals
from bft_megatron.processes.owner import LASTING, Owner, find
from bft_megatron.run.prepared import identity
from tests.helpers.background import Run, arguments
from tests.helpers.commands import ROOT, run_command
from tests.helpers.material import TINY
from tests.helpers.runs import read_metrics

SECONDS = 1.2
"""How long the leases of these tests last."""


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LASTING, str(SECONDS))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "lease"


def elsewhere(**fields: object) -> Owner:
    """A process of another machine."""
    return replace(Owner.here(), host="node7", machine="another", process=4711, **fields)


def write(place: Path, owner: Owner | str) -> Path:
    """A lease that nobody renews."""
    place.mkdir(parents=True)
    file = place / "0123456789abcdef"
    file.write_text(json.dumps(asdict(owner)) if isinstance(owner, Owner) else owner)
    return file


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file with its content and when it was changed, but for what a running process appends to or renews."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.parent.name not in ("lease", "tensorboard"))
    running = [f for f in files if "checkpoints" not in f.parts and f.suffix not in (".log", ".jsonl")]
    return {str(f.relative_to(folder)): (f.stat().st_mtime_ns, f.read_bytes()) for f in running}


class Fork:
    """A process that does something until it is killed."""

    def __init__(self, do: Callable[[], None]) -> None:
        self.pid = os.fork()
        if not self.pid:
            try:
                do()
            finally:
                os._exit(0)

    def kill(self, number: int = 9) -> None:
        os.kill(self.pid, number)
        os.waitpid(self.pid, 0)


def hold(place: Path, rows: str = "") -> None:
    with lease.held(place, rows):
        time.sleep(600)


@pytest.fixture
def holder(place: Path) -> Iterator[Fork]:
    """A process of this machine that holds the lease."""
    fork = Fork(lambda: hold(place))
    while not find(place):
        time.sleep(0.01)
    yield fork
    if Path(f"/proc/{fork.pid}").exists():
        fork.kill()


@pytest.mark.slow
def test_two_trainings_in_one_folder(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """One ends as if it were alone; the other names it, changes nothing, and has a status of its own.

    So has `prepare` of other rows; that of the same rows does no harm.
    """
    out = tmp_path / "run"
    with Run(out) as first:
        first.until("bft on tiny")
        before = state(out)
        for words in (arguments(out), ["prepare", *arguments(out)[1:], "data.seq_length=512"]):
            assert run_command(monkeypatch, *words) == IN_USE
            said = capfd.readouterr().err
            assert said.startswith(f"error: {out} is in use by process {first.process.pid} on {os.uname().nodename}, ")
            assert f"(bft-megatron train recipes/tiny.yaml output={out}" in said
            assert said.count("\n") == 1
        assert run_command(monkeypatch, "prepare", *arguments(out)[1:]) == 0
        assert state(out) == before
        assert first.end() == 0, first.said
    assert not (out / "lease").exists()
    assert read_metrics(out / "metrics.jsonl") == read_metrics(undisturbed / "metrics.jsonl")


def test_a_killed_training_is_followed_by_the_next_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setenv(LASTING, "3000")
    out = tmp_path / "run"
    with Run(out) as killed:
        while not find(out / "lease"):
            time.sleep(0.01)
        killed.process.kill()
        killed.process.wait()
    assert run_command(monkeypatch, *arguments(out, "train.iterations=0")) == 0
    assert f"{out} is free: process {killed.process.pid} on" in capfd.readouterr().err
    assert not (out / "lease").exists()


def test_two_preparations_in_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """Of other rows it is refused, of the same rows both go on."""
    rows = (TINY / "train.jsonl").read_text() * 50
    (tmp_path / "rows.jsonl").write_text(rows)
    words = ["prepare", "recipes/tiny.yaml", f"data.train={tmp_path}/rows.jsonl", f"output={tmp_path}/run"]
    first = Fork(lambda: os._exit(run_command(monkeypatch, *words)))
    while not find(tmp_path / "run" / "lease"):
        time.sleep(0.01)
    assert run_command(monkeypatch, *words, "data.seq_length=512") == IN_USE
    assert f"is in use by process {first.pid} on" in capfd.readouterr().err
    assert run_command(monkeypatch, *words) == 0
    assert os.waitstatus_to_exitcode(os.waitpid(first.pid, 0)[1]) == 0
    assert sorted(f.name for f in (tmp_path / "run").iterdir()) == ["data"]
    assert run_command(monkeypatch, *words, "data.seq_length=512") == 0


def test_changed_data_are_not_exchanged_under_a_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """The same recipe, so that only the rows show it."""
    shutil.copy(TINY / "train.jsonl", tmp_path / "rows.jsonl")
    words = ["recipes/tiny.yaml", f"data.train={tmp_path}/rows.jsonl", f"output={tmp_path}/run"]
    assert run_command(monkeypatch, "prepare", *words) == 0
    before = (tmp_path / "run/data/rows.json").read_bytes()
    (tmp_path / "rows.jsonl").write_text((TINY / "valid.jsonl").read_text())
    request = read(ROOT / words[0], words[1:])
    training = Fork(lambda: hold(tmp_path / "run" / "lease", identity(request.recipe)))
    while not find(tmp_path / "run" / "lease"):
        time.sleep(0.01)
    assert run_command(monkeypatch, "prepare", *words) == IN_USE
    assert f"is in use by process {training.pid} on" in capfd.readouterr().err
    assert (tmp_path / "run/data/rows.json").read_bytes() == before
    training.kill()
    assert run_command(monkeypatch, "prepare", *words) == 0
    assert (tmp_path / "run/data/rows.json").read_bytes() != before


@pytest.mark.slow
@pytest.mark.parametrize("seconds", ["1", "3000"], ids=["at its renewal", "at its first save"])
def test_a_training_that_lost_its_lease_saves_nothing(tmp_path: Path, seconds: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(LASTING, seconds)
    out = tmp_path / "run"
    with Run(out, "train.save_every=1") as run:
        run.until("bft on tiny")
        (file,) = (out / "lease").iterdir()
        (out / "lease" / "fedcba9876543210").write_text(json.dumps(asdict(elsewhere())))
        file.unlink()
        assert run.end() == IN_USE, run.said
    assert f"lost the lease: {out} is in use by process 4711 on node7" in run.said
    assert not (out / "checkpoints" / "latest_checkpointed_iteration.txt").exists()


def test_a_killed_owner_of_this_machine_loses_it_at_once(place: Path, holder: Fork, capfd: pytest.CaptureFixture[str]):
    with (
        pytest.raises(InUse, match=f"is in use by process {holder.pid} on {os.uname().nodename}, since "),
        lease.held(place),
    ):
        pass
    holder.kill()
    with lease.held(place):
        assert len(list(place.iterdir())) == 1
    assert f"{place.parent} is free: process {holder.pid} on" in capfd.readouterr().err
    assert not place.exists()


def test_an_owner_elsewhere_that_renews(place: Path):
    file = write(place, elsewhere(job="77"))
    renewing = Fork(lambda: renew(file))
    with (
        pytest.raises(InUse, match=r"process 4711 on node7 of Slurm's job 77, since .*: let it end, or"),
        lease.held(place),
    ):
        pass
    renewing.kill()
    assert list(place.iterdir()) == [file]


def renew(file: Path) -> None:
    while True:
        time.sleep(SECONDS / 10)
        os.utime(file)


def test_an_owner_elsewhere_that_is_gone(place: Path, capfd: pytest.CaptureFixture[str]):
    """Whoever comes waits for as long as its lease lasts, by a clock of its own, and says so once."""
    os.utime(write(place, elsewhere()), (0, 9e9))  # renewed in a far future, by that machine's clock
    began = time.monotonic()
    with lease.held(place):
        assert time.monotonic() - began >= SECONDS
    said = capfd.readouterr().err
    assert said.count("waiting up to 1 s for a sign of life") == 1
    assert said.count("is free: process 4711 on node7, since") == 1


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"host": "node7"}', json.dumps(asdict(Owner.here()) | {"seconds": -1})]
)
def test_a_damaged_lease_ends_as_one_that_nobody_renews(place: Path, content: str, capfd: pytest.CaptureFixture[str]):
    write(place, content)
    with lease.held(place):
        pass
    said = capfd.readouterr().err
    assert "is in use by an unknown process, with a damaged lease" in said
    assert f"{place.parent} is free: its lease was damaged" in said


def test_a_job_takes_over_its_own_earlier_start(place: Path, monkeypatch: pytest.MonkeyPatch):
    """Slurm runs a job once at a time; another step of the same start may still run."""
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv(LASTING, "3000")
    write(place, elsewhere(job="12", restart=0, seconds=3000.0))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with lease.held(place):
        assert [f.name.startswith("12.1.") for f in place.iterdir()] == [True]
    file = write(place, elsewhere(job="12", restart=1, seconds=SECONDS))
    renewing = Fork(lambda: renew(file))
    with pytest.raises(InUse), lease.held(place):
        pass
    renewing.kill()


def test_of_many_at_once_one_has_it(place: Path):
    """Every one meets the same dead owner's lease; no two of them hold it at a time."""
    write(place, replace(Owner.here(), born=0))
    held = place.parent / "held"

    def compete() -> None:
        try:
            with lease.held(place):
                with held.open("a") as file:
                    file.write(f"{os.getpid()}\n")
                time.sleep(600)
        except InUse:
            os._exit(IN_USE)

    forks = [Fork(compete) for _ in range(12)]
    ended = [os.wait() for _ in forks[1:]]
    assert {os.waitstatus_to_exitcode(status) for _, status in ended} == {IN_USE}
    (owner,) = {fork.pid for fork in forks} - {pid for pid, _ in ended}
    assert held.read_text() == f"{owner}\n"
    next(fork for fork in forks if fork.pid == owner).kill()


def test_a_lease_that_someone_removed_is_taken_again(place: Path):
    with lease.held(place):
        (file,) = place.iterdir()
        file.unlink()
        while not find(place):
            time.sleep(0.01)
        assert list(place.iterdir()) == [file]


def test_a_lease_that_cannot_be_renewed_ends_nothing(place: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        tried.append(1)
        raise OSError(116, "Stale file handle")

    tried: list[int] = []
    monkeypatch.setattr(os, "utime", fail)
    with lease.held(place):
        while len(tried) < 3:
            time.sleep(0.01)
        lease.check(place)


def test_a_lost_lease_ends_its_owner_and_what_it_started(place: Path, holder: Fork):
    (file,) = place.iterdir()
    os.kill(holder.pid, 19)  # it stands still for longer than its lease lasts
    file.rename(place / "fedcba9876543210")
    (place / "fedcba9876543210").write_text(json.dumps(asdict(elsewhere())))
    os.kill(holder.pid, 18)
    assert os.waitstatus_to_exitcode(os.waitpid(holder.pid, 0)[1]) == IN_USE
    assert [f.name for f in place.iterdir()] == ["fedcba9876543210"]


def test_nothing_is_saved_in_a_folder_that_is_anothers(place: Path, monkeypatch: pytest.MonkeyPatch):
    write(place, elsewhere())
    lease.check(place)  # of a process that never held it
    monkeypatch.setenv("BFT_MEGATRON_LEASE", "fedc")
    with pytest.raises(InUse, match=r"lost the lease: .* in use by process 4711 on node7"):
        lease.check(place)


def test_a_folder_without_a_lease_is_used_all_the_same(place: Path, capfd: pytest.CaptureFixture[str]):
    """Whatever cannot be written in it is said by the command; what can be written must be guarded by a person."""
    with lease.held(Path("/proc/run/lease")):
        pass
    assert capfd.readouterr().err == ""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (200, before[1])
    )  # as on a full disk: a lease is longer, the warning shorter
    try:
        with lease.held(place):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = f"warning: {place.parent}: cannot keep other commands out of it: File too large\n"
    assert capfd.readouterr().err == said


def test_ranks_of_another_launcher_wait_for_rank_0(place: Path, monkeypatch: pytest.MonkeyPatch):
    """And they end with the same status if another command holds the folder."""
    for name, value in {"MASTER_ADDR": "node1", "MASTER_PORT": "29500", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    began = place.parent / "began"

    def begin() -> None:
        os.environ["RANK"] = "1"
        with lease.held(place):
            lease.join(place)
        began.touch()

    monkeypatch.setenv(LASTING, "60")
    rank_1 = Fork(begin)
    time.sleep(0.3)
    assert not began.exists()
    with lease.held(place):
        os.waitpid(rank_1.pid, 0)
        assert began.exists()
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("MASTER_PORT", "29501")
        monkeypatch.delenv("BFT_MEGATRON_LEASE")
        with pytest.raises(InUse):
            lease.join(place)


@pytest.mark.parametrize("number", [1, 2, 15])
def test_an_interrupted_command_gives_it_back(place: Path, number: int):
    holder = Fork(lambda: (signals.end_on_signals(), hold(place)))
    while not find(place):
        time.sleep(0.01)
    holder.kill(number)
    assert not place.exists()


@pytest.mark.parametrize(
    "name", ["BFT_MEGATRON_LEASE_SECONDS=", "BFT_MEGATRON_LEASE_SECONDS=nan", "BFT_MEGATRON_LEASE_SECONDS=-1"]
)
def test_a_length_that_is_none(place: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(*name.split("="))
    with pytest.raises(UserError, match="BFT_MEGATRON_LEASE_SECONDS: must be seconds"), lease.held(place):
        pass


def test_two_exports_to_one_folder(tmp_path: Path):
    """The second is refused by name, and leaves the first one's files alone."""

    def export() -> None:
        with written_whole(tmp_path / "out", "first") as partial:
            (partial / "model.safetensors").write_text("half")
            time.sleep(600)

    first = Fork(export)
    half = tmp_path / ".out.partial" / "model.safetensors"
    while not half.exists() or not half.read_text():
        time.sleep(0.01)
    with (
        pytest.raises(InUse, match=f"{tmp_path}/out is in use by process {first.pid} on "),
        written_whole(tmp_path / "out", "second"),
    ):
        pass
    assert half.read_text() == "half"
    first.kill()
    with written_whole(tmp_path / "out", "first") as partial:
        assert (partial / "model.safetensors").read_text() == "half"
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link", "fifo", "lease's name", "instead of it"])
def test_what_is_no_lease_is_left_alone(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "lease"
    if kind == "instead of it":
        place.write_text("mine")
    else:
        place.mkdir()
        file = place / ("0123456789abcdef" if kind == "lease's name" else "contract.pdf")
        make = {
            "file": file.touch,
            "dangling link": lambda: file.symlink_to("nowhere"),
            "fifo": lambda: os.mkfifo(file),
        }
        make.get(kind, file.mkdir)()
    with pytest.raises(UserError, match="is no lease, and in its place: move it away"), lease.held(place):
        pass
    assert place.is_file() or [*place.iterdir()] == [file]
