"""Templates that loop or grow without end, rows that are too long, memory that is not enough: said, and bounded."""

from __future__ import annotations

import json
import os
import resource
import signal
import threading
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from bft_megatron import cli
from bft_megatron.conversations import chat, tokenizers
from bft_megatron.conversations.chat_tokenizer import ChatTokenizer
from bft_megatron.conversations.template_limits import Limits, TemplateFault
from bft_megatron.data.prepare import Prepared, prepare
from bft_megatron.data.workers import ordered_map
from bft_megatron.errors import UserError
from bft_megatron.reading import readers, sources
from bft_megatron.reading.formats import Conversation
from bft_megatron.recipe.schema import DataSettings
from tests.helpers.material import TINY, chat_of

ENDLESS = {
    "product": "{{ 'a' * 10 ** 10 }}",
    "product of a list": "{{ [0] * 10 ** 10 }}",
    "power": "{{ 10 ** (10 ** 9) % 7 }}",
    "width": "{{ '%10000000000d' % 1 }}",
    "width in a filter": "{{ '%10000000000d' | format(1) }}",
    "width in a method": "{{ '{:10000000000}'.format(1) }}",
    "centred": "{{ 'a' | center(10 ** 10) }}",
    "justified": "{{ 'a'.ljust(10 ** 10) }}",
    "tabs": "{{ '\t'.expandtabs(2 * 10 ** 9) }}",
    "indented": "{{ 'a\nb' | indent(10 ** 10) }}",
    "indented JSON": "{{ [[1]] | tojson(indent=10 ** 10) }}",
    "a batch": "{{ [1] | batch(10 ** 10, 'a') | list }}",
    "slices": "{% for part in [1] | slice(10 ** 10) %}{% endfor %}",
    "joined": "{{ range(100000) | join('a' * 10 ** 6) }}",
    "replaced": "{{ ('a' * 10 ** 6).replace('a', 'a' * 10 ** 6) }}",
    "lipsum": "{{ lipsum(n=10 ** 9) }}",
    "loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "loops that write": "{% for i in range(100000) %}{{ 'a' * 1000 }}{% endfor %}",
    "loops in a block": "{% set b %}{% for i in range(100000) %}{{ 'a' * 10000 }}{% endfor %}{% endset %}{{ b }}",
    "a namespace": "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a macro without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}
SMALL = Limits(row_bytes=1 << 16, seconds=0.2)


@pytest.mark.parametrize("name", [*ENDLESS])
def test_a_template_without_end_is_stopped(tiny: ChatTokenizer, name: str) -> None:
    """By time, by the length of its text or by memory; all three are as before when it has ended."""
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGPROF)
    talk = Conversation(1, chat_of("a", "b"), 1.0)
    with pytest.raises(TemplateFault, match=r"the chat template (takes|writes) more than|without end"):
        chat.render(talk, replace(tiny, template=ENDLESS[name]), "assistant", SMALL)
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGPROF)) == before
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)


def test_a_thread_that_gets_no_signals_is_held_to_the_memory(tiny: ChatTokenizer) -> None:
    said = []

    def render(template: str) -> None:
        try:
            said.append(
                chat.render(Conversation(1, chat_of("a", "b"), 1.0), replace(tiny, template=template), "all", SMALL)
            )
        except TemplateFault as e:
            said.append(str(e))

    for template in (tiny.template, ENDLESS["product"]):
        thread = threading.Thread(target=render, args=(template,))
        thread.start()
        thread.join()
    assert said[0] == chat.render(Conversation(1, chat_of("a", "b"), 1.0), tiny, "all")
    assert "bytes of memory" in said[1]


def test_a_template_that_grows_while_it_is_compiled_is_stopped(tmp_path: Path) -> None:
    """jinja2 works out constant expressions beforehand."""
    template = tmp_path / "endless.jinja"
    template.write_text("{{ 10 ** (10 ** 9) % 7 }}{{ 'a' * 10 ** 9 }}")
    with pytest.raises(TemplateFault, match=rf"{template}: the chat template takes more than .* processor time"):
        tokenizers.load(TINY, str(template), SMALL)


