"""`data.chat_template_kwargs` are the template's variables for every row; a row's own override them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from bft_megatron.commands.request import read
from bft_megatron.conversations import chat_tokenizer, tokenizers
from bft_megatron.data.prepare import Prepared, prepare
from bft_megatron.errors import UserError
from bft_megatron.recipe.schema import DataSettings
from tests.helpers.material import TINY

THINKS = """{{ eos_token }}{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and enable_thinking is false %}!{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def text(prepared: Prepared, tokenizer: chat_tokenizer.ChatTokenizer) -> list[str]:
    samples = Dataset.from_file(str(prepared.folder / "samples.arrow"))
    return [tokenizer.backend.decode(sample["tokens"], skip_special_tokens=False) for sample in samples]


def test_of_the_recipe_and_of_a_row(tmp_path: Path, model_with: Callable[..., Path]):
    model = model_with(THINKS)
    rows = [{"messages": TURNS}, {"messages": TURNS, "chat_template_kwargs": {"enable_thinking": True}}]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    made = {
        name: prepare(source, model, DataSettings(str(source), seq_length=64, chat_template_kwargs=given), 1, tmp_path)
        for name, given in {"none": {}, "off": {"enable_thinking": False}, "bos": {"eos_token": "Z"}}.items()
    }
    assert len({prepared.folder for prepared in made.values()}) == 3  # part of the cache's key
    render = AutoTokenizer.from_pretrained(model).apply_chat_template
    on, off = render(TURNS, tokenize=False), render(TURNS, tokenize=False, enable_thinking=False)
    assert on != off
    tokenizer = tokenizers.load(model)
    assert text(made["none"], tokenizer) == [on, on]
    assert text(made["off"], tokenizer) == [off, on]
    assert text(made["bos"], tokenizer) == [f"Z{on.removeprefix('<|im_end|>')}"] * 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("[1]", "recipe.yaml:7: data.chat_template_kwargs: must be variables by name"),
        ("null", "recipe.yaml:7: data.chat_template_kwargs: must be variables by name"),
        ("{1: 2}", "a field's name must be text"),
        ("{messages: []}", "data.chat_template_kwargs.messages: is what the chat template gets from the rows"),
        ("{x: .inf}", "data.chat_template_kwargs.x: must be a value that JSON has, not inf"),
        ("{x: '${nope}'}", "data.chat_template_kwargs.x: "),
    ],
)
def test_what_is_no_mapping_of_values_is_refused(recipe_refused: Callable[[str], str], given: str, said: str):
    assert said in recipe_refused(given)


@pytest.fixture
def recipe_refused(tmp_path: Path) -> Callable[[str], str]:
    """What is said of a recipe with such `chat_template_kwargs`."""

    def refuse(given: str) -> str:
        file = tmp_path / "recipe.yaml"
        file.write_text(
            f"model: {TINY}\noutput: {tmp_path / 'out'}\ntrain: {{iterations: 1}}\n"
            f"data:\n  train: {TINY / 'train.jsonl'}\n  seq_length: 64\n  chat_template_kwargs: {given}\n"
        )
        with pytest.raises(UserError) as error:
            read(file, [])
        return str(error.value)

    return refuse
