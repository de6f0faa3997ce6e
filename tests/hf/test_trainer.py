"""The drop-in loss functions against the authors' values, and in transformers' own Trainer."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.modeling_outputs import CausalLMOutputWithPast

from bft_megatron.errors import UserError
from bft_megatron.hf.trainer import bft_loss_func, dft_loss_func, loss_func
from bft_megatron.objective.records import lowest_confidence
from bft_megatron.objective.view import Geometry
from tests.helpers import objective_reference as reference

GOLDEN = sorted((Path(__file__).parent.parent / "golden").glob("*.npz"))


def test_all_nine_files_are_there():
    assert len(GOLDEN) == 9


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
@pytest.mark.parametrize("kind", ["bft", "dft", "dft_items"])
def test_the_authors_values(path: Path, kind: str):
    golden = np.load(path)
    logits = torch.from_numpy(golden["logits"]).requires_grad_()
    function = {
        "bft": partial(bft_loss_func, group_size=int(golden["group_size"]), gamma=float(golden["gamma"])),
        "dft": dft_loss_func,
        "dft_items": partial(dft_loss_func, num_items_in_batch=50),
    }[kind]
    loss = function(CausalLMOutputWithPast(logits=logits), torch.from_numpy(golden["labels"]))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx(float(golden[f"{kind}_loss"]), rel=1e-6)
    expected = torch.from_numpy(golden[f"{kind}_grad"])
    assert (gradient - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert torch.equal(logits, torch.from_numpy(golden["logits"])), "the caller's logits were overwritten"


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_the_authors_confidences(path: Path):
    golden = np.load(path)
    labels = torch.from_numpy(golden["labels"])
    b, s = labels.shape
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    logp = reference.logprobs(torch.from_numpy(golden["logits"]), shifted).float().flatten()
    geometry = Geometry(shifted.flatten(), torch.arange(b + 1) * s, torch.ones(b) > 0, torch.ones(b))
    found = lowest_confidence(geometry.view(logp), int(golden["group_size"]), "geometric")
    torch.testing.assert_close(found, torch.from_numpy(golden["confidence"]), rtol=1e-6, atol=0)


def _batch(s: int = 40) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, s, 9, generator=generator) * 2
    return {"logits": logits}, torch.randint(9, (2, s), generator=generator)


@pytest.mark.parametrize("reduce", ["tokens", "samples"])
@pytest.mark.parametrize("items", [None, 50])
def test_any_objective_by_name(reduce: str, items: int | None):
    outputs, labels = _batch()
    labels[:, ::3] = -100
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    logits = outputs["logits"].requires_grad_()
    exact = logits.detach().double().requires_grad_()
    setting = reference.Setting("power", reduce, options={"alpha": 0.5})
    edges = [0, 40, 80]
    total = reference.loss(
        setting, reference.logprobs(exact, shifted).flatten(), shifted.flatten(), edges, torch.ones(2)
    )
    divisor = 2 if reduce == "samples" else items or int((shifted >= 0).sum())
    expected = total / divisor
    loss = loss_func("power", reduce=reduce, options={"alpha": 0.5})(outputs, labels, items)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    (found,), (wanted,) = torch.autograd.grad(loss, logits), torch.autograd.grad(expected, exact)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-7)


def test_by_name_it_is_the_same_bft():
    outputs, labels = _batch()
    assert torch.equal(
        loss_func("bft", group_size=4)(outputs, labels, 7), bft_loss_func(outputs, labels, 7, group_size=4)
    )


def test_what_logits_alone_do_not_give_is_refused():
    with pytest.raises(UserError, match="needs entropy: use BftTrainer"):
        loss_func("examples.objectives.eaft:record")


def test_defaults_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    outputs, labels = _batch(400)
    monkeypatch.delenv("BFT_GROUP_SIZE", raising=False)
    monkeypatch.delenv("BFT_CONF_GAMMA", raising=False)
    assert torch.equal(bft_loss_func(outputs, labels), bft_loss_func(outputs, labels, group_size=256, gamma=1.0))
    monkeypatch.setenv("BFT_GROUP_SIZE", "5")
    monkeypatch.setenv("BFT_CONF_GAMMA", "0.5")
    set_by_environment = bft_loss_func(outputs, labels)
    assert torch.equal(set_by_environment, bft_loss_func(outputs, labels, group_size=5, gamma=0.5))
    assert not torch.equal(set_by_environment, bft_loss_func(outputs, labels, group_size=256, gamma=1.0))


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("BFT_GROUP_SIZE", "many"),
        ("BFT_GROUP_SIZE", "0"),
        ("BFT_GROUP_SIZE", "2.5"),
        ("BFT_CONF_GAMMA", "inf"),
        ("BFT_CONF_GAMMA", "-1"),
    ],
)
def test_a_bad_environment_is_named(monkeypatch: pytest.MonkeyPatch, variable: str, value: str):
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=variable) as error:
        bft_loss_func(*_batch())
    assert f"not '{value}'" in str(error.value)


def test_arithmetic_confidence_is_another_loss_and_a_wrong_one_is_refused():
    outputs, labels = _batch()
    geometric = bft_loss_func(outputs, labels, group_size=4)
    assert bft_loss_func(outputs, labels, group_size=4, confidence="arithmetic").item() < geometric.item()
    with pytest.raises(UserError, match=r"objective\.confidence"):
        bft_loss_func(outputs, labels, confidence="mean")


@pytest.mark.parametrize("function", [bft_loss_func, dft_loss_func])
def test_a_batch_without_labels_gives_zero_with_a_gradient(function):
    outputs, labels = _batch()
    logits = outputs["logits"].requires_grad_()
    loss = function(outputs, torch.full_like(labels, -100))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_bf16_logits():
    outputs, labels = _batch()
    logits = outputs["logits"].bfloat16().requires_grad_()
    loss = bft_loss_func({"logits": logits}, labels, group_size=4)
    loss.backward()
    same = bft_loss_func({"logits": logits.detach().float()}, labels, group_size=4)
    assert loss.item() == pytest.approx(same.item(), rel=1e-6)
    assert logits.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("function", [partial(bft_loss_func, group_size=4), dft_loss_func])
def test_in_transformers_trainer(function, tmp_path: Path):
    """The first logged loss is that of the untouched model on the first batch, and training lowers 1 - p."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    model = LlamaForCausalLM(config)
    ids = torch.randint(32, (4, 20))
    labels = ids.masked_fill(torch.arange(20) < torch.tensor([[3], [9], [1], [15]]), -100)
    rows = [{"input_ids": i, "labels": row} for i, row in zip(ids, labels, strict=True)]

    def mean_p() -> float:
        with torch.no_grad():
            logp = reference.logprobs(model(input_ids=ids).logits[:, :-1], labels[:, 1:])
        return float(logp.exp()[labels[:, 1:] != -100].mean())

    with torch.no_grad():
        expected, before = function(model(input_ids=ids), labels).item(), mean_p()
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=20,
        per_device_train_batch_size=4,
        learning_rate=0.03,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, compute_loss_func=function)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-3)
    assert mean_p() > 2 * before


@pytest.mark.parametrize("function", [bft_loss_func, dft_loss_func])
def test_without_logits_the_models_own_loss(function):
    _, labels = _batch()
    own = torch.tensor(3.0)
    assert function({"loss": own}, labels) is own
    assert function(CausalLMOutputWithPast(loss=own), labels) is own
    assert function({}, labels).item() == 0


@pytest.mark.parametrize("function", [partial(bft_loss_func, group_size=4), dft_loss_func])
def test_labels_longer_than_the_logits_are_cut(function):
    """The last position's label is the first of those beyond."""
    outputs, labels = _batch(40)
    whole = function({"logits": outputs["logits"][:, :30]}, labels)
    assert torch.equal(whole, function({"logits": outputs["logits"][:, :30]}, labels[:, :31]))
    assert not torch.equal(whole, function({"logits": outputs["logits"][:, :30]}, labels[:, :30]))
