"""Layouts and flags that a hybrid cannot have, refused before any process starts, with the field to change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT
from tests.helpers.runs import VARIANTS

REFUSED = {
    "key-heads-by-tensor-and-context": (
        ["parallel.tensor=2", "parallel.context=4"],
        "parallel.context",
        "tensor x context = 8 does not divide the 4 key heads of the model's gated delta nets",
    ),
    "heads-of-full-attention": (
        ["parallel.tensor=4"],
        "parallel.tensor",
        "4 does not divide the model's 2 key/value heads",
    ),
    "chunks-of-a-sample": (
        ["parallel.context=4", "data.pad_multiple=4"],
        "data.pad_multiple",
        "must be a multiple of 2 x parallel.context = 8",
    ),
    "deterministic-packed": (
        ["megatron.deterministic-mode=true"],
        "megatron.deterministic-mode",
        "gated delta nets then take no packed rows: leave it out, or set data.packing to false",
    ),
    "recomputed-norm": (
        ["megatron.recompute-granularity=selective", "megatron.recompute-modules=[core_attn, gdn_norm_out]"],
        "megatron.recompute-modules",
        "gdn_norm_out needs a GPU and Transformer Engine's layers: leave it out, or set recompute-granularity to full",
    ),
    "overlap-of-tensor-parallelism": (
        ["parallel.tensor=2", "megatron.tp-comm-overlap=true"],
        "megatron.tp-comm-overlap",
        "not shown to be right with gated delta nets: leave it out",
    ),
    "optimizer-that-skips-fp32-copies": (
        ["megatron.use-precision-aware-optimizer=true"],
        "megatron.use-precision-aware-optimizer",
        "not shown to be right with gated delta nets: leave it out",
    ),
    "optimizer-on-the-host": (
        ["megatron.optimizer-cpu-offload=true"],
        "megatron.optimizer-cpu-offload",
        "not shown to be right with gated delta nets: leave it out",
    ),
}


def save_hybrid(folder: Path, **changes: int) -> Path:
    """A folder with the tiny hybrid's config.json and tokenizer."""
    shutil.copytree(ROOT / "recipes/tiny", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | VARIANTS["hybrid"] | changes))
    return folder


@pytest.mark.parametrize("case", REFUSED)
def test_what_gated_delta_nets_cannot_do_is_refused(case: str, refused: Callable[..., str], tmp_path: Path):
    words, field, why = REFUSED[case]
    said = refused(f"model={save_hybrid(tmp_path / 'model')}", "device=cpu", *words)
    assert field in said
    assert why in said


def test_tensor_parallel_ranks_have_whole_key_heads(refused: Callable[..., str], tmp_path: Path):
    model = save_hybrid(tmp_path / "model", linear_num_key_heads=3, linear_num_value_heads=6)
    said = refused(f"model={model}", "parallel.tensor=2")
    assert "parallel.tensor" in said
    assert "2 does not divide the 3 key heads of the model's gated delta nets" in said


@pytest.mark.parametrize(
    "word",
    [
        "experimental-attention-variant=dsa",
        "linear-attention-freq=2",
        "linear-num-key-heads=8",
        "attention-output-gate=true",
        "no-attention-output-gate=true",
        "apply-layernorm-1p=true",
        "rotary-percent=0.5",
    ],
)
def test_the_kinds_of_its_layers_are_the_models_own(word: str, refused: Callable[..., str], tmp_path: Path):
    said = refused(f"model={save_hybrid(tmp_path / 'model')}", f"megatron.{word}")
    assert f"megatron.{word.partition('=')[0]}" in said
    assert "the architecture is the model's own, from its config.json" in said
