"""Adapters on the experts of a mixture: an expert's own, whatever the layout, and read by `peft` over transformers."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron.core import parallel_state
from safetensors.torch import save_file
from torch import Tensor

from bft_megatron.errors import FieldError, UserError
from bft_megatron.hf.architectures import read_config
from bft_megatron.hf.shards import Output
from bft_megatron.lora import joined
from bft_megatron.lora.adapter_config import adapter_config
from bft_megatron.lora.factors import adapted, all_factors, in_files, settings_of
from bft_megatron.lora.layers import GroupedAdapters, adapter_of
from bft_megatron.lora.peft import CONFIG, PREFIX, WEIGHTS, AdapterFolder
from bft_megatron.recipe.schema import LoraSettings, Recipe
from bft_megatron.run.folder import RunFolder
from bft_megatron.run.prepared import prepare_rows
from tests.helpers import model_reference as reference
from tests.helpers.runs import Case, Layout, Result, do_nothing, make_recipe, read_metrics, train_rank
from tests.helpers.world import run_world

SETTINGS = LoraSettings(rank=4, alpha=8)


def write_adapter(folder: Path, model: Path, settings: LoraSettings = SETTINGS) -> Path:
    """A folder with random factors, as an export writes it."""
    config, generator = read_config(model), torch.Generator().manual_seed(3)

    def random(shape: tuple[int, ...]) -> Tensor:
        return 0.1 * torch.randn(shape, generator=generator)

    factors = all_factors(adapted(config, settings))
    outputs = {t: Output(t.name, torch.float32, t.shape, partial(random, t.shape)) for t in in_files(factors)}
    written = joined.join(outputs, joined.places(factors, config))
    folder.mkdir()
    save_file({PREFIX + output.name: output.read() for output in written}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(adapter_config(str(model), config, settings)))
    return folder


def with_adapter(folder: Path, model: torch.nn.Module) -> torch.nn.Module:
    return peft.PeftModel.from_pretrained(model, folder, is_trainable=True).double()


def apart(joined: dict[str, Tensor], model: Path) -> dict[str, Tensor]:
    """Gradients of `peft`'s parameters by the names of the files, of which it joins those of a layer's experts."""
    config, r = read_config(model), SETTINGS.rank
    known = {name.removeprefix(PREFIX).replace(".default.", "."): value for name, value in joined.items()}
    found = {}
    for tensor, [(weight, _), *_] in in_files(all_factors(adapted(config, SETTINGS))).items():
        if weight.expert is None:
            found[tensor.name] = known[tensor.name]
            continue
        layer, _, rest = tensor.name.partition(f".experts.{weight.expert}.")
        matrix, factor, _ = rest.split(".")
        index = config.experts.names.matrices.index(matrix)
        whole = known[f"{layer}.experts.{'' if index == 2 else 'base_layer.'}{factor}.weight"]
        matrices = 1 if index == 2 else 2
        if factor == "lora_A":  # [experts x matrices x rank, in]
            value = whole.unflatten(0, (config.experts.count, matrices, r))[weight.expert, index % 2]
        else:  # [matrices x out, matrices x rank x experts], of which the blocks off the diagonal are not the adapter's
            value = whole.unflatten(0, (matrices, -1)).unflatten(2, (matrices, r, -1))
            value = value[index % 2, :, index % 2, :, weight.expert]
        found[tensor.name] = value
    return found


def run(made: Recipe, world: int) -> Result:
    """Run a recipe over forked processes, from the newest checkpoint of its folder, and read what it reported."""
    model = Path(made.model)
    prepared = prepare_rows(made, model, read_config(model).vocab_size)
    run_world(world, train_rank, made, prepared, do_nothing, megatron=True)
    return Result(*read_metrics(RunFolder.of(made).metrics))


def gradients(made: Recipe) -> dict[str, Tensor]:
    """Of step 1, out of Adam's first moment, by the factors' names."""
    reader, prefix = dcp.FileSystemReader(RunFolder.of(made).checkpoint(1)), "optimizer.state.exp_avg."
    stored = reader.read_metadata().state_dict_metadata
    moments = {key: torch.empty(m.size) for key, m in stored.items() if key.startswith(prefix)}
    dcp.load(moments, storage_reader=reader, no_dist=True)
    found = {}
    for weight in all_factors(adapted(read_config(Path(made.model)), made.lora)):
        value, [tensor] = moments[prefix + weight.name] / (1 - made.train.adam_beta1), weight.tensors
        value = value if weight.expert is None else value[weight.expert]
        tensor.put(value, found.setdefault(tensor.name, torch.full(tensor.whole.shape, torch.nan)))
    return found


def differences(
    found: Result, found_gradients: dict[str, Tensor], expected: Result, own: dict[str, Tensor]
) -> dict[str, float]:
    """Relative to each gradient's largest element, and of the numbers of step 1."""
    assert found_gradients.keys() == own.keys()
    norm = math.sqrt(sum(float(g.pow(2).sum()) for g in own.values()))
    numbers = {**expected.train[0], "grad_norm": norm}
    off = {k: abs(found.train[0][k] / numbers[k] - 1) for k in ("loss", "lm_loss", "grad_norm")}
    for name, gradient in own.items():
        largest = float(gradient.abs().max()) or 1.0  # an expert that no token was sent to has none
        off[name] = float((found_gradients[name] - gradient).abs().max()) / largest
    return off


