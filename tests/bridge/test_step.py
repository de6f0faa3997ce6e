"""`BftForwardStep` on batches of Bridge's own collators, beside the step of this package's own loop on the same rows.

Each rank builds a tiny Llama of Bridge's provider with the CPU's layers. The expected numbers are those of one process
that has every sample in one micro-batch of padded rows.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.bridge import AutoBridge
from megatron.bridge.data.packing.in_batch import build_mcore_thd_sequence_batch_from_rows
from megatron.bridge.training.gpt_step import get_batch
from megatron.bridge.training.state import GlobalState
from megatron.bridge.training.utils.packed_seq_utils import get_packed_seq_params
from megatron.bridge.training.utils.train_utils import prepare_forward_step_func
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.utils import get_model_config, unwrap_model
from torch import Tensor

from bft_megatron.errors import UserError
from bft_megatron.hf.architectures import read_config
from bft_megatron.hf.load import place_of, weights_hook
from bft_megatron.integrations.bridge import BftForwardStep, physical_edges, read
from bft_megatron.integrations.rows import micro_batch
from bft_megatron.integrations.settings import objective_settings
from bft_megatron.labels import IGNORE_INDEX
from bft_megatron.layers.attention import CoreAttention
from bft_megatron.layers.norm import RMSNorm
from bft_megatron.layers.spec import layer, layers
from bft_megatron.training.step import Step
from tests.helpers.runs import MODEL, Layout
from tests.helpers.world import run_world

SETTINGS: dict[str, Any] = {"group_size": 4, "cp_windows": "exact"}
LENGTHS, LENGTH = (9, 16, 5, 12, 7, 20, 11, 6), 24
LAYOUTS = [Layout(), Layout(tensor=2), Layout(pipeline=2), Layout(pipeline=4), Layout(context=2), Layout(data=2)]
BATCHES = ["padded", "packed", "packed-older-names"]


def samples() -> list[dict[str, Tensor]]:
    """Samples of several lengths, each with a third of prompt; the fifth has nothing to learn."""
    random, found = torch.Generator().manual_seed(3), []
    for i, length in enumerate(LENGTHS):
        ids = torch.randint(3, 250, (length + 1,), generator=random)
        mask = (torch.arange(length) >= length // 3).long() * (i != 4)
        found.append({"tokens": ids[:-1], "labels": ids[1:], "loss_mask": mask, "position_ids": torch.arange(length)})
    return found


def padded(rows: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Padded rows as Bridge's collator of unpacked samples makes them."""

    def columns(name: str) -> Tensor:
        return torch.stack([torch.nn.functional.pad(row[name], (0, LENGTH - len(row[name]))) for row in rows])

    return {name: columns(name) for name in rows[0]} | {"attention_mask": None}


def packed(rows: list[dict[str, Tensor]], multiple: int, *, older: bool) -> dict[str, Any]:
    """A packed row by Bridge's collator; `older`: with the names of its older data sets."""
    row = build_mcore_thd_sequence_batch_from_rows(rows, token_key="tokens", pad_to_multiple_of=multiple)
    if not older:
        return row
    names = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")
    edges, longest = row["cu_seqlens_q_padded"], row["max_seqlen_q"]
    filled = torch.cat([edges, edges.new_full((3,), -1)])[None]
    end = torch.tensor([[len(edges)]])
    return {name: row[name] for name in names} | {
        "cu_seqlens": filled,
        "cu_seqlens_argmin": end,
        "max_seqlen": longest,
    }


def micro_batches(kind: str, layout: Layout, data_rank: int) -> list[dict[str, Any]]:
    """This data-parallel rank's share: the first has three samples, one of them empty, where there are two."""
    rows = samples()
    parts = [rows[:1], rows[1:4], rows[4:6], rows[6:]]
    if layout.data > 1:
        parts = parts[:2] if data_rank == 0 else parts[2:]
    multiple = 2 * layout.context * layout.tensor
    if kind == "padded":
        return [padded(part) for part in parts]
    return [packed(part, multiple, older="older" in kind) for part in parts]


def whole() -> dict[str, Tensor]:
    """All samples as one micro-batch of padded rows in this package's own form."""
    rows = padded(samples())
    columns = {"tokens": rows["tokens"], "position_ids": rows["position_ids"]}
    columns["labels"] = rows["labels"].masked_fill(rows["loss_mask"] == 0, IGNORE_INDEX)
    counted = (rows["loss_mask"].sum(1) > 0).long()
    b = len(counted)
    columns |= {"samples": counted, "weight": counted[:, None].float(), "padding": rows["tokens"] == 0}
    columns |= {name: torch.zeros(b, dtype=torch.int64) for name in ("real_tokens", "row", "source")}
    return columns


