"""Well-known templates write their model's documented text, of which the answers and what ends them are learned."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer

from bft_megatron.conversations import chat_tokenizer, known_templates, tokenizers
from bft_megatron.conversations.chat import encode
from bft_megatron.errors import FieldError, UserError
from tests.helpers.material import CHATML, TINY

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Bye, you."},
]
LEARNED = "⟦", "⟧"
"""Around what is learned of a text."""

DOCUMENTED = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    "⟦Hi.<|im_end|>⟧\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n⟦Bye, you.<|im_end|>⟧\n",
    "qwen": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    "⟦Hi.<|im_end|>⟧\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n⟦Bye, you.<|im_end|>⟧\n",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Hi.<|eot_id|>⟧"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Bye, you.<|eot_id|>⟧",
    "mistral": "<s>[INST] Be brief.\n\nHello[/INST]⟦ Hi.</s>⟧[INST] Bye[/INST]⟦ Bye, you.</s>⟧",
    "gemma": "<bos><start_of_turn>user\nBe brief.\n\nHello<end_of_turn>\n<start_of_turn>model\n⟦Hi.<end_of_turn>⟧\n"
    "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n⟦Bye, you.<end_of_turn>⟧\n",
    "deepseek": "<｜begin▁of▁sentence｜>Be brief.\n\nUser: Hello\n\nAssistant:⟦ Hi.<｜end▁of▁sentence｜>⟧"
    "User: Bye\n\nAssistant:⟦ Bye, you.<｜end▁of▁sentence｜>⟧",
    "deepseek3": "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hello<｜Assistant｜>⟦Hi.<｜end▁of▁sentence｜>⟧"
    "<｜User｜>Bye<｜Assistant｜>⟦Bye, you.<｜end▁of▁sentence｜>⟧",
    "glm": "[gMASK]<sop><|system|>\nBe brief.<|user|>\nHello<|assistant|>⟦\nHi.<|user|>⟧\nBye<|assistant|>"
    "⟦\nBye, you.<|user|>⟧",
    "phi": "<|system|>\nBe brief.<|end|>\n<|user|>\nHello<|end|>\n<|assistant|>\n⟦Hi.<|end|>⟧\n<|user|>\nBye<|end|>\n"
    "<|assistant|>\n⟦Bye, you.<|end|>⟧\n",
    "phi4": "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>Hello<|im_end|>"
    "<|im_start|>assistant<|im_sep|>⟦Hi.<|im_end|>⟧<|im_start|>user<|im_sep|>Bye<|im_end|>"
    "<|im_start|>assistant<|im_sep|>⟦Bye, you.<|im_end|>⟧",
}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "a", "until": None}}}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]


@pytest.fixture
def base_for(model_with: Callable[..., Path]) -> Callable[[str], Path]:
    """Make a base model: the control tokens of a well-known template, and no template of its own."""
    return lambda name: model_with(None, *known_templates.control_tokens(known_templates.read(name)))


def marked(tokenizer: chat_tokenizer.ChatTokenizer, tokens: list[int], learned: list[bool]) -> str:
    """The text of tokens, with LEARNED around what is learned."""
    pieces, before = [], False
    for token, now in zip(tokens, learned, strict=True):
        pieces += [LEARNED[before]] if now != before else []
        pieces.append(tokenizer.backend.decode([token], skip_special_tokens=False))
        before = now
    return "".join(pieces) + (LEARNED[1] if before else "")


@pytest.mark.parametrize("name", DOCUMENTED)
def test_text_and_mask(name: str, base_for: Callable[[str], Path]):
    tokenizer = tokenizers.load(base_for(name), name)
    assert marked(tokenizer, *encode(CONVERSATION, tokenizer, "assistant")) == DOCUMENTED[name]
    plain = DOCUMENTED[name].translate({ord(mark): None for mark in LEARNED})
    assert tokenizer.render(CONVERSATION)[0] == plain
    asked = tokenizer.render(CONVERSATION[:4], prompt=True)[0]
    assert plain.startswith(asked)
    assert DOCUMENTED[name].replace("⟦", "", 1).replace("⟧", "", 1).partition("⟦")[0].rstrip(" ") == asked


@pytest.mark.parametrize("name", DOCUMENTED)
def test_it_is_what_transformers_writes(name: str, base_for: Callable[[str], Path]):
    folder = base_for(name)
    reference = AutoTokenizer.from_pretrained(folder)
    for turns in (CONVERSATION, CONVERSATION[1:3]):
        want = reference.apply_chat_template(turns, chat_template=known_templates.read(name), tokenize=True)
        assert encode(turns, tokenizers.load(folder, name), "assistant")[0] == want["input_ids"]


def test_every_name_is_tested():
    assert set(DOCUMENTED) == set(known_templates.NAMES)


def test_markers_learn_the_same(model_with: Callable[..., Path]):
    """ChatML with {% generation %}, and without."""
    with_markers = tokenizers.load(model_with(CHATML))
    assert with_markers.has_markers
    assert encode(CONVERSATION, with_markers, "assistant") == encode(
        CONVERSATION, tokenizers.load(TINY, "chatml"), "assistant"
    )


@pytest.mark.parametrize("content", ["", "Let me see."])
def test_tools_of_qwen(content: str, base_for: Callable[[str], Path]):
    tokenizer = tokenizers.load(base_for("qwen"), "qwen")
    calling = {"role": "assistant", "content": content, "tool_calls": [CALL, CALL]}
    found = [{"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}]
    text, _ = tokenizer.render([CONVERSATION[1], calling, *found, CONVERSATION[2]], tools=TOOLS)
    call = '<tool_call>\n{"name": "look", "arguments": {"at": "a", "until": null}}\n</tool_call>'
    said = f"{content}\n" if content else ""
    assert text.startswith(
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.\n\n# Tools\n\n"
    )
    assert f"<tools>\n{json.dumps(TOOLS[0])}\n</tools>" in text
    assert text.endswith(
        f"<|im_start|>assistant\n{said}{call}\n{call}<|im_end|>\n<|im_start|>user\n<tool_response>\n1\n"
        "</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>\n"
    )


@pytest.mark.parametrize("name", sorted(DOCUMENTED.keys() - {"qwen"}))
def test_a_template_without_tools_says_so(name: str, base_for: Callable[[str], Path]):
    tokenizer = tokenizers.load(base_for(name), name)
    calling: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    for messages, tools in (
        (CONVERSATION, TOOLS),
        ([CONVERSATION[1], calling], None),
        ([CONVERSATION[1], {"role": "tool", "content": "1"}, CONVERSATION[2]], None),
    ):
        with pytest.raises(UserError, match=f"the {name} template has no form for tools"):
            tokenizer.render(messages, tools=tools)


def test_a_tokenizer_without_its_tokens_is_refused():
    said = r"data\.chat_template: llama3 writes <\|begin_of_text\|>, <\|start_header_id\|>, <\|end_header_id\|>, <\|eot"
    with pytest.raises(FieldError, match=said):
        tokenizers.load(TINY, "llama3")


def test_tokens_that_are_not_special_are_control_tokens_too(model_with: Callable[..., Path]):
    """DeepSeek's tokens of the roles are ordinary added tokens."""
    folder = model_with(None)
    added = Tokenizer.from_file(str(folder / "tokenizer.json"))
    written = known_templates.control_tokens(known_templates.read("deepseek3"))
    added.add_tokens([AddedToken(token, special=False) for token in written])
    added.save(str(folder / "tokenizer.json"))
    tokenizer = tokenizers.load(folder, "deepseek3")
    tokens, learned = encode([{"role": "user", "content": "<｜Assistant｜>"}, CONVERSATION[2]], tokenizer, "assistant")
    assert tokens.count(added.token_to_id("<｜Assistant｜>")) == 1
    assert marked(tokenizer, tokens, learned).endswith("<｜Assistant｜>⟦Hi.<｜end▁of▁sentence｜>⟧")


def test_a_file_and_the_tokenizers_own_name_come_first(
    model_with: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = model_with(None)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    own = [{"name": name, "template": f"own {name}"} for name in ("chatml", "default")]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": own}))
    monkeypatch.chdir(tmp_path)
    assert tokenizers.load(folder, "chatml").template == "own chatml"
    assert tokenizers.load(folder, "qwen").template == known_templates.read("qwen")
    (tmp_path / "chatml").write_text("of a file")
    assert tokenizers.load(folder, "chatml").template == "of a file"


def test_the_templates_text_is_part_of_the_fingerprint(monkeypatch: pytest.MonkeyPatch):
    before = tokenizers.fingerprint(TINY, "chatml")
    monkeypatch.setattr(known_templates, "read", lambda name: f"another {name}")
    assert tokenizers.fingerprint(TINY, "chatml") != before
