"""The rows of a run: one process makes them, ranks open them or wait, and never in a collective."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from bft_megatron.commands.request import Request
from bft_megatron.errors import FieldError, UserError
from bft_megatron.hf.architectures import read_config
from bft_megatron.recipe import reader, rules
from bft_megatron.recipe.schema import Recipe
from bft_megatron.run.folder import RunFolder
from bft_megatron.run.prepared import RunRows, open_rows, prepare_rows, rows_of_rank
from tests.helpers.material import TINY


def made(folder: Path, *overrides: str) -> Recipe:
    paths = [f"model={TINY}", f"data.train={TINY / 'train.jsonl'}", f"data.valid={TINY / 'valid.jsonl'}"]
    return reader.load(TINY.parent / "tiny.yaml", [*paths, f"output={folder}", *overrides])


def never() -> RunRows:
    raise AssertionError("a rank above 0 prepares nothing")


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of rank 0 of two on one machine."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_several_sources_are_opened_as_they_were_prepared(tmp_path: Path) -> None:
    sources = f"[{{path: {TINY}/train.jsonl, weight: 2}}, {{path: {TINY}/valid.jsonl, name: more, weight: 0.5}}]"
    wanted = made(tmp_path, f"data.train={sources}")
    rows = prepare_rows(wanted, TINY, 500)
    assert open_rows(wanted) == rows
    assert rows.train.names == ("train", "more")
    first, second = (part.prepared.rows for part in rows.train.parts)
    assert rows.train.rows == 2 * first + round(second / 2)
    with pytest.raises(UserError, match=r"prepared with data .* run `bft-megatron prepare RECIPE`"):
        open_rows(made(tmp_path, f"data.train={sources}", "data.seq_length=128"))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_ranks_of_one_machine_wait_for_rank_0(tmp_path: Path, rank: pytest.MonkeyPatch) -> None:
    wanted, said = made(tmp_path / "run"), tmp_path / "said"
    pid = os.fork()
    if not pid:
        os.environ["RANK"] = "1"
        said.write_text(str(rows_of_rank(wanted, never)))
        os._exit(0)
    time.sleep(0.2)
    assert not said.exists()
    rows = rows_of_rank(wanted, lambda: prepare_rows(wanted, TINY, 500))
    assert os.waitpid(pid, 0)[1] == 0
    assert said.read_text() == str(rows)
    assert rows_of_rank(wanted, never) == rows


def test_many_machines_without_rows_are_refused_with_the_command(tmp_path: Path, rank: pytest.MonkeyPatch) -> None:
    rank.setenv("LOCAL_WORLD_SIZE", "1")
    with pytest.raises(UserError, match="run `bft-megatron prepare RECIPE` once, before the job"):
        rows_of_rank(made(tmp_path), never)


def test_a_tokenizer_beyond_the_models_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FieldError, match="they do not match"):
        prepare_rows(made(tmp_path), TINY, 100)


def test_a_warm_up_as_long_as_the_epochs_is_refused_once_the_rows_are_counted(tmp_path: Path) -> None:
    epochs = ("train.iterations=null", "train.epochs=1", "train.warmup_iterations=100")
    with pytest.raises(FieldError, match=r"train\.warmup_iterations: must be below the \d+ steps of train\.epochs"):
        prepare_rows(made(tmp_path, *epochs), TINY, 512)


def test_a_row_a_turn_learns_every_answer(tmp_path: Path) -> None:
    with pytest.raises(FieldError, match="split makes a sample of each"):
        rules.check_recipe(made(tmp_path, "data.turns=split", "data.supervise=last"), read_config(TINY))


def test_a_template_of_the_recipes_own_goes_with_the_model(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}{{ m.content }}{% endfor %}é")
    wanted = made(tmp_path / "run", f"data.chat_template={file}")
    rows = prepare_rows(made(tmp_path / "run"), TINY, 500)
    Request(TINY.parent / "tiny.yaml", [], wanted, read_config(TINY)).describe_run(rows)
    assert AutoTokenizer.from_pretrained(RunFolder.of(wanted).model).chat_template == file.read_text()
