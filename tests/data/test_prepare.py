"""Preparing: counts, the cache's key, and that nothing ever looks whole that isn't."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset
from rich.console import Console

from bft_megatron.conversations import chat, chat_tokenizer
from bft_megatron.data.counts import Counts
from bft_megatron.data.folders import appearing_whole
from bft_megatron.data.prepare import Prepared, load, prepare
from bft_megatron.data.summary import summary_table
from bft_megatron.data.workers import ordered_map
from bft_megatron.errors import FieldError, UserError
from bft_megatron.reading import readers, sources
from bft_megatron.recipe.schema import DataSettings
from tests.helpers.material import CHATML, TINY, chat_of, unmarked

SETTINGS = DataSettings(train=str(TINY / "train.jsonl"), valid=str(TINY / "valid.jsonl"), seq_length=256)


def prepared(cache: Path, settings: DataSettings = SETTINGS, model: Path = TINY, multiple: int = 4) -> Prepared:
    return prepare(settings.train, model, settings, multiple, cache)


def source(folder: Path, *rows: dict, name: str = "rows.jsonl") -> DataSettings:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return replace(SETTINGS, train=str(path))


PROGRAM = """
import resource, sys
from bft_megatron.data.folders import appearing_whole
from bft_megatron.data.prepare import prepare
from bft_megatron.errors import UserError
from bft_megatron.recipe.schema import DataSettings

source, model, cache, file_size = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (int(file_size), -1))
try:
    prepare(source, model, DataSettings(source, seq_length=256), 4, cache)
except (UserError, OSError) as e:
    sys.exit(f"{type(e).__name__}: {e}")