LAYOUTS = [
    Layout(tensor=2, sequence=True, expert_tensor=2),
    Layout(tensor=2, sequence=True, data=2, expert=2),  # each expert on two ranks, which are not of one TP group
]
SLOW = {
    "qwen3_moe": [
        Layout(tensor=2, sequence=True, expert=2),
        Layout(context=2, data=2, expert=4),
        Layout(data=4, expert=2, expert_tensor=2),
        Layout(tensor=2, sequence=True, data=4, expert=2, expert_tensor=2),
    ],
    "qwen3_moe_dense": [Layout(pipeline=2, virtual_pipeline=2, data=2, expert=2), *LAYOUTS],
    "qwen2_moe": LAYOUTS,
    "mixtral": LAYOUTS,
    "hunyuan": LAYOUTS,
    "glm": LAYOUTS,
    "hybrid_moe": [
        Layout(tensor=2, sequence=True, expert=2),
        Layout(context=2, expert=2),
        *LAYOUTS,
    ],
    "next": [Layout(pipeline=2, data=2, expert=2), Layout(context=2), *LAYOUTS],
}


def compare(model: str, data: Path, tmp_path: Path, layouts: list[Layout]) -> dict[str, float]:
    """The worst difference of each layout."""
    adapter = write_adapter(tmp_path / "adapter", data / model)
    words = [f"lora={{rank: 4, alpha: 8, adapter: {adapter}}}", "train.global_batch_size=4"]
    plain = make_recipe(tmp_path / "plain", data, Case(model=model), Layout(), 1, *words)
    expected = reference.first_step(plain, adapt=partial(with_adapter, adapter))
    own = apart(expected.gradients, data / model)
    worst = {}
    for layout in layouts:
        made = make_recipe(tmp_path / str(layout), data, Case(model=model), layout, 1, *words)
        off = differences(run(made, layout.world), gradients(made), expected, own)
        worst[str(layout)] = max((value, name) for name, value in off.items())
    return worst


@pytest.mark.slow
def test_gradients_are_those_of_peft(data: Path, tmp_path: Path):
    worst = compare("qwen3_moe", data, tmp_path, LAYOUTS)
    assert all(value <= 1e-5 for value, _ in worst.values()), worst


@pytest.mark.slow
def test_gradients_of_a_hybrid_are_those_of_peft(data: Path, tmp_path: Path):
    worst = compare("next", data, tmp_path, [Layout(tensor=2, sequence=True)])
    assert all(value <= 1e-5 for value, _ in worst.values()), worst


@pytest.mark.slow
@pytest.mark.parametrize("model", SLOW)
def test_gradients_are_those_of_peft_on_every_layout(model: str, data: Path, tmp_path: Path):
    worst = compare(model, data, tmp_path, SLOW[model])
    assert all(value <= 1e-5 for value, _ in worst.values()), worst