def block(config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The CPU's layers, in place of Transformer Engine's."""
    made = layers(config, vp_stage, lambda *_: layer(config, RMSNorm, CoreAttention, experts=False, linear=False))
    return TransformerBlockSubmodules(layer_specs=made, layer_norm=RMSNorm)


def build(layout: Layout, **changes: Any) -> list[Any]:
    """Bridge's own model of the tiny Llama on this layout, with the weights of every layout, wrapped for gradients."""
    provider = AutoBridge.from_hf_pretrained(MODEL).to_megatron_provider(load_weights=False)
    provider.transformer_layer_spec = block
    provider.tensor_model_parallel_size, provider.pipeline_model_parallel_size = layout.tensor, layout.pipeline
    provider.context_parallel_size, provider.pipeline_dtype = layout.context, torch.float32
    provider.sequence_parallel = layout.tensor > 1
    provider.bf16, provider.params_dtype, provider.autocast_dtype = False, torch.float32, torch.float32
    provider.use_cpu_initialization = provider.calculate_per_token_loss = provider.variable_seq_lengths = True
    provider.gradient_accumulation_fusion = provider.bias_activation_fusion = provider.apply_rope_fusion = False
    provider.masked_softmax_fusion = provider.bias_dropout_fusion = False
    provider.seq_length, provider.moe_token_dispatcher_type = LENGTH, "alltoall"
    for name, value in changes.items():
        setattr(provider, name, value)
    provider.finalize()
    parallel_state.initialize_model_parallel(layout.tensor, layout.pipeline, context_parallel_size=layout.context)
    model_parallel_cuda_manual_seed(1)
    return provider.provide_distributed_model(
        DistributedDataParallelConfig(grad_reduce_in_fp32=True),
        pre_wrap_hook=weights_hook(None, read_config(MODEL), seed=7),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )


def state_of(kind: str, **ddp: bool) -> Any:
    """What the step reads of Bridge's `GlobalState`."""
    state = GlobalState()
    state.cfg = SimpleNamespace(
        dataset=SimpleNamespace(enable_in_batch_packing="packed" in kind),
        ddp=SimpleNamespace(**{"average_in_collective": False} | ddp),
        rerun_state_machine=SimpleNamespace(check_for_nan_in_loss=True, check_for_spiky_loss=False),
        logger=SimpleNamespace(timing_log_level=0, timing_log_option="minmax"),
        straggler=None,
        train=None,
        model=SimpleNamespace(virtual_pipeline_model_parallel_size=None),
    )
    return state


def run_step(model: list[Any], step: Any, batches: list[Any]) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """One global batch by Megatron's schedule -> (reports, gradients by the parameter's path in the whole model)."""
    config = get_model_config(model[0])
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = None
    b, s = batches[0]["tokens"].shape
    reports = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(batches),
        model=model[0],
        num_microbatches=len(batches),
        seq_length=s,
        micro_batch_size=b,
        forward_only=False,
    )
    chunk = unwrap_model(model[0])
    place = place_of(chunk, read_config(MODEL))
    return reports, {place.path(name): p.main_grad.clone() for name, p in chunk.named_parameters()}


def one() -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """The numbers of this package's own step, on one process."""
    step = Step(objective_settings("bft", SETTINGS), 500)
    return run_step(build(Layout()), step.forward, [whole()])


def theirs(kind: str, layout: Layout) -> tuple[Any, dict[str, Tensor]]:
    """A rank's numbers in Bridge's schedule: reports over all ranks, and this rank's part of the gradients."""
    model, state = build(layout), state_of(kind)
    batches = micro_batches(kind, layout, parallel_state.get_data_parallel_rank())
    step = prepare_forward_step_func(BftForwardStep("bft", vocab_size=500, **SETTINGS), state)
    reports, gradients = run_step(model, step, batches)
    return [{name: pair.tolist() for name, pair in report.items()} for report in reports], gradients


def shard(path: str, whole: Tensor, found: Tensor, rank: int, size: int) -> Tensor:
    """A tensor-parallel rank's part of a gradient; the gated layer is cut in each of its halves."""
    if whole.shape == found.shape:
        return whole
    if "linear_fc1" in path:
        return torch.cat([half.chunk(size)[rank] for half in whole.chunk(2)])
    [dim] = [d for d in range(whole.dim()) if whole.shape[d] != found.shape[d]]
    return whole.chunk(size, dim)[rank]


@pytest.fixture(scope="module")
def expected() -> Any:
    return run_world(1, one, megatron=True)[0]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", BATCHES)
