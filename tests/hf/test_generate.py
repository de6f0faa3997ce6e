"""A greedy answer is the chain of most probable tokens, after the model's own chat template."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from bft_megatron.errors import UserError
from bft_megatron.hf.generate import generate
from tests.helpers import tiny_models

TEMPLATE = "{% for m in messages %}w3 {{ m['content'] }} w4 {% endfor %}{% if add_generation_prompt %}w5{% endif %}"


def _save(
    folder: Path, template: str | None
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerFast]:
    model = tiny_models.save("llama", folder)
    vocabulary = {f"w{i}": i for i in range(tiny_models.VOCABULARY)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", chat_template=template)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


@pytest.mark.parametrize(
    ("template", "prompt"), [(TEMPLATE, [3, 17, 42, 4, 5]), (None, [17, 42])], ids=["chat", "plain"]
)
def test_answer_is_greedy(template: str | None, prompt: list[int], tmp_path: Path) -> None:
    model, tokenizer = _save(tmp_path, template)
    # A generation configuration that samples, as hub models have it, changes nothing.
    transformers.GenerationConfig(do_sample=True, temperature=5.0, top_k=50, eos_token_id=2).save_pretrained(tmp_path)
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert 2 not in ids
    assert generate(tmp_path, "w17 w42", max_new_tokens=6) == tokenizer.decode(ids[len(prompt) :])


def test_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"it has no config\.json"):
        generate(tmp_path, "hello")
    tiny_models.config("llama").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="transformers cannot load it"):
        generate(tmp_path, "hello")
