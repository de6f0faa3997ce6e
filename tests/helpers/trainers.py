"""Rows, a tiny model and the gradient that a transformers Trainer's first optimizer step must have, in float64."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from tests.helpers import objective_reference as reference

VOCABULARY = 32
BATCH = 16
"""Rows of one optimizer step, however they are spread over micro-batches and processes."""


def tiny_llama() -> LlamaForCausalLM:
    """Return the same small model at each call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def words_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose words are <0>, <1> and so on, separated by spaces."""
    tokenizer = Tokenizer(WordLevel({f"<{i}>": i for i in range(VOCABULARY)}, unk_token="<3>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<0>", bos_token="<1>", eos_token="<2>")


def rows() -> list[dict[str, list[int]]]:
    """Return BATCH rows of unequal lengths, each with a prompt that is not supervised; the third has no labels."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for i in range(BATCH):
        length = int(torch.randint(4, 24, (), generator=generator))
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        prompt = length if i == 2 else int(torch.randint(1, length - 1, (), generator=generator))
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return made


def padded(batch: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Pad rows on the right, as a data collator does."""
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}

    def column(key: str) -> Tensor:
        values = [torch.tensor(row.get(key, [1] * len(row["input_ids"]))) for row in batch]
        return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill[key])

    return {key: column(key) for key in fill}


def expected_gradients(setting: reference.Setting) -> tuple[float, dict[str, Tensor]]:
    """Return the loss of one step over `rows()` and its gradients in float64, one row after the other."""
    model = tiny_llama().double()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows():
        labels = torch.tensor([*row["labels"][1:], reference.NONE])
        logp = reference.logprobs(model(input_ids=torch.tensor([row["input_ids"]])).logits[0], labels)
        total = total + reference.loss(setting, logp, labels.tolist(), [0, len(labels)], torch.ones(1))
        supervised = int((labels != reference.NONE).sum())
        count += supervised if setting.reduce == "tokens" else supervised > 0
    (total / count).backward()
    return (total / count).item(), {name: p.grad.float() for name, p in model.named_parameters()}


class Recorder(TrainerCallback):
    """Keeps the gradients of the first optimizer step, without the prefixes of wrappers."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Copy the gradients; of a sharded parameter the whole."""
        for name, parameter in model.named_parameters():
            whole = getattr(parameter.grad, "full_tensor", lambda p=parameter: p.grad)()
            self.gradients[name.removeprefix("module.")] = whole.clone()


def first_step(make: Callable[[Any], Any], folder: str, accumulation: int = 1, processes: int = 1, **options: Any):
    """Run one optimizer step of the Trainer that `make(arguments, callbacks)` gives -> the logged loss, gradients."""
    if processes > 1:
        _join_the_world()
    recorder = Recorder()
    arguments = {
        "output_dir": folder,
        "max_steps": 1,
        "per_device_train_batch_size": BATCH // (accumulation * processes),
        "gradient_accumulation_steps": accumulation,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        **options,
    }
    trainer = make(arguments, [recorder])
    trainer.train()
    return trainer.state.log_history[0]["loss"], recorder.gradients


def _join_the_world() -> None:
    """Let accelerate use the process group that there is, not the state of the process that was forked."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def assert_same(found: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]]) -> None:
    """Compare a loss and gradients with the reference's."""
    assert abs(found[0] - expected[0]) < 2e-4 * abs(expected[0])
    assert found[1].keys() == expected[1].keys()
    scale = max(float(g.abs().max()) for g in expected[1].values())
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).abs().max() <= 1e-5 * scale, name