def prepared(folder: Path, source: Path, **settings: Any) -> Prepared:
    return prepare(source, TINY, DataSettings(str(source), seq_length=256, **settings), 1, folder / "cache")


def rows(path: Path, *lines: Any) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


CHAT = {"messages": chat_of("a", "b")}


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
@pytest.mark.parametrize("chunk", [256, 3], ids=["in this process", "in others"])
def test_a_templates_fault_names_template_and_row_and_is_no_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(readers, "CHUNK_ROWS", chunk)
    source = rows(tmp_path / "rows.jsonl", *[CHAT] * 4, {"messages": chat_of("long", "b")}, *[CHAT] * 4)
    template = tmp_path / "endless.jinja"
    template.write_text("{{ 'x' * 10 ** 11 if messages[0].content == 'long' }}{{ messages[0].content }}")
    with pytest.raises(TemplateFault) as error:
        prepared(tmp_path, source, chat_template=str(template), supervise="all", on_error="skip")
    assert str(error.value).startswith(f"{template}: the chat template takes more than ")
    assert str(error.value).endswith(f"bytes of memory, for the row at {source}:5")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (
            "data.max_row_bytes=50",
            "rows.jsonl:1: the row is longer than data.max_row_bytes, 50 bytes: cut it, or raise",
        ),
        ("data.on_error=skip", "endless.jinja: the chat template takes more than "),
    ],
)
def test_the_command_ends_with_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], setting: str, said: str
) -> None:
    source, template = rows(tmp_path / "rows.jsonl", CHAT), tmp_path / "endless.jinja"
    template.write_text("{{ messages[0].content * 10 ** 11 }}")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {TINY}\ndata: {{train: {source}, chat_template: {template}, seq_length: 256}}\noutput: {tmp_path}\n"
        "train: {iterations: 1}\n"
    )
    monkeypatch.setattr("sys.argv", ["bft-megatron", "inspect", str(recipe), setting])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def longer(kind: str, folder: Path) -> Path:
    """Three rows of which the second is longer than 1,000 bytes."""
    made = [{"instruction": "a", "output": said} for said in ("b", 'é]\\",' * 250, "c")]
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        return rows(path, *made)
    if kind == "json":
        path.write_text(json.dumps(made, indent=1, ensure_ascii=False))
    elif kind == "csv":
        path.write_text('instruction,output\na,b\na,"' + "x\n" * 600 + '"\na,c\n')
    elif kind == "parquet":
        Dataset.from_list(made).to_parquet(path)
    else:
        Dataset.from_list(made).save_to_disk(folder / "saved")
        path = folder / "saved"
    return path


PLACES = {"jsonl": ":2", "json": ":6", "csv": ":3", "parquet": ": row 2", "folder": "/data-00000-of-00001.arrow: row 2"}


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
@pytest.mark.parametrize("kind", [*PLACES])
def test_a_row_that_is_too_long_is_refused_or_skipped(tmp_path: Path, kind: str) -> None:
    path = longer(kind, tmp_path)
    said = f"{path}{PLACES[kind]}: the row is longer than data.max_row_bytes, 1,000 bytes: cut it"
    with pytest.raises(UserError) as error:
        prepared(tmp_path, path, max_row_bytes=1000)
    assert str(error.value).startswith(said)
    assert prepared(tmp_path, path).counts.conversations == 3
    if kind == "csv":  # nothing tells where the row ends
        with pytest.raises(UserError, match="or close its quote"):
            prepared(tmp_path, path, max_row_bytes=1000, on_error="skip")
        return
    made = prepared(tmp_path, path, max_row_bytes=1000, on_error="skip")
    assert (made.counts.conversations, made.counts.refused) == (2, 1)
    assert (made.folder / "refused.txt").read_text().startswith(said)


