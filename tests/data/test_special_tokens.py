"""Text stays text unless the recipe names the token; what was found as text is counted."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from rich.console import Console
from tokenizers import AddedToken, Tokenizer

from bft_megatron.conversations import chat_tokenizer, special_tokens, tokenizers
from bft_megatron.data import inspection
from bft_megatron.data.prepare import Prepared, prepare
from bft_megatron.data.summary import summary_table
from bft_megatron.errors import FieldError, UserError
from bft_megatron.recipe.schema import DataSettings
from tests.helpers.commands import run_command
from tests.helpers.material import CHATML, TINY, chat_of

A, B, TOOL = 500, 501, 502


@pytest.fixture
def model(model_with: Callable[..., Path]) -> Path:
    """ChatML with a user's own <|a|> and <|b|>, and a token for calls that is matched in any text, as Qwen's."""
    folder = model_with(CHATML, "<|a|>", "<|b|>")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def made(folder: Path, model: Path, *answers: str, **settings: Any) -> Prepared:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": chat_of("q", text)}) + "\n" for text in answers))
    return prepare(path, model, DataSettings(str(path), seq_length=256, **settings), 1, folder / "cache")


def tokens(result: Prepared) -> list[list[int]]:
    return list(Dataset.from_file(str(result.folder / "samples.arrow"))["tokens"])


def test_text_stays_text_and_is_counted(model: Path, tmp_path: Path) -> None:
    result = made(tmp_path, model, "x<|a|>y<|a|>", "<|a|><|b|>", "plain", "<|im_end|>")
    for sample in tokens(result):
        assert not {A, B} & set(sample)
        assert sample.count(2) == 2  # of the two turns, whatever the answer spells
    note = "is in messages and learned as text, not as the control token; if it should be the token, name it in"
    assert result.counts.notes == {
        f"<|a|> {note} data.special_tokens": 2,
        f"<|b|> {note} data.special_tokens": 1,
        f"<|im_end|> {note} data.special_tokens": 1,
    }
    console = Console(file=io.StringIO(), width=200)
    console.print(summary_table({"rows": result}))
    assert f"rows, 2 samples: <|a|> {note} data.special_tokens" in console.file.getvalue()


def test_named_tokens_are_tokens(model: Path, tmp_path: Path) -> None:
    (sample,) = tokens(found := made(tmp_path, model, "x<|a|>y<|b|>", special_tokens=["<|a|>"]))
    assert (sample.count(A), sample.count(B)) == (1, 0)
    assert len(found.counts.notes) == 1
    assert next(iter(found.counts.notes)).startswith("<|b|>")
    (sample,) = tokens(every := made(tmp_path, model, "x<|a|>y<|b|><|im_end|>", special_tokens="all"))
    assert (sample.count(A), sample.count(B), sample.count(2)) == (1, 1, 3)
    assert every.counts.notes == {}
    assert every.folder != found.folder


def test_named_tokens_are_where_transformers_has_them(model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    messages = chat_of("<|a|>q", "x<|a|>y")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": messages}))
    settings = DataSettings(str(path), seq_length=256, special_tokens=["<|a|>"])
    (sample,) = tokens(prepare(path, model, settings, 1, tmp_path / "cache"))
    reference = AutoTokenizer.from_pretrained(model).apply_chat_template(messages)["input_ids"]
    assert reference[: len(sample)] == sample  # after the last turn, the template's newline is not in the sample
    assert len(reference) - len(sample) <= 1


def test_added_tokens_that_are_not_special_are_tokens_in_any_text(model: Path, tmp_path: Path) -> None:
    (sample,) = tokens(result := made(tmp_path, model, "<tool_call>x"))
    assert TOOL in sample
    assert result.counts.notes == {}
    (named,) = tokens(made(tmp_path, model, "<tool_call>x", special_tokens=["<tool_call>"]))
    assert named == sample


def test_inspect_shows_named_tokens_as_control(model: Path, tmp_path: Path) -> None:
    for named, control in ((None, False), (["<|a|>"], True)):
        (sample,) = tokens(made(tmp_path, model, "x<|a|>y", special_tokens=named))
        spans = inspection.decode(sample, [True] * len(sample), tokenizers.load(model))
        assert [span.control for span in spans if "<|a|>" in span.text] == [control]
        assert "x<|a|>y" in "".join(span.text for span in spans)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (["<|c|>"], r"<\|c\|> is no added token of the tokenizer; did you mean <\|[ab]\|>"),
        (["zzzzzzzzzz"], r"it has <pad>, <\|im_start\|>, <\|im_end\|>, <\|a\|>, <\|b\|>, <tool_call>"),
        (["<|a|>", ""], "is no added token"),
        ("<|a|>", r"must be a list of tokens, .* or all, not <\|a\|>"),
        ([1], "must be a list of tokens"),
        ({"a": 1}, "must be a list of tokens"),
        (True, "must be a list of tokens"),
        ([["<|a|>"]], "must be a list of tokens"),
        ([chat_tokenizer.BREAK], "is no added token"),
    ],
)
def test_names_that_the_tokenizer_has_not(named: Any, message: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(FieldError, match=message) as caught:
        made(tmp_path, model, "x", special_tokens=named)
    assert caught.value.field == "data.special_tokens"


def test_the_command_names_file_and_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.yaml"
    text = (TINY.parent / "tiny.yaml").read_text().replace("data:\n", "data:\n  special_tokens: [<|im_edn|>]\n")
    recipe.write_text(text)
    assert run_command(monkeypatch, "prepare", recipe, f"output={tmp_path / 'run'}") == 2
    line = next(i for i, at in enumerate(text.splitlines(), 1) if "special_tokens" in at)
    said = capfd.readouterr().err
    assert f"{recipe}:{line}: data.special_tokens: <|im_edn|> is no added token of the tokenizer" in said
    assert "did you mean <|im_end|>" in said
    assert run_command(monkeypatch, "prepare", recipe, "data.special_tokens=all", f"output={tmp_path / 'run'}") == 0


def test_a_token_inside_another(model_with: Callable[..., Path], tmp_path: Path) -> None:
    """As the tokenizer matches: the leftmost, the longest."""
    folder = model_with(CHATML, "<|a|>", "<<|a|>>")
    outer = special_tokens.allowing(tokenizers.load(folder), ["<<|a|>>"])
    assert outer.quote("<<|a|>> <|a|>") == f"<<|a|>> <{chat_tokenizer.BREAK}|a|>"
    inner = special_tokens.allowing(tokenizers.load(folder), ["<|a|>"])
    broken = inner.quote("<<|a|>>")
    ids = inner.backend.encode(broken, add_special_tokens=False).ids
    assert inner.backend.token_to_id("<<|a|>>") not in ids
    with pytest.raises(UserError, match="U\\+FDD0"):
        outer.quote(chat_tokenizer.BREAK)