def test_its_numbers_are_those_of_the_step(kind: str, layout: Layout, expected: Any):
    [report], gradients = expected
    loss, count = report["loss"].tolist()
    ranks = run_world(layout.world, theirs, kind, layout, megatron=True)
    last = [reports for reports, _ in ranks if reports]
    once = last[:: layout.tensor]  # the ranks of a tensor-parallel group report the same
    pairs = torch.tensor([r["bft loss"] for reports in once for r in reports])
    assert count == len(LENGTHS) - 1
    assert float(pairs[:, 1].sum()) == count
    torch.testing.assert_close(pairs[:, 0].sum(), torch.tensor(loss), rtol=1e-6, atol=0)
    found: set[str] = set()
    for rank, (_, own) in enumerate(ranks):
        for path, gradient in own.items():
            wanted = shard(path, gradients[path], gradient, rank % layout.tensor, layout.tensor)
            torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()), msg=path)
        found |= own.keys()
    assert found == gradients.keys()


def test_other_means_are_not_its_loss(expected: Any):
    [report], _ = expected
    loss, count = report["loss"].tolist()
    ranks = run_world(2, theirs, "packed", Layout(data=2), megatron=True)
    reports = [report for reports, _ in ranks for report in reports]
    pairs = torch.tensor([report["bft loss"] for report in reports])
    tokens = sum(report["lm loss"][1] for report in reports)
    assert float(pairs[:, 0].sum() / pairs[:, 1].sum()) == pytest.approx(loss / count, rel=1e-6)
    assert float((pairs[:, 0] / pairs[:, 1]).mean()) != pytest.approx(loss / count, rel=1e-2)
    assert float(pairs[:, 0].sum() / tokens) != pytest.approx(loss / count, rel=1e-2)


def parts(kind: str, layout: Layout) -> list[tuple[Tensor, Tensor]]:
    """This rank's tokens, learned labels and edges by Bridge's own `get_batch`, and by what the step reads."""
    model, state = build(layout), state_of(kind)
    chunk, found = unwrap_model(model[0]), []
    for batch in micro_batches(kind, layout, 0):
        tokens, labels, mask, _, _, packing = get_batch(iter([batch]), state.cfg, pg_collection=chunk.pg_collection)
        rows = read(iter([batch]), state.cfg, chunk)
        own = micro_batch(rows, physical_edges(rows), chunk, "exact")
        found += [(tokens, own.tokens), (labels.masked_fill(mask == 0, IGNORE_INDEX), own.labels)]
        if packing is not None:
            params, theirs = own.packed_seq_params, get_packed_seq_params(packing)
            edges = theirs.cu_seqlens_q if theirs.cu_seqlens_q_padded is None else theirs.cu_seqlens_q_padded
            found += [(edges, params.cu_seqlens_q_padded), (torch.tensor(theirs.max_seqlen_q), params.max_seqlen_q)]
    return found


@pytest.mark.parametrize(("kind", "context"), [("padded", 2), ("packed", 1), ("packed-older-names", 1)])
def test_its_part_of_a_row_is_that_of_get_batch(kind: str, context: int):
    """Bridge splits packed rows over contexts by a kernel of Transformer Engine, which needs a GPU."""
    for pairs in run_world(context, parts, kind, Layout(context=context), megatron=True):
        for wanted, own in pairs:
            assert torch.equal(wanted, torch.as_tensor(own, dtype=wanted.dtype))


def refused(changes: dict[str, Any], ddp: dict[str, bool], schedule: bool) -> str:
    model, state = build(Layout(), **changes), state_of("padded", **ddp)
    with pytest.raises(UserError) as caught:
        BftForwardStep()(state, iter(micro_batches("padded", Layout(), 0)), model[0], schedule)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "ddp", "schedule", "name"),
    [
        ({"calculate_per_token_loss": False}, {}, False, "calculate_per_token_loss"),
        ({}, {"average_in_collective": True}, False, "average_in_collective"),
        ({}, {}, True, "schedule plan"),
    ],
)
def test_what_would_be_wrong_is_refused_by_name(
    changes: dict[str, Any], ddp: dict[str, bool], schedule: bool, name: str
):
    assert name in run_world(1, refused, changes, ddp, schedule, megatron=True)[0]


def test_several_packed_rows_are_refused():
    with pytest.raises(UserError, match="micro_batch_size"):
        physical_edges({"cu_seqlens_q": torch.tensor([[0, 4, 8], [0, 6, 8]])})


def test_edges_are_those_of_segments_with_tokens():
    repeated = {"cu_seqlens_q": torch.tensor([0, 3, 7]), "cu_seqlens_q_padded": torch.tensor([[0, 4, 8, 8, 8]])}
    filled = {"cu_seqlens": torch.tensor([[0, 4, 8, -1, -1]]), "cu_seqlens_unpadded": torch.tensor([[0, 3, 7, -1, -1]])}
    for batch in (repeated, filled):
        edges = physical_edges(batch)
        assert edges is not None
        assert edges.tolist() == [0, 4, 8]