@pytest.mark.parametrize("size", range(76, 90))
def test_the_longest_row_is_as_long_as_the_setting_says(tmp_path: Path, size: int) -> None:
    """A line without its end; a value of a list without what is around it."""
    row = {"instruction": "é", "output": "b"}
    row["output"] += "c" * (80 - len(json.dumps(row)))
    for name, text in [
        ("rows.jsonl", json.dumps(row) + "\n"),
        ("rows.jsonl", json.dumps(row) + "\r\n"),
        ("rows.jsonl", json.dumps(row)),
        ("rows.json", f"[ {json.dumps(row)} ]"),
    ]:
        (tmp_path / name).write_text(text)
        (chunk,) = sources.open_source(tmp_path / name).chunks(size)
        ((_, _, value),) = chunk
        assert isinstance(value, UserError) == (size < 80)
        assert isinstance(value, UserError) or value == row


@pytest.mark.parametrize("block", [1, 2, 7, 1 << 20])
def test_a_long_value_of_a_list_is_passed_whatever_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr("bft_megatron.reading.json_lists.BLOCK", block)
    values = [1, '\\"]},[' * 20, {"a": ["]", {"\\": '"'}] * 9}, 7 * 10**80, [[[[" "]]]], 2]
    (tmp_path / "values.json").write_text(json.dumps(values, indent=1))
    (chunk,) = readers.read_json(str(tmp_path / "values.json"), 0, 60)
    found = [value if not isinstance(value, UserError) else "long" for _, _, value in chunk]
    assert found == [1, "long", "long", "long", values[4], 2]


@pytest.mark.parametrize("opening", ['{"messages": "', '[{"messages": "', "[[", "[1"])
def test_a_value_of_a_whole_file_is_never_held(tmp_path: Path, opening: str) -> None:
    source = tmp_path / "rows.json"
    source.write_text(opening + ("1," * (1 << 22) if opening == "[[" else "1" * (1 << 24)))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"rows\.json:1: "):
            raise next(value for chunk in sources.open_source(source).chunks(1000) for _, _, value in chunk)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 23


def test_an_answer_a_sample_is_bounded(tmp_path: Path) -> None:
    source = rows(tmp_path / "rows.jsonl", {"messages": chat_of(*["abc"] * 200)})
    counts = prepared(tmp_path, source, turns="split", overlong="truncate").counts
    assert counts.samples + counts.unsupervised == 100
    size = source.stat().st_size
    with pytest.raises(UserError, match=rf"rows\.jsonl:1: data\.turns: split makes more than {4 * size:,} characters"):
        prepared(tmp_path, source, turns="split", max_row_bytes=size)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
@pytest.mark.parametrize("cores", [1, 2])
def test_memory_and_depth_are_sentences(monkeypatch: pytest.MonkeyPatch, cores: int) -> None:
    """In the function, in this process or another, and where the items come from."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))

    def fail(item: Any) -> None:
        raise item if isinstance(item, Exception) else MemoryError

    def items() -> Any:
        yield from (1, 2)
        raise MemoryError

    for given, said in [([1, 2], "memory is not enough"), ([RecursionError()] * 2, "nested too deeply")]:
        with pytest.raises(UserError, match=said):
            list(ordered_map(fail, iter(given)))
    with pytest.raises(UserError, match="memory is not enough"):
        list(ordered_map(str, items()))


def test_a_row_without_enough_memory_is_named(
    tmp_path: Path, tiny: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = rows(tmp_path / "rows.jsonl", CHAT, CHAT)
    monkeypatch.setattr(ChatTokenizer, "quote", _no_memory)
    with pytest.raises(UserError, match=r"rows\.jsonl:1: this machine's memory is not enough"):
        prepared(tmp_path, source, on_error="skip")


def _no_memory(*_: Any) -> None:
    raise MemoryError
