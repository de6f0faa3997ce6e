"""The small models that loading and export are tested on, saved once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.hf import tiny


@dataclass(frozen=True)
class SavedModel:
    """A model folder and what transformers computes with it."""

    name: str
    folder: Path
    logits: torch.Tensor


@pytest.fixture(scope="session")
def models_tied_otherwise(tmp_path_factory: pytest.TempPathFactory) -> list[SavedModel]:
    """The same architectures, those tied whose models in `models` are not, and the other way round."""
    folder, found = tmp_path_factory.mktemp("otherwise"), []
    for name in tiny.ARCHITECTURES:
        tied = tiny.config(name).tie_word_embeddings
        model = tiny.save(name, folder / name, tie_word_embeddings=not tied)
        found.append(SavedModel(name, folder / name, tiny.logits(model)))
    return found


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[SavedModel]:
    folder = tmp_path_factory.mktemp("models")
    return [SavedModel(name, folder / name, tiny.logits(tiny.save(name, folder / name))) for name in tiny.ARCHITECTURES]