REFUSALS = [
    ("qwen3_moe", "{target: [gate_proj, down_proj]}", "", "lora.target: down_proj, gate_proj: peft joins"),
    ("mixtral", "{target: [q_proj, gate_proj, up_proj]}", "", "lora.target: gate_proj, up_proj: peft joins"),
    ("qwen3_moe", "{target: mlp, experts: false}", "", "lora.experts: leaves no module with an adapter"),
    ("hybrid_moe", "{target: [up_proj]}", "", "lora.target: up_proj: peft joins"),
    (
        "hybrid",
        "{target: [in_proj_z, in_proj_ba, conv1d]}",
        "",
        "lora.target: in_proj_ba, conv1d: this model's are all, ",
    ),
    ("hybrid", "{target: [in_proj_ba]}", "", "or a list of q_proj, k_proj, v_proj, o_proj, in_proj_qkv, in_proj_z, "),
    ("next", "{target: [in_proj_z]}", "", "v_proj, o_proj, in_proj_qkvz, in_proj_ba, out_proj, gate_proj, "),
    (
        "tiny",
        "{target: linear_attention}",
        "",
        "lora.target: linear_attention: this model's are all, attention, mlp, or a list of q_proj",
    ),
    ("qwen2_moe", "{}", "megatron.moe-shared-expert-overlap=true", "megatron.moe-shared-expert-overlap: takes"),
]


@pytest.mark.parametrize(("model", "lora", "flag", "said"), REFUSALS)
def test_what_cannot_be_is_refused_by_name(model: str, lora: str, flag: str, said: str, data: Path, tmp_path: Path):
    with pytest.raises(FieldError) as error:
        make_recipe(tmp_path, data, Case(model=model), Layout(), 1, f"lora={lora}", *([flag] if flag else []))
    assert said in str(error.value)


ALLOWED = [
    ("hybrid", "{target: linear_attention}"),
    ("next", "{target: [in_proj_ba, q_proj]}"),
    ("qwen3_moe", "{target: [down_proj]}"),
    ("qwen2_moe", "{target: mlp, experts: false}"),
]


@pytest.mark.parametrize(("model", "lora"), ALLOWED)
def test_what_peft_can_read_is_allowed(model: str, lora: str, data: Path, tmp_path: Path):
    made = make_recipe(tmp_path, data, Case(model=model), Layout(), 1, f"lora={lora}")
    assert adapted(read_config(data / model), settings_of(made))


def test_an_adapter_that_joins_the_experts_is_refused(data: Path, tmp_path: Path):
    """As peft itself writes one with transformers 5."""
    model = reference.whole_model(make_recipe(tmp_path / "run", data, Case(model="qwen3_moe"), Layout(), 1))
    with_adapter(write_adapter(tmp_path / "own", data / "qwen3_moe"), model).save_pretrained(tmp_path / "joined")
    (tmp_path / "joined" / CONFIG).write_text((tmp_path / "own" / CONFIG).read_text())
    with pytest.raises(UserError, match="factors join all experts of a layer"):
        AdapterFolder(tmp_path / "joined", read_config(data / "qwen3_moe"), SETTINGS)


def test_grouped_adapters_give_each_expert_its_own_tokens(data: Path):
    [differences] = run_world(1, _grouped, data / "qwen3_moe", megatron=True)
    assert max(differences) <= 1e-6


def _grouped(folder: Path) -> list[float]:
    """Of the adapters of a layer's experts, joined as on layers of grouped products, from the factors themselves."""
    config, tokens, found = read_config(folder), [3, 0, 1, 2, 0, 5, 1, 4], []
    table = [e for e in adapted(config, SETTINGS) if e.weight.expert is not None and e.weight.layer == 0]
    parallel_state.initialize_model_parallel()
    for matrix in ("linear_fc1", "linear_fc2"):
        own = [e for e in table if matrix in e.weight.name]
        joined = GroupedAdapters([adapter_of(e, SETTINGS, False, torch.empty(0)) for e in own])
        for parameter in joined.parameters():
            torch.nn.init.normal_(parameter)
        x = torch.randn(sum(tokens), own[0].weight.tensors[0].shape[1])
        pairs = [[a.get_parameter(n) for n in a.weights] for a in joined]
        parts = [
            torch.cat([2 * part @ a.T @ b.T for a, b in zip(f[::2], f[1::2], strict=True)], -1)
            for f, part in zip(pairs, x.split(tokens), strict=True)
        ]
        expected = torch.cat(parts)
        found.append(float((joined(x, tokens) - expected).abs().max() / expected.abs().max()))
    return found
