"""Where a layout has nothing to do: chunks, ranks, micro-batches and whole replicas without a token that is learned.

One data set of extremes: a conversation that fills a row, long questions with an answer of one token, and many samples
of that alone; fewer rows than a step holds, and a validation set of one sample. None may hang, all numbers are right.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers import model_reference as reference
from tests.helpers.comparing import assert_same
from tests.helpers.runs import Case, Layout, make_recipe, run

ROW = 256


def conversation(question: str, answer: str) -> str:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages}) + "\n"


@pytest.fixture(scope="module")
def extremes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extremes")
    lines = [conversation("a", "b " * 2 * ROW)]  # longer than a row: truncated to all of it
    lines += [conversation("why " * 40 + str(i), "A") for i in range(3)]
    lines += [conversation(chr(65 + i), "B") for i in range(20)]
    (folder / "train.jsonl").write_text("".join(lines))
    (folder / "valid.jsonl").write_text(conversation("a", "b c"))
    return folder


@pytest.mark.parametrize(
    ("case", "layout"),
    [
        (Case(), Layout(data=8)),
        pytest.param(Case(), Layout(context=4, data=2), marks=pytest.mark.slow),
        pytest.param(
            Case(pad_multiple=64, cp_windows="per_rank"),
            Layout(tensor=2, context=4, sequence=True),
            marks=pytest.mark.slow,
        ),
        (Case("dft"), Layout(pipeline=2, virtual_pipeline=2, data=2)),
        (Case("sft", packing=False), Layout(context=2, pipeline=2)),
    ],
    ids=str,
)
def test_layouts_with_little_to_do(case: Case, layout: Layout, extremes: Path):
    epoch = ("train.epochs=1", "train.global_batch_size=32", "data.overlong=truncate")
    head = f"objective.head={'chunked' if layout.tensor > 1 else 'logits'}"  # TP ranks without a row that counts
    alone = [f"data.{split}={extremes / split}.jsonl" for split in ("train", "valid")]
    made = make_recipe(extremes / f"{case}-{layout}", extremes, case, layout, 0, *epoch, head, *alone)
    result = run(made, layout.world)
    assert result.train[0]["samples"] == 24
    assert result.valid[0]["samples"] == 1
    assert_same(result, reference.first_step(made, layout.context if case.cp_windows == "per_rank" else 1))
