"""What is compared with the gradient is divided by what LLaMA-Factory's trainer multiplies that of BFT by."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from bft_megatron.llamafactory import convert, print_table
from tests.helpers import tiny_models
from tests.helpers.world import run_world
from tests.llamafactory.written import loaded, written

SUMMED = {"use_bft_loss": True, "gradient_accumulation_steps": 4}
APART = {"average_tokens_across_devices": False}

CASES: list[tuple[int, dict[str, Any], dict[str, float]]] = [
    # GPUs; fields of the config; of the recipe
    (1, {}, {"clip_grad": 0.25, "adam_eps": 2.5e-9}),
    (1, {"max_grad_norm": 0, "adam_epsilon": 1e-6}, {"clip_grad": 0.0, "adam_eps": 2.5e-7}),
    (1, {"deepspeed": {"gradient_clipping": 2.0}}, {"clip_grad": 0.5}),
    (2, {}, {"clip_grad": 0.125, "adam_eps": 1.25e-9}),
    (2, APART, {"clip_grad": 0.25, "adam_eps": 2.5e-9}),
    (1, {"gradient_accumulation_steps": 1}, {"clip_grad": 1.0, "adam_eps": 1e-8}),
    (2, {"use_bft_loss": False}, {"clip_grad": 1.0, "adam_eps": 1e-8}),
    (2, {"use_bft_loss": False, "use_dft_loss": True}, {"clip_grad": 1.0, "adam_eps": 1e-8}),
    (2, {"use_mca": True}, {"clip_grad": 1.0, "adam_eps": 1e-8}),  # which ignores the loss, and has one divisor
]


@pytest.mark.parametrize(("gpus", "given", "wanted"), CASES)
def test_the_recipe(gpus: int, given: dict[str, Any], wanted: dict[str, float], tmp_path: Path):
    made = vars(loaded(written(tmp_path, **SUMMED | given), gpus).train)
    assert {name: made[name] for name in wanted} == wanted


def test_the_table_says_it(tmp_path: Path):
    with (console := Console(width=200)).capture() as said:
        print_table(convert(written(tmp_path, **SUMMED), 2), console)
    assert "max_grad_norm 1 of a gradient summed over 4 micro-batches x 2 GPUs │ train.clip_grad 0.125" in " ".join(
        said.get().split()
    )


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_transformers_trainer_multiplies_the_gradient(tmp_path: Path):
    """A loss that is a mean over a micro-batch, as that of BFT, on one process and on two."""
    [once] = run_world(1, gradient_norm, tmp_path, 1, True)
    [times] = run_world(1, gradient_norm, tmp_path, 4, True)
    assert times == pytest.approx(4 * once, rel=1e-5)
    assert run_world(2, gradient_norm, tmp_path, 4, True) == pytest.approx([8 * once] * 2, rel=1e-5)
    assert run_world(2, gradient_norm, tmp_path, 4, False) == pytest.approx([4 * once] * 2, rel=1e-5)


def gradient_norm(folder: Path, accumulation: int, across: bool) -> float:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # asked for, and not used: the world is there
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_models.config("llama", num_hidden_layers=1))
    row = {name: torch.arange(8) for name in ("input_ids", "labels")}
    arguments = TrainingArguments(
        str(folder),
        max_steps=1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulation,
        average_tokens_across_devices=across,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=[row] * 8, compute_loss_func=mean_loss)
    trainer.train()
    return next(line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line)


def mean_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: object = None) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(outputs["logits"][0, :-1].float(), labels[0, 1:])
