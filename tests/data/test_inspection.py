"""What `inspect` shows is what is trained: text out of the row's ids, masks and edges of the tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from bft_megatron import cli
from bft_megatron.conversations import chat_tokenizer, tokenizers
from bft_megatron.data import inspection, page
from bft_megatron.data.blend import Blend
from bft_megatron.data.dataset import validation_rows
from bft_megatron.data.prepare import Prepared, prepare
from bft_megatron.errors import UserError
from bft_megatron.recipe.schema import DataSettings
from tests.helpers.material import LLAMA, TINY, chat_of

ODD = "naïve 漢字 👩‍👩‍👧 \x1b[31m <|im_end|> \u202e&amp; <b>"
CONVERSATIONS = [
    {"messages": chat_of(ODD, "été 🎉\n\t<script>", "And?", "So.", system="Be brief."), "weight": 2.5},
    {"messages": chat_of("Hi", "Hello!")},
    {"messages": chat_of("Is water wet?", "Yes.")},
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in CONVERSATIONS))
    return path


@pytest.fixture
def prepared(source: Path, tmp_path: Path) -> Prepared:
    return prepare(source, TINY, DataSettings(train=str(source), seq_length=256), 8, tmp_path / "cache")


@pytest.fixture
def row(prepared: Prepared, source: Path, tiny: chat_tokenizer.ChatTokenizer) -> inspection.Row:
    return inspection.read(Blend.of(prepared), [(str(source),)], tiny, 0)


def test_edges_masks_and_weights_are_those_of_the_tensors(row: inspection.Row, prepared: Prepared):
    item = validation_rows(prepared, batch=1)[0]
    edges, labels = item["cu_seqlens"].tolist(), item["labels"]
    assert [sample.start for sample in row.samples] == edges[:3]
    assert [sample.start + sample.tokens + sample.padding for sample in row.samples] == edges[1:4]
    assert [sample.weight for sample in row.samples] == item["weight"][:3].tolist()
    for sample, start, end in zip(row.samples, edges, edges[1:], strict=False):
        supervised = [span.supervised for span in sample.spans for _ in range(span.tokens)][1:]
        assert supervised == (labels[start : start + sample.tokens] != -100).tolist()
        assert sample.supervised == int((labels[start:end] != -100).sum()) > 0


def test_text_is_that_of_the_conversation(row: inspection.Row):
    sample = row.samples[0]
    assert sample.where.endswith("data.jsonl:1")
    assert "".join(s.text for s in sample.spans if s.supervised) == "été 🎉\n\t<script><|im_end|>So.<|im_end|>"
    assert ODD in "".join(s.text for s in sample.spans if not s.supervised)
    assert sum(s.text.count("<|im_end|>") for s in sample.spans if s.control) == 5  # the user's own is text


@settings(max_examples=60, deadline=None)
@given(data=st.data(), text=st.text(st.sampled_from("ab é漢🎉\n "), max_size=20))
def test_spans_join_to_the_whole_wherever_they_part(data: st.DataObject, text: str, tiny: chat_tokenizer.ChatTokenizer):
    ids = tiny.backend.encode(f"<|im_start|>{text}<|im_end|>", add_special_tokens=False).ids
    supervised = data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    spans = inspection.decode(ids, supervised, tiny)
    assert "".join(span.text for span in spans) == f"<|im_start|>{text}<|im_end|>"
    assert [span.supervised for span in spans for _ in range(span.tokens)] == supervised


def test_spaces_between_spans_survive_where_the_tokenizer_strips_the_first(sentencepiece_like: Callable[[str], Path]):
    tokenizer = tokenizers.load(sentencepiece_like(LLAMA))
    ids = tokenizer.backend.encode("What is 漢字, é? Heat.", add_special_tokens=False).ids
    spans = inspection.decode(ids, [i % 2 == 0 for i in range(len(ids))], tokenizer)
    assert "".join(span.text for span in spans) == "What is 漢字, é? Heat."


def test_terminal(row: inspection.Row, capsys: pytest.CaptureFixture[str]):
    inspection.print_row(row, Console(no_color=True, width=40))
    said = capsys.readouterr().out
    assert re.findall("⟦(.*?)⟧", said, re.DOTALL)[1:3] == ["été 🎉\n\t<script><|im_end|>".expandtabs(), "So.<|im_end|>"]
    assert "\x1b" not in said.replace("␛", "")
    assert "<U+202E>" in said
    assert "weight 2.5" in said
    inspection.print_row(row, Console(force_terminal=True, color_system="standard"))
    assert "\x1b[1;32mété 🎉" in capsys.readouterr().out


def test_page_is_self_contained_and_marks_what_is_supervised(row: inspection.Row):
    html = page.page(row)
    marked = "".join(re.findall("<mark>(.*?)</mark>", html.partition("<section")[2], re.DOTALL))
    supervised = "".join(s.text for sample in row.samples for s in sample.spans if s.supervised)
    assert unescape(re.sub("</?b>", "", marked)) == inspection.visible(supervised)
    assert not re.search(r"<script|https?:|url\(|src=", html)
    shares = [int(n) for n in re.findall(r'<a [^>]*style="flex:(\d+)', html)]
    assert shares == [sample.tokens + sample.padding for sample in row.samples]


def test_command(source: Path, tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {TINY}\ndata: {{train: {source}}}\noutput: {tmp_path}\ntrain: {{iterations: 1}}\n")
    words = ["inspect", str(recipe), "data.seq_length=256", "--html", str(tmp_path / "row.html")]
    assert CliRunner().invoke(cli.app, words, catch_exceptions=False).exit_code == 0
    assert "weight 2.5" in (tmp_path / "row.html").read_text()
    with pytest.raises(UserError, match="--row 7: there are the rows 0 to 0"):
        CliRunner().invoke(cli.app, [*words, "--row", "7"], catch_exceptions=False)
    with pytest.raises(UserError, match="cannot write the page: No such file or directory"):
        CliRunner().invoke(cli.app, [*words[:-1], str(tmp_path / "no" / "row.html")], catch_exceptions=False)
