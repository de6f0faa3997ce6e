"""A run that is killed goes on as if nothing had happened; one that is finished says so; one that is changed is
refused.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path

import pytest
from megatron.core import dist_checkpointing

from bft_megatron.run.folder import RunFolder
from tests.checkpoint.soak import differences, finish, kill_once, overrides
from tests.helpers.background import STEPS, Run, arguments
from tests.helpers.commands import command, run_command
from tests.helpers.material import TINY
from tests.helpers.runs import read_metrics


@pytest.mark.slow
def test_a_run_whose_processes_are_killed_ends_with_the_same_bits(undisturbed: Path, tmp_path: Path):
    """A rank in a save, then the launcher; `make soak` kills thirty ranks."""
    out = tmp_path / "killed"
    kill = kill_once(out, overrides(STEPS), "in a save", random.Random(4))
    assert kill is not None
    _kill_the_launcher(out)
    finish(out, overrides(STEPS))
    assert differences(out, undisturbed, STEPS) == []


def _kill_the_launcher(out: Path) -> None:
    """After the first step that is reported; its ranks must not outlive it."""
    with Run(out, *overrides(STEPS)) as run:
        ranks = run.until("step ").ranks()
        run.process.kill()
        deadline = time.monotonic() + 30
        while any(_command(pid) for pid in ranks):
            assert time.monotonic() < deadline, "a rank outlived its launcher"
            time.sleep(0.05)


def _command(pid: int) -> bytes:
    """Empty of a process that has ended and that nobody asked for its status."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_adam_has_counted_every_step(undisturbed: Path):
    common = dist_checkpointing.load_common_state_dict(str(RunFolder(undisturbed).checkpoint(STEPS)))
    assert [group["step"] for group in common["optimizer"]["optimizer"]["param_groups"]] == [STEPS] * 2


def test_a_finished_run_says_so(undisturbed: Path):
    before = (undisturbed / "metrics.jsonl").read_bytes()
    done = command(*arguments(undisturbed))
    assert done.returncode == 0
    assert f"finished: {undisturbed} holds the checkpoint of the last step, {STEPS}" in done.stdout
    assert (undisturbed / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("change", ["train.iterations=9", "train.lr=1", "objective.name=sft", "data.seq_length=128"])
def test_another_schedule_objective_or_data_is_refused(undisturbed: Path, change: str):
    done = command(*arguments(undisturbed, change))
    assert done.returncode == 2
    said = " ".join(done.stderr.split())
    assert f"{change}: {undisturbed} holds checkpoints of a run with {change.partition('=')[0]}" in said
    assert "set it back to go on with that run, or choose another output folder" in said


def test_another_config_in_the_models_folder_is_refused(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    folder, model = RunFolder(tmp_path / "run"), tmp_path / "model"
    shutil.copytree(undisturbed, folder.root)
    shutil.copytree(TINY, model)
    folder.config.write_text(folder.config.read_text().replace("recipes/tiny\n", f"{model}\n"))
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(values | {"rope_theta": 50}))
    assert run_command(monkeypatch, *arguments(folder.root, f"model={model}")) == 2
    said = " ".join(capfd.readouterr().err.split())
    assert f"model={model}: its config.json has changed" in said
    assert "checkpoints of a run with rope_theta 10000.0, not 50.0" in said


@pytest.fixture(scope="module")
def after_an_out_of_memory(undisturbed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run as it was at step 4, resumed on another layout with less memory, other validation data and time-outs."""
    out = tmp_path_factory.mktemp("changed") / "run"
    shutil.copytree(undisturbed, out)
    shutil.rmtree(RunFolder(out).checkpoint(STEPS))
    memory = ["objective.head=chunked", "objective.chunk_size=64", "objective.kernels=torch"]
    memory += [f"megatron.recompute_{flag}" for flag in ("granularity=full", "method=uniform", "num_layers=1")]
    rest = ["megatron.distributed-timeout-minutes=5", "megatron.log-timers-to-tensorboard=true"]
    rest += ["megatron.dist-ckpt-optim-fully-reshardable=false"]  # how the next checkpoint is written
    rest += [
        "megatron.overlap-grad-reduce=true",
        "megatron.overlap-param-gather=true",
        "megatron.ddp-bucket-size=20000",
    ]
    rest += ["parallel.tensor=1", "parallel.data=2", "megatron.num-workers=1"]
    with pytest.MonkeyPatch.context() as patch:
        words = arguments(out, f"data.valid={TINY / 'train.jsonl'}", "train.save_every=1", *memory, *rest)
        assert run_command(patch, *words) == 0
    return out


def test_what_leaves_the_numbers_alone_may_change(undisturbed: Path, after_an_out_of_memory: Path):
    expected, valid_expected = read_metrics(RunFolder(undisturbed).metrics)
    train, valid = read_metrics(RunFolder(after_an_out_of_memory).metrics)
    assert [line["iteration"] for line in train] == list(range(1, STEPS + 1))
    assert train[:4] == expected[:4]  # these were not taken again
    for line, wanted in zip(train[4:], expected[4:], strict=True):
        assert line == pytest.approx(wanted, rel=1e-5)
    assert valid[:-1] == valid_expected[:-1]
    assert valid[-1]["tokens"] > valid_expected[-1]["tokens"]


def test_a_finished_run_asked_for_more_steps_says_the_way_on(after_an_out_of_memory: Path, tmp_path: Path):
    """The way is gone: the new run begins with the model that the finished one ended with."""
    out = after_an_out_of_memory
    said = " ".join(command(*arguments(out, "train.iterations=9")).stderr.split())
    way = f"or choose another output folder; to train its model further, set model={out} and init=pretrained there"
    assert said.endswith(way)
    more = ["init=pretrained", f"data.valid={TINY / 'train.jsonl'}", "train.iterations=3", f"model={out}"]
    with pytest.MonkeyPatch.context() as patch:
        assert run_command(patch, *arguments(tmp_path / "more", *more)) == 0
    train, valid = read_metrics(RunFolder(tmp_path / "more").metrics)
    assert [line["iteration"] for line in train] == [1, 2, 3]
    ended = read_metrics(RunFolder(out).metrics)[1][-1]
    assert (valid[0].pop("iteration"), ended.pop("iteration")) == (0, STEPS)
    assert (valid[0].pop("split"), ended.pop("split")) == ("valid", "valid")
    assert valid[0] == pytest.approx(ended, rel=1e-5)
