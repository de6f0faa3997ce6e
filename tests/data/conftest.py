"""Model folders with small tokenizers: the repository's own, and it with other chat templates."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from bft_megatron.conversations import chat_tokenizer, tokenizers
from tests.helpers.material import TINY


@pytest.fixture(scope="session")
def tiny() -> chat_tokenizer.ChatTokenizer:
    return tokenizers.load(TINY)


@pytest.fixture
def model_with(tmp_path: Path) -> Callable[..., Path]:
    """Make a model folder: the tiny tokenizer with a chat template and further control tokens."""

    def make(template: str, *control: str, name: str = "model", **config: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
        tokenizer.add_special_tokens(list(control))
        return _write(folder, tokenizer, template, config)

    return make


@pytest.fixture
def sentencepiece_like(tmp_path: Path) -> Callable[[str], Path]:
    """Make a model folder whose tokenizer marks words with a leading ▁, as those converted from SentencePiece do."""

    def make(template: str) -> Path:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
        special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", *(f"<0x{byte:02X}>" for byte in range(256))]
        texts = [(TINY / "train.jsonl").read_text(), "<>[]/|INSTs "]
        tokenizer.train_from_iterator(
            texts, trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
        )
        fields = json.loads(tokenizer.to_str())
        fields["added_tokens"] = fields["added_tokens"][:5]  # the bytes are ordinary tokens
        folder = tmp_path / "sentencepiece"
        folder.mkdir()
        config = {"bos_token": "<s>", "eos_token": "</s>"}
        return _write(folder, Tokenizer.from_str(json.dumps(fields)), template, config)

    return make


def _write(folder: Path, tokenizer: Tokenizer, template: str, config: dict[str, str]) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    shutil.copy(TINY / "config.json", folder)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | config | {"chat_template": template}))
    return folder
