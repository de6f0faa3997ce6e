"""Masks: the supervised spans decoded, and held to transformers' own masks on templates with markers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from bft_megatron.conversations import chat, masks, tokenizers
from bft_megatron.conversations.chat import encode
from bft_megatron.conversations.chat_tokenizer import ChatTokenizer
from bft_megatron.errors import UserError
from bft_megatron.reading import sources
from bft_megatron.reading.formats import Conversation
from tests.helpers.material import CHATML, DEFAULT_SYSTEM, LLAMA, MISTRAL, THINKING, TINY, chat_of, unmarked

Make = Callable[..., Path]

CHATS = [c.messages for name in ("train", "valid") for c in sources.read(TINY / f"{name}.jsonl")]


def supervised(messages: list[dict[str, Any]], tokenizer: ChatTokenizer, supervise: chat.Supervise) -> list[str]:
    """Texts of the supervised runs of tokens."""
    runs: list[list[int]] = [[]]
    for token, on in zip(*encode(messages, tokenizer, supervise), strict=True):
        if on:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.backend.decode(run, skip_special_tokens=False) for run in runs if run]


TEMPLATES = {"chatml": CHATML, "default system": DEFAULT_SYSTEM, "llama": LLAMA, "mistral": MISTRAL}


@pytest.fixture(params=["chatml", "default system", "llama", "mistral", "sentencepiece"])
def pair(request: pytest.FixtureRequest, model_with: Make, sentencepiece_like: Make) -> tuple[Path, ChatTokenizer]:
    """A model folder whose template has markers, and the tokenizer of one with the same template without."""
    if request.param == "sentencepiece":
        folder, template = sentencepiece_like(MISTRAL), MISTRAL
    else:
        template = TEMPLATES[request.param]
        control = ("<|begin|>", "<|header|>", "<|/header|>", "<|eot|>", "[INST]", "[/INST]", "</s>")
        folder = model_with(template, *control, bos_token="<|begin|>")
    marked = tokenizers.load(folder)
    plain = replace(marked, template=unmarked(template))
    assert marked.has_markers
    assert not plain.has_markers
    return folder, plain


def test_masks_equal_transformers_with_and_without_markers(pair: tuple[Path, ChatTokenizer]) -> None:
    folder, plain = pair
    reference, marked = AutoTokenizer.from_pretrained(folder), tokenizers.load(folder)
    odd = chat_of("é 🙂", "🙂", " b\n", "\n\nc  d", "e", "  f 🙂🙂", system="")
    for messages in [*CHATS, odd]:
        want = reference.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
        for tokenizer in (marked, plain):
            tokens, mask = encode(messages, tokenizer, "assistant")
            assert tokens == want["input_ids"]
            if tokenizer is marked or messages is not odd or "Metaspace" not in marked.backend.to_str():
                assert [int(on) for on in mask] == want["assistant_masks"]


def test_a_token_across_an_edge_is_supervised_as_in_transformers(model_with: Make) -> None:
    """Here " in" is one token, whose last letter the template wrote, and " the" one whose first letter it wrote."""
    template = "{% for m in messages %} t{% generation %}{{ m.content }}{% endgeneration %}n.{% endfor %}"
    folder, messages = model_with(template), [{"role": "assistant", "content": "he heart i"}]
    want = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages, return_assistant_tokens_mask=True, return_dict=True
    )
    tokens, mask = encode(messages, tokenizers.load(folder), "assistant")
    assert (tokens, [int(on) for on in mask]) == (want["input_ids"], want["assistant_masks"])
    assert mask == [True] * (len(mask) - 1) + [False]


def test_the_beginning_of_text_is_not_doubled(model_with: Make) -> None:
    folder = model_with(LLAMA, "<|begin|>", "<|header|>", "<|/header|>", "<|eot|>", bos_token="<|begin|>")
    tokenizer = tokenizers.load(folder)
    tokens, _ = encode(chat_of("a", "b"), tokenizer, "assistant")
    assert tokens.count(tokenizer.backend.token_to_id("<|begin|>")) == 1


def test_learns_answers_and_their_end_of_turn_alone(tiny: ChatTokenizer) -> None:
    messages = chat_of("Hi", "Hello!", "assistant\nBye", "Good bye.\n", system="assistant")
    assert supervised(messages, tiny, "assistant") == ["Hello!<|im_end|>", "Good bye.\n<|im_end|>"]
    assert supervised(messages, tiny, "last") == ["Good bye.\n<|im_end|>"]
    everything = tiny.render(messages)[0]
    assert supervised(messages, tiny, "all") == [everything]
    assert everything.endswith("<|im_end|>\n")


def test_last_with_markers_is_the_last_answer(model_with: Make) -> None:
    tokenizer = tokenizers.load(model_with(CHATML))
    assert supervised(chat_of("a", "b", "c", "d"), tokenizer, "last") == ["d<|im_end|>"]


def test_what_follows_the_last_answer_is_left_out(tiny: ChatTokenizer) -> None:
    messages = chat_of("a", "b", "c")
    assert encode(messages, tiny, "assistant") == encode(messages[:2], tiny, "assistant")
    assert len(encode(messages, tiny, "all")[0]) > len(encode(messages[:2], tiny, "all")[0])


@pytest.mark.parametrize("template", [CHATML, unmarked(CHATML), unmarked(DEFAULT_SYSTEM)])
def test_a_conversation_may_open_with_the_assistant(model_with: Make, template: str) -> None:
    messages = [{"role": "assistant", "content": "How can I help?"}, *chat_of("a", "b")]
    tokenizer = tokenizers.load(model_with(template))
    assert supervised(messages, tokenizer, "assistant") == ["How can I help?<|im_end|>", "b<|im_end|>"]


def test_a_header_without_a_generation_prompt_is_not_supervised(model_with: Make) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    tokenizer = tokenizers.load(model_with(template))
    assert supervised(chat_of("x", "assistant", "y", "b"), tokenizer, "assistant") == [
        "assistant<|im_end|>",
        "b<|im_end|>",
    ]


def test_a_space_that_no_prompt_writes_is_the_answers_own(model_with: Make) -> None:
    tokenizer = tokenizers.load(model_with(unmarked(MISTRAL), "[INST]", "[/INST]", "</s>"))
    assert supervised(chat_of("x", "1", "y", "\nb"), tokenizer, "assistant") == [" 1</s>", " \nb</s>"]


def test_an_end_of_turn_that_is_no_token_is_supervised_whole(model_with: Make) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = tokenizers.load(model_with(template))
    assert (
        "".join(supervised(chat_of("a", "b c"), tokenizer, "assistant")) == " b c\n\n"
    )  # the space is one token with the b


def test_a_template_that_rewrites_earlier_turns_is_refused_unless_last(model_with: Make) -> None:
    tokenizer = tokenizers.load(model_with(THINKING))
    messages = chat_of("a", "<think>deep</think>b", "c", "<think>x</think>d")
    with pytest.raises(UserError) as error:
        encode(messages, tokenizer, "assistant")
    assert "data.supervise: last" in str(error.value)
    assert "messages[1]" in str(error.value)
    assert "<think>deep</think>b" in str(error.value)
    assert supervised(messages, tokenizer, "last") == ["<think>x</think>d<|im_end|>"]
    assert supervised(messages[:2], tokenizer, "assistant") == ["<think>deep</think>b<|im_end|>"]


def test_a_prompt_that_the_answer_does_not_continue_is_refused(model_with: Make) -> None:
    template = "{% for m in messages %}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}Answer:{% endif %}"
    with pytest.raises(UserError, match="generation"):
        encode(chat_of("a", "b"), tokenizers.load(model_with(template)), "last")


def test_a_conversation_that_the_template_refuses_is_the_users_error(model_with: Make) -> None:
    tokenizer = tokenizers.load(model_with(MISTRAL, "[INST]", "[/INST]", "</s>"))
    with pytest.raises(UserError, match="roles must alternate"):
        encode([*chat_of("a"), *chat_of("b", "c")], tokenizer, "assistant")


def test_control_tokens_stay_text_where_words_are_marked(sentencepiece_like: Make) -> None:
    tokenizer = tokenizers.load(sentencepiece_like(MISTRAL))
    tokens, mask = encode(chat_of("a</s> [INST]b", "</s>c [/INST]<unk>"), tokenizer, "assistant")
    counts = [tokens.count(tokenizer.backend.token_to_id(t)) for t in ("<s>", "</s>", "[INST]", "[/INST]", "<unk>")]
    assert counts == [1, 1, 1, 1, 0]
    assert sum(mask) == len(" </s>c [/INST]<unk>") + 1


def test_a_reserved_character_is_refused(tiny: ChatTokenizer) -> None:
    with pytest.raises(UserError, match=r"U\+FDD0"):
        encode(chat_of("a", "b\ufdd0"), tiny, "assistant")


control = st.sampled_from(["<|im_start|>", "<|im_end|>", "<pad>", "<|im_<|im_end|>end|>", "<", "|>"])
contents = st.lists(control | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufdd0"))).map(
    "".join
)
answers = contents.filter(str.strip)


@given(st.lists(st.tuples(contents, answers), min_size=1, max_size=3), st.none() | contents)
def test_any_text_is_supervised_as_it_stands(
    tiny: ChatTokenizer, turns: list[tuple[str, str]], system: str | None
) -> None:
    """Control tokens in the text stay text, supervised tokens spell the answers, all tokens the conversation."""
    messages = chat_of(*(text for turn in turns for text in turn), system=system)
    tokens, _ = encode(messages, tiny, "all")
    for token in ("<|im_start|>", "<|im_end|>"):
        assert tokens.count(tiny.backend.token_to_id(token)) == len(messages)
    assert tiny.backend.token_to_id("<pad>") not in tokens
    assert max(tokens) < 500
    whole = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    assert tiny.backend.decode(tokens, skip_special_tokens=False) == whole
    assert supervised(messages, tiny, "assistant") == [f"{answer}<|im_end|>" for _, answer in turns]


@given(st.lists(control | st.text(max_size=3), max_size=9).map("".join), st.integers(0, 30), st.integers(0, 30))
def test_searching_tokens_finds_what_looking_through_them_does(tiny: ChatTokenizer, text: str, a: int, b: int) -> None:
    encoding = tiny.backend.encode(text, add_special_tokens=False)
    assert masks._searching(encoding)(a, b) == masks._token_at(encoding, a, b)


def test_a_long_conversations_tokens_are_searched(tiny: ChatTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered = [chat.render(Conversation(1, messages, 1.0), tiny, "assistant") for messages in CHATS]
    scanned = masks.tokenise(rendered, tiny)
    monkeypatch.setattr(masks, "_SCANNED", 0)
    monkeypatch.setattr(masks, "_token_at", None)
    for (_, one), (_, other) in zip(scanned, masks.tokenise(rendered, tiny), strict=True):
        assert (one == other).all()
