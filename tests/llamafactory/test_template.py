"""A config's template and its switch for thinking, and that `prepare` takes what was written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tokenizers import Tokenizer

from bft_megatron.conversations import known_templates, tokenizers
from bft_megatron.llamafactory import convert, recipe_text
from bft_megatron.recipe import reader
from tests.helpers.commands import run_command
from tests.helpers.material import TINY
from tests.llamafactory.written import CONFIGS, loaded, written

THINKS = (
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' }}"
    "{% if m.role == 'assistant' and enable_thinking is false %}<think></think>{% endif %}"
    "{{ m.content ~ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def base_model(folder: Path, known: str | None = "llama3", template: str | None = None) -> Path:
    """The tiny model with a tokenizer that has a well-known template's control tokens, and no template by default."""
    shutil.copytree(TINY, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | ({"chat_template": template} if template else {}))
    )
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(list(known_templates.control_tokens(known_templates.read(known))) if known else [])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": tokenizer.get_vocab_size()}))
    return folder


TEMPLATES: list[tuple[str, str | None, str]] = [
    # the model's name; LLaMA-Factory's template; data.chat_template
    ("org/M-7B-Instruct", None, "llama3"),
    ("org/M-7B", None, "nobody_knows"),
    ("org/M-7B-Base", "llama3", "llama3"),
    ("org/gemma-2b-pt", "gemma", "gemma2"),
    ("org/M-base", "glm", "glm4"),
]


@pytest.mark.parametrize(("model", "wanted", "template"), TEMPLATES)
def test_of_a_model_that_is_not_here(model: str, wanted: str | None, template: str, tmp_path: Path):
    config = written(tmp_path, model_name_or_path=model, template=template)
    assert not convert(config).lost
    assert loaded(config).data.chat_template == wanted


def test_of_a_model_with_a_template(tmp_path: Path):
    config = written(tmp_path, model_name_or_path=str(TINY), template="llama3")
    assert not convert(config).lost
    assert loaded(config).data.chat_template is None


@pytest.mark.parametrize(
    ("known", "template", "said"),
    [
        ("llama3", "vicuna", "no well-known name here, and the model has none of its own: name a Jinja file"),
        (None, "llama3", "llama3 writes <|begin_of_text|>"),
    ],
)
def test_of_a_model_without(known: str | None, template: str, said: str, tmp_path: Path):
    model = base_model(tmp_path / "model", known)
    conversion = convert(written(tmp_path, model_name_or_path=str(model), template=template))
    assert [lost.name for lost in conversion.lost] == ["template"]
    assert said in conversion.lost[0].why
    assert "data.chat_template" not in conversion.fields


@pytest.mark.parametrize(("template", "off"), [("qwen3_5", False), ("qwen3_5_nothink", True)])
def test_a_template_without_thinking_switches_it_off(template: str, off: bool, tmp_path: Path):
    model = base_model(tmp_path / "model", template=THINKS)
    conversion = convert(written(tmp_path, model_name_or_path=str(model), template=template))
    assert not conversion.lost
    assert conversion.fields.get("data.chat_template_kwargs") == ({"enable_thinking": False} if off else None)


FIELDS: dict[str, dict[str, Any]] = {
    "a base model": {"template": "llama3"},
    "without thinking": {"enable_thinking": False},
    "with thinking": {"enable_thinking": True},
    "dropout": {"finetuning_type": "lora", "lora_dropout": 0.05},
    "bft": {"use_bft_loss": True, "gradient_accumulation_steps": 4},
    "positions": {"rope_scaling": "yarn", "report_to": "wandb", "run_name": "x", "neat_packing": True},
}


@pytest.mark.parametrize("name", FIELDS)
def test_prepare_takes_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    given = FIELDS[name]
    model = base_model(tmp_path / "model", template=None if "template" in given else THINKS)
    data = {"dataset_dir": str(CONFIGS / "data"), "dataset": "questions", "cutoff_len": 256, "bf16": True}
    config = written(tmp_path, model_name_or_path=str(model), output_dir=str(tmp_path / "run"), **data, **given)
    recipe = tmp_path / "recipe.yaml"
    assert run_command(monkeypatch, "from-llamafactory", config, recipe, "--gpus", "1") == 0
    assert run_command(monkeypatch, "prepare", recipe) == 0
    [rows] = (tmp_path / "run").rglob("samples.arrow")
    tokenizer = tokenizers.load(model, "chatml" if "template" in given else None)
    text = tokenizer.backend.decode(Dataset.from_file(str(rows))[0]["tokens"], skip_special_tokens=False)
    assert text.startswith("<|begin_of_text|>") == ("template" in given)
    assert ("<think></think>" in text) == (name == "without thinking")
    assert reader.load(recipe).data.chat_template_kwargs == ({"enable_thinking": False} if "without" in name else {})


def test_what_is_done_otherwise_is_written_into_the_recipe(tmp_path: Path):
    text = recipe_text(convert(written(tmp_path)))
    assert "# Done otherwise here:\n#   cutoff_len: a longer sample loses its end" in text
