"""Folders of safetensors files: their tensors, and two of them compared bit by bit."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def assert_same(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name


def rewrite(folder: Path, whole: dict[str, torch.Tensor]) -> None:
    """Put these tensors into one file in place of the folder's."""
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(whole, folder / "model.safetensors", {"format": "pt"})
