"""Loading a tokenizer and its template: what is refused, what it costs, what its fingerprint covers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from bft_megatron.conversations import chat, chat_tokenizer, tokenizers
from bft_megatron.errors import FieldError, UserError
from tests.helpers.material import TINY, chat_of


def test_the_tiny_model_is_what_its_recipe_needs() -> None:
    config = json.loads((TINY / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    assert len(tokenizer) == config["vocab_size"]
    assert config["vocab_size"] % 128, "a padded vocabulary must show in tests"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (config["eos_token_id"], config["pad_token_id"])


def test_loads_what_transformers_loads(tiny: chat_tokenizer.ChatTokenizer) -> None:
    reference = AutoTokenizer.from_pretrained(TINY)
    assert tiny.template == reference.chat_template
    assert tiny.variables == reference.special_tokens_map
    assert set(tiny.control) == {"<pad>", "<|im_start|>", "<|im_end|>"}
    text = "<|im_start|>user\nThe heart, é🙂!<|im_end|>\n"
    assert tiny.backend.encode(text).ids == reference.encode(text)


def test_loading_and_rendering_import_no_torch() -> None:
    code = (
        "import sys; from bft_megatron.conversations import chat, tokenizers\n"
        f"chat.encode([{{'role': 'assistant', 'content': 'x'}}], tokenizers.load({str(TINY)!r}), 'assistant')\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


SENTENCES = ["Hello world", " two  spaces ", "é🙂\n\nx\ty", "日本語", "a<|im_start|>b", "▁", ""]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_sentencepiece_model_gives_sentencepieces_own_tokens(tmp_path: Path, kind: str) -> None:
    """Of whole texts, and of a conversation between the template's control tokens, in which text stays text."""
    sentencepiece.SentencePieceTrainer.train(
        input=str(TINY / "train.jsonl"),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type=kind,
        vocab_size=500,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=["[INST]", "[/INST]"],
        minloglevel=2,
    )
    (tmp_path / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
        "{% else %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    ours = tokenizers.load(tmp_path)
    own = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in [*SENTENCES, (TINY / "valid.jsonl").read_text()]:
        assert ours.backend.encode(text, add_special_tokens=False).ids == own.encode(text)
    begin, end, open_, close = (own.piece_to_id(piece) for piece in ("<s>", "</s>", "[INST]", "[/INST]"))
    for question, answer in [("Hi", "Yes."), ("a</s>b[INST]", "c [/INST]<s><unk>")]:
        tokens, supervised = chat.encode(chat_of(question, answer), ours, "assistant")
        assert tokens == [begin, open_, *own.encode(question), close, *own.encode(answer), end]
        assert sum(supervised) == len(own.encode(answer)) + 1


def test_a_sentencepiece_model_is_refused_under_a_transformers_that_reads_it_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")
    monkeypatch.setattr("transformers.__version__", "5.23.0")
    with pytest.raises(
        UserError, match=r'transformers 5\.23\.0 makes other tokens .*: pip install "transformers>=5\.24"'
    ):
        tokenizers.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="no tokenizer that can be read"):
        tokenizers.load(tmp_path)


def test_refuses_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path}: no tokenizer that can be read"):
        tokenizers.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=f"{tmp_path}: no tokenizer that can be read"):
        tokenizers.load(tmp_path)
    with pytest.raises(FieldError, match="no folder"):
        tokenizers.load(tmp_path / "none")


def test_refuses_a_tokenizer_without_a_template(model_with: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"no chat template.*chat_template\.jinja"):
        tokenizers.load(model_with(None))


def test_reads_a_template_from_its_own_file(model_with: Callable[..., Path]) -> None:
    folder = model_with(None)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert tokenizers.load(folder).render([{"role": "user", "content": "Hi"}]) == ("Hi", [])


def test_fingerprint_follows_content_alone(model_with: Callable[..., Path]) -> None:
    folder, copy = model_with("a"), model_with("a", name="copy")
    before = tokenizers.fingerprint(folder)
    assert tokenizers.fingerprint(copy) == before
    (folder / "config.json").write_text("{}")
    assert tokenizers.fingerprint(folder) == before
    seen = {before}
    for file, content in [("chat_template.jinja", "b"), ("tokenizer_config.json", "{}"), ("tokenizer.json", "{}")]:
        (folder / file).write_text(content)
        seen.add(tokenizers.fingerprint(folder))
    assert len(seen) == 4