assert "torch" not in sys.modules
"""


def started(cache: Path, settings: DataSettings = SETTINGS, file_size: int = -1) -> subprocess.Popen[str]:
    """`prepared` in a process of its own, which imports no torch and may write files of `file_size` bytes."""
    command = [sys.executable, "-c", PROGRAM, settings.train, str(TINY), str(cache), str(file_size)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def shown(**sources: Prepared) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(summary_table(sources))
    return console.file.getvalue()


def test_keeps_every_conversation_as_it_is_encoded(tmp_path: Path, tiny: chat_tokenizer.ChatTokenizer) -> None:
    rows = [{"messages": chat_of("a", "b" * n), "weight": n} for n in (1, 5, 9)]
    result = prepared(tmp_path / "cache", source(tmp_path, *rows))
    samples = list(Dataset.from_file(str(result.folder / "samples.arrow")))
    for line, (row, sample) in enumerate(zip(rows, samples, strict=True), start=1):
        assert (sample["tokens"], sample["learned"]) == chat.encode(row["messages"], tiny, "assistant")
        assert (sample["weight"], sample["line"]) == (row["weight"], line)


def test_counts_what_it_keeps(tmp_path: Path, tiny: chat_tokenizer.ChatTokenizer) -> None:
    result = prepared(tmp_path)
    encoded = [chat.encode(c.messages, tiny, "assistant") for c in sources.read(SETTINGS.train)]
    turns = sum(m["role"] == "assistant" for c in sources.read(SETTINGS.train) for m in c.messages)
    assert result.counts == Counts(
        conversations=40,
        samples=40,
        rows=result.rows,
        tokens=sum(len(tokens) - 1 for tokens, _ in encoded),
        supervised=sum(sum(mask) for _, mask in encoded),
        highest_token=max(max(tokens) for tokens, _ in encoded),
        lengths=result.counts.lengths,
        turns=turns,
        ends={"2": turns},
    )
    for k, n in enumerate(result.counts.lengths):
        assert n == sum(2**k / 2 < len(tokens) - 1 <= 2**k for tokens, _ in encoded)
    assert result.efficiency == result.counts.tokens / (result.rows * 256)
    rows = Dataset.from_file(str(result.folder / "rows.arrow"))["samples"]
    assert len(rows) == result.rows
    assert sorted(sample for row in rows for sample in row) == list(range(40))


def test_without_packing_a_row_is_a_sample(tmp_path: Path) -> None:
    result = prepared(tmp_path, replace(SETTINGS, packing=False))
    assert list(Dataset.from_file(str(result.folder / "rows.arrow"))["samples"]) == [[i] for i in range(40)]


def test_overlong_samples_are_dropped_or_truncated_and_counted(tmp_path: Path) -> None:
    settings = replace(SETTINGS, seq_length=64)
    dropped = prepared(tmp_path, settings)
    truncated = prepared(tmp_path, replace(settings, overlong="truncate"))
    assert dropped.counts.overlong == truncated.counts.overlong > 0
    assert dropped.counts.samples + dropped.counts.overlong == 40
    assert truncated.counts.samples + truncated.counts.unsupervised == 40
    lengths = [len(tokens) - 1 for tokens in Dataset.from_file(str(truncated.folder / "samples.arrow"))["tokens"]]
    assert max(lengths) == 64
    assert re.search(rf"too long, dropped +│ +{dropped.counts.overlong} │ +0 │", shown(a=dropped, b=truncated))
    assert re.search(rf"too long, truncated +│ +0 │ +{dropped.counts.overlong} │", shown(a=dropped, b=truncated))


def test_samples_without_a_supervised_label_are_dropped_and_counted(tmp_path: Path) -> None:
    short, long = chat_of("a", "b"), chat_of("a b c d e f g h i j k l m n o", "b")
    settings = replace(source(tmp_path, {"messages": short}, {"messages": long}), seq_length=16, overlong="truncate")
    counts = prepared(tmp_path, settings).counts
    assert (counts.conversations, counts.overlong, counts.unsupervised, counts.samples) == (2, 1, 1, 1)
    with pytest.raises(UserError, match=r"rows\.jsonl: nothing is left .*: of 1 rows, 1 samples are too long$"):
        prepared(tmp_path, replace(source(tmp_path, {"messages": long}), seq_length=16))
    said = r"of 1 rows, 1 samples are too long and truncated, 1 samples have nothing to learn$"
    with pytest.raises(UserError, match=said):
        prepared(tmp_path, replace(settings, train=source(tmp_path, {"messages": long}).train))


def test_is_found_again_and_is_the_same(tmp_path: Path) -> None:
    first = prepared(tmp_path)
    before = {file: file.stat() for file in first.folder.iterdir()}
    assert prepared(tmp_path) == first == load(first.folder)
    assert {file: file.stat() for file in first.folder.iterdir()} == before


def test_anything_that_changes_the_rows_changes_the_folder(tmp_path: Path, model_with: Callable[..., Path]) -> None:
    rows = [{"messages": chat_of("a", "b", "c", "d")}, {"messages": chat_of("x", "y")}]
    settings = source(tmp_path, *rows)
    model = model_with(unmarked(CHATML))
    made = [
        prepared(tmp_path, settings, model),
        prepared(tmp_path, source(tmp_path, rows[0], name="other.jsonl"), model),
        prepared(tmp_path, settings, model, multiple=8),
        prepared(tmp_path, settings, model_with(CHATML, name="marked")),
        prepared(tmp_path, settings, model_with(unmarked(CHATML), "<|new|>", name="new_token")),
        *(
            prepared(tmp_path, replace(settings, **change), model)
            for change in (
                {"seq_length": 128},
                {"packing": False},
                {"overlong": "truncate"},
                {"supervise": "last"},
                {"special_tokens": "all"},
            )
        ),
    ]
    assert len({result.folder for result in made}) == len(made)


def test_the_same_content_elsewhere_is_the_same(tmp_path: Path) -> None:
    row = {"messages": chat_of("a", "b")}
    first = prepared(tmp_path, source(tmp_path, row))
    for name in ("copy.jsonl", "copy.ndjson", "copy.JSONL", "copy"):
        assert prepared(tmp_path, source(tmp_path, row, name=name)) == first


def test_the_same_content_read_otherwise_is_another(tmp_path: Path) -> None:
    row = {"messages": chat_of("a", "b")}
    prepared(tmp_path, source(tmp_path, row))
    with pytest.raises(UserError, match=r"copy\.csv"):
        prepared(tmp_path, source(tmp_path, row, name="copy.csv"))


def test_a_bad_line_leaves_nothing_behind(tmp_path: Path) -> None:
    settings = source(tmp_path, {"messages": chat_of("a", "b")}, {"messages": chat_of("a", "")})
    with pytest.raises(UserError, match=r"rows\.jsonl:2: messages\[1\].content"):
        prepared(tmp_path / "cache", settings)
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_the_template_refuses_is_named_by_line(tmp_path: Path) -> None:
    settings = source(tmp_path, {"messages": chat_of("a", "b")}, {"messages": chat_of("a", "\ufdd0")})
    with pytest.raises(UserError, match=r"rows\.jsonl:2: the text holds"):
        prepared(tmp_path, settings)


def test_a_missing_file_names_its_field(tmp_path: Path) -> None:
    settings = replace(SETTINGS, valid="none.jsonl")
    with pytest.raises(FieldError) as error:
        prepare(settings.valid, TINY, settings, 4, tmp_path, "data.valid")
    assert error.value.field == "data.valid"


def test_a_killed_prepare_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    many, cache = tmp_path / "many.jsonl", tmp_path / "cache"
    many.write_text(Path(SETTINGS.train).read_text() * 50)
    settings = replace(SETTINGS, train=str(many))
    with started(cache, settings) as process:
        while not list(cache.glob(".*/samples.arrow")):
            assert process.poll() is None, "it ended too early to be killed"
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -9
    assert [path.name[0] for path in cache.iterdir()] == ["."]
    result = prepared(cache, settings)
    assert result.counts.samples == 40 * 50
    assert len(Dataset.from_file(str(result.folder / "samples.arrow"))) == 40 * 50


def test_what_a_killed_process_left_is_swept_by_the_next(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    host = socket.gethostname()
    for name in (f".key.0.{ended.pid}.{host}", f".key.1.{os.getpid()}.{host}", f".key.2.{ended.pid}.another"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "samples.arrow").write_text("half")
    prepared(tmp_path)
    left = {path.name for path in tmp_path.glob(".*")}
    assert left == {f".key.1.{os.getpid()}.{host}", f".key.2.{ended.pid}.another"}


def test_rows_that_are_no_conversation_are_skipped_counted_and_listed(tmp_path: Path) -> None:
    rows = [
        {"messages": chat_of("a", "b")},
        *[{"messages": chat_of("a", "")}] * 7,
        {"messages": chat_of("c", "\ufdd0")},
    ]
    settings = replace(source(tmp_path, *rows), on_error="skip")
    result = prepared(tmp_path / "cache", settings)
    assert (result.counts.conversations, result.counts.refused, result.counts.samples) == (1, 8, 1)
    refused = (result.folder / "refused.txt").read_text().splitlines()
    assert [line.split(":")[1] for line in refused] == [str(n) for n in range(2, 10)]
    said = " ".join(shown(train=result).split())
    assert re.search(r"rows refused │ 8 │", said)
    assert said.count("an assistant's message must not be empty") == 5
    assert "... and 3 more" in said
    assert not (prepared(tmp_path / "cache").folder / "refused.txt").exists()
    said = r"of 1 rows, 1 are no conversations; .*bad\.jsonl:1: messages\[1\]\.content: an assistant's message"
    with pytest.raises(UserError, match=f"nothing is left to learn from: {said}"):
        prepared(tmp_path / "cache", replace(source(tmp_path, rows[1], name="bad.jsonl"), on_error="skip"))


def test_a_row_a_turn(tmp_path: Path, tiny: chat_tokenizer.ChatTokenizer) -> None:
    rows = [{"messages": chat_of("a", "b", "c", "d", "e", "f")}]
    settings = source(tmp_path, *rows)
    split = prepared(tmp_path, replace(settings, turns="split"))
    samples = Dataset.from_file(str(split.folder / "samples.arrow"))
    assert split.counts.samples == 3
    for k, sample in enumerate(samples, start=1):
        assert (sample["tokens"], sample["learned"]) == chat.encode(rows[0]["messages"][: 2 * k], tiny, "last")


def test_another_template_is_another_folder(tmp_path: Path) -> None:
    rows = [{"messages": chat_of("a", "b")}]
    settings = source(tmp_path, *rows)
    plain = prepared(tmp_path, settings)
    file = tmp_path / "template.jinja"
    file.write_text("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}")
    own = prepared(tmp_path, replace(settings, chat_template=str(file)))
    assert own.counts.tokens < plain.counts.tokens
    file.write_text("{% for m in messages %}!{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}")
    assert len({r.folder for r in (plain, own, prepared(tmp_path, replace(settings, chat_template=str(file))))}) == 3
    file.write_text("")  # it writes nothing, so nothing is left to learn from
    with pytest.raises(UserError):
        prepared(tmp_path, replace(settings, chat_template=str(file)))
    file.write_text("{% for m in messages %}\n{% nothing %}")
    with pytest.raises(FieldError, match=r"template\.jinja, line 2 of the template: Encountered unknown tag 'nothing'"):
        prepared(tmp_path, replace(settings, chat_template=str(file)))
    with pytest.raises(FieldError, match="chatty is no template's name"):
        prepared(tmp_path, replace(settings, chat_template="chatty"))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_many_processes_write_what_one_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "CHUNK_ROWS", 3)
    made = []
    for cores in (1, 3):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=cores: set(range(n)))
        made.append(prepared(tmp_path / str(cores), replace(SETTINGS, overlong="truncate", seq_length=64)))
    one, three = made
    assert replace(three, folder=one.folder) == one
    for name in ("samples", "rows"):
        tables = [Dataset.from_file(str(m.folder / f"{name}.arrow")) for m in made]
        assert tables[0].to_dict() == tables[1].to_dict()


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_a_killed_worker_is_said_and_a_bad_row_ends_all() -> None:
    def end(item: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL if item == 5 else 0)
        return item

    with pytest.raises(UserError, match="was killed, most likely for want of memory"):
        list(ordered_map(end, iter(range(50))))

    def refuse(item: int) -> int:
        if item == 5:
            raise UserError("no", "rows:5")
        return item

    with pytest.raises(UserError, match="rows:5: no"):
        list(ordered_map(refuse, iter(range(50))))
    assert list(ordered_map(lambda item: 2 * item, iter(range(50)))) == list(range(0, 100, 2))


def test_two_at_once_end_with_one_folder(tmp_path: Path) -> None:
    for process in [started(tmp_path), started(tmp_path)]:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    (folder,) = tmp_path.iterdir()
    assert load(folder).counts.samples == 40


def test_a_full_disk_is_no_error_of_the_users_and_leaves_nothing(tmp_path: Path) -> None:
    """The kernel refuses to let a file grow, as where a disk or a quota is full; a job that is tried again goes on."""
    process = started(tmp_path, file_size=4096)
    _, errors = process.communicate(timeout=60)
    assert errors == f"OSError: {tmp_path}: cannot write the prepared data: File too large\n"
    assert list(tmp_path.iterdir()) == []


def write_to_a_full_disk(folder: Path) -> None:
    with appearing_whole(folder) as part:
        (part / "samples.arrow").symlink_to("/dev/full")
        (part / "samples.arrow").write_text("full")


def test_a_disk_without_room_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=f"{tmp_path}: cannot write the prepared data: No space left on device"):
        write_to_a_full_disk(tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_made_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the prepared data"):
        prepared(tmp_path / "file" / "cache")
