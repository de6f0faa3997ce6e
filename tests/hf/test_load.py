"""A sharded model computes what transformers computes, on any layout; a wrong folder is refused before it is built."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bft_megatron.errors import UserError
from bft_megatron.hf import shards
from bft_megatron.hf.architectures import read_config
from bft_megatron.hf.load import check_weights
from bft_megatron.hf.place import Place
from bft_megatron.hf.tensors import join, part
from bft_megatron.hf.weights import weights
from tests.helpers import sharded, tiny_models
from tests.helpers.sharded import Sharding
from tests.helpers.tiny_models import SavedModel
from tests.helpers.world import run_world

LAYOUTS = [
    Sharding(),
    Sharding(tp=2),
    Sharding(pp=2),
    Sharding(tp=2, pp=2),
    Sharding(pp=2, first=1),
    Sharding(pp=2, vpp=2),
]


def _logits(folders: list[Path], layout: Sharding) -> list[torch.Tensor | None]:
    out = []
    for folder in folders:
        with sharded.model(folder, layout) as chunks:
            out.append(sharded.logits(chunks))
    return out


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_logits_are_those_of_transformers(layout: Sharding, models: list[SavedModel]) -> None:
    check_logits(layout, models)


@pytest.mark.parametrize("layout", [Sharding(tp=2, pp=2), Sharding(pp=2, first=1)], ids=str)
def test_logits_tied_and_untied(layout: Sharding, models_tied_otherwise: list[SavedModel]) -> None:
    """Where it makes a difference: tied, the last stage has a copy of the embedding."""
    check_logits(layout, models_tied_otherwise)


def check_logits(layout: Sharding, models: list[SavedModel]) -> None:
    ranks = run_world(layout.world, _logits, [m.folder for m in models], layout, megatron=True)
    for model, *outputs in zip(models, *ranks, strict=True):
        logits_are_close(model, layout, outputs)


def logits_are_close(model: SavedModel, layout: Sharding, outputs: list[torch.Tensor | None]) -> None:
    """Those of the last stage's ranks to transformers' own."""
    prompt = tiny_models.prompts()[1].bool()
    last_stage = [x for x in outputs if x is not None]
    assert len(last_stage) == layout.world // layout.pp
    for x in last_stage:
        error = (x[..., : tiny_models.VOCABULARY] - model.logits)[prompt].abs().max()
        assert error < 1e-5 * model.logits.abs().max(), (model.name, error)


@contextlib.contextmanager
def counting() -> Iterator[list[int]]:
    """The elements of each piece that this process asks the files for meanwhile."""
    pieces, read = list[int](), shards.Reader.__call__

    def counted(self: shards.Reader, *args: Any) -> torch.Tensor:
        piece = read(self, *args)
        pieces.append(piece.numel())
        return piece

    shards.Reader.__call__ = counted
    try:
        yield pieces
    finally:
        shards.Reader.__call__ = read


def _elements_read(folder: Path, layout: Sharding) -> tuple[int, int]:
    """(elements that this rank asked the files for, largest piece)."""
    with counting() as pieces, sharded.model(folder, layout):
        return sum(pieces), max(pieces)


def test_a_rank_reads_only_its_part(models: list[SavedModel]) -> None:
    """Everything is read once over the TP ranks of both stages, except what each of them holds whole: the norms."""
    config = read_config(models[0].folder)
    table = [(w, t) for w in weights(config) for t in w.tensors]
    size = {t.name: torch.Size(t.shape).numel() for _, t in table}
    whole = sum(size[t.name] for w, t in table if w.axis is None)
    read = run_world(4, _elements_read, models[0].folder, Sharding(tp=2, pp=2), megatron=True)
    assert sum(total for total, _ in read) == sum(size.values()) + whole
    assert max(largest for _, largest in read) < max(size.values())


def _vocabulary_rows(folder: Path, layout: Sharding) -> tuple[torch.Tensor, torch.Tensor]:
    with sharded.model(folder, layout) as (chunk,):
        return chunk.embedding.word_embeddings.weight.detach(), chunk.output_layer.weight.detach()


def test_padded_vocabulary_is_zero(tmp_path: Path) -> None:
    """100 tokens are padded to 256, so that one of two ranks holds nothing but padding."""
    expected = tiny_models.save("llama", tmp_path, vocab_size=100).state_dict()
    ranks = run_world(2, _vocabulary_rows, tmp_path, Sharding(tp=2), megatron=True)
    for i, name in enumerate(("model.embed_tokens.weight", "lm_head.weight")):
        rows = torch.cat([rank[i] for rank in ranks])
        assert rows.shape[0] == 256
        assert torch.equal(rows[:100], expected[name])
        assert not rows[100:].any()


def _error_of_loading(folder: Path, layout: Sharding) -> str:
    with pytest.raises(UserError) as error, sharded.model(folder, layout):
        pass
    return str(error.value)


def test_more_tensor_parallel_ranks_than_key_value_heads(tmp_path: Path) -> None:
    tiny_models.save("llama", tmp_path, num_key_value_heads=1)
    messages = run_world(2, _error_of_loading, tmp_path, Sharding(tp=2), megatron=True)
    assert messages == ["tensor parallelism 2 does not divide the model's 1 key/value heads"] * 2


def test_every_tensor_of_transformers_is_in_the_table(models: list[SavedModel]) -> None:
    for model in models:
        entries = shards.read_headers(model.folder)
        table = [(t.name, t.shape) for w in weights(read_config(model.folder)) for t in w.tensors]
        assert sorted(table) == sorted((name, entry.shape) for name, entry in entries.items())


def test_both_layer_specs_names_of_the_norms() -> None:
    for local, fused in (
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
    ):
        paths = {Place((2, 3)).path(f"decoder.layers.1.{name}") for name in (local, fused)}
        assert paths == {f"decoder.layers.3.{fused}"}


def test_parts_of_a_joined_weight(models: list[SavedModel]) -> None:
    for weight in weights(read_config(models[2].folder)):
        tensors = [torch.randn(t.shape) for t in weight.tensors]
        joined = join(tensors, weight.blocks)
        assert all(torch.equal(part(weight, i, joined), t) for i, t in enumerate(tensors))


# ---------------------------------------------------------------------------------------------------- wrong folders
Tensors = dict[str, torch.Tensor]
NORM = "model.layers.1.input_layernorm.weight"


def _changed(source: Path, target: Path, change: Callable[[Tensors], object]) -> Path:
    """A copy of the model as one file, with its tensors changed."""
    tensors = {name: t for file in sorted(source.glob("*.safetensors")) for name, t in load_file(file).items()}
    change(tensors)
    target.mkdir()
    shutil.copyfile(source / "config.json", target / "config.json")
    save_file(tensors, target / "model.safetensors")
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NORM), f"1 tensors of LlamaForCausalLM are missing, {NORM}"),
        (lambda t: t.update({NORM: torch.ones(47)}), f"{NORM} has the shape (47,), by config.json it is (48,)"),
        (
            lambda t: t.update({NORM: t[NORM].to(torch.float8_e4m3fn)}),
            f"{NORM} has the dtype F8_E4M3; can be read: F32",
        ),
        (lambda t: t.update({NORM: t[NORM].double()}), f"{NORM} has the dtype F64"),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(48)}),
            "1 tensors that LlamaForCausalLM does not have, model.layers.0.self_attn.q_proj.bias",
        ),
        (lambda t: t.clear(), "39 tensors of LlamaForCausalLM are missing, among them lm_head.weight"),
    ],
    ids=["missing", "shape", "fp8", "fp64", "unknown", "empty"],
)
def test_wrong_tensors(
    change: Callable[[Tensors], object], message: str, models: list[SavedModel], tmp_path: Path
) -> None:
    folder = _changed(models[0].folder, tmp_path / "changed", change)
    with pytest.raises(UserError, match=re.escape(message)):
        check_weights(folder, read_config(folder))


def test_redundant_tensors_are_passed_over(models: list[SavedModel], tmp_path: Path) -> None:
    """As old files of Llama carry them: rotary frequencies, and an output layer beside tied embeddings."""
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "lm_head.weight": torch.ones(301, 48)}
    folder = _changed(models[1].folder, tmp_path / "changed", lambda t: t.update(extra))
    assert read_config(folder).tied
    check_weights(folder, read_config(folder))


def _first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def _truncate(file: Path, size: int) -> None:
    with open(file, "r+b") as f:
        f.truncate(size)


def test_shards_without_an_index_are_read(models: list[SavedModel], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models[0].folder, folder)
    whole = shards.read_headers(folder)
    (folder / shards.INDEX).unlink()
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert shards.read_headers(folder) == whole
    check_weights(folder, read_config(folder))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no safetensors in this folder (other formats of weights are not read): download the model again"),
        (
            ["pytorch_model.bin", "training_args.bin"],
            "are not read), but pytorch_model.bin, training_args.bin: get the",
        ),
        (["m.Q8_0.gguf"], "gguf_file='m.Q8_0.gguf').save_pretrained(NEW_FOLDER)"),
        (["consolidated.00.pth"], "but consolidated.00.pth: get the model as safetensors"),
        (["weights.safetensors"], "the folder holds weights.safetensors: rename or remove some"),
        (["a-1-of-1.safetensors", "b-1-of-1.safetensors"], "a-1-of-1.safetensors, b-1-of-1.safetensors: rename"),
        (
            ["model-00003-of-00009.safetensors", "pytorch_model.bin"],
            "8 of 9 shards are missing, model-00001-of-00009.safetensors, model-00002-of-00009.safetensors, "
            "model-00004-of-00009.safetensors, ...: download them again",
        ),
    ],
)
def test_a_folder_of_other_weights_says_what_it_holds(names: list[str], message: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(UserError) as error:
        shards.read_headers(tmp_path)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: _first_shard(f).unlink(), "this shard of the model is missing"),
        (lambda f: _truncate(_first_shard(f), _first_shard(f).stat().st_size - 1), "a broken download"),
        (lambda f: _truncate(_first_shard(f), 100), "not a whole safetensors file"),
        (lambda f: _truncate(_first_shard(f), 0), "not a whole safetensors file"),
        (lambda f: _first_shard(f).write_bytes(b"<!DOCTYPE html> 404: not found"), "not a whole safetensors file"),
        (lambda f: (f / shards.INDEX).write_text('{"metadata": {}}'), "not an index of safetensors"),
        (lambda f: (f / shards.INDEX).write_text("weights"), "not an index of safetensors"),
        (
            lambda f: [_first_shard(f).unlink(), (f / shards.INDEX).unlink()],
            r"1 of \d+ shards are missing, model-00001-of-",
        ),
    ],
    ids=["no shard", "one byte less", "half a header", "nothing", "a web page", "no map", "not JSON", "no index"],
)
def test_damaged_folder(
    damage: Callable[[Path], object], message: str, models: list[SavedModel], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models[0].folder, folder)
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        check_weights(folder, read_config(folder))
    assert str(error.value).startswith(str(folder))


class _Trap:
    """Unpickled, it leaves a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.file,))


def test_no_pickle_is_ever_loaded(models: list[SavedModel], tmp_path: Path) -> None:
    torch.save({"model.norm.weight": _Trap(tmp_path / "sprung")}, tmp_path / "pytorch_model.bin")
    torch.save(_Trap(tmp_path / "sprung"), tmp_path / "model.safetensors")
    config = read_config(models[0].folder)
    with pytest.raises(UserError, match="not a whole safetensors file"):
        check_weights(tmp_path, config)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="other formats of weights are not read"):
        check_weights(tmp_path, config)
    assert not (tmp_path / "sprung").exists()
