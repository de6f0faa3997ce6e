"""SmolLM2-135M-Instruct's real weights: logits on three layouts, a round trip to the bit, the same greedy answers.

    python -m tests.hf.smollm2 runs/cpu_demo/smollm2      # the folder that `make demo` leaves; a few minutes

Not a part of `make test`, which runs without the model.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
import transformers

from bft_megatron.hf.export import export
from bft_megatron.hf.generate import generate
from tests import conftest  # noqa: F401  (Megatron, imported once)
from tests.helpers import sharded, tiny_models
from tests.helpers.exported import assert_same, tensors
from tests.helpers.sharded import Sharding
from tests.helpers.world import run_world

LAYOUTS = [Sharding(tp=3), Sharding(pp=2), Sharding(pp=2, first=10)]  # three key/value heads
QUESTIONS = ["What is arachnodactyly?", "Name three prime numbers.", "Write a sentence about the sea."]


def main() -> None:
    """Check, and say what was found."""
    folder = Path(sys.argv[1])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected, prompt = tiny_models.logits(model), tiny_models.prompts()[1].bool()
    v = expected.shape[-1]
    for layout in LAYOUTS:
        outputs = run_world(layout.world, _logits, folder, layout, megatron=True, timeout=600)
        worst = max(float((x[..., :v] - expected)[prompt].abs().max()) for x in outputs if x is not None)
        print(f"{layout}: logits differ by at most {worst:.1e}; the largest is {float(expected.abs().max()):.1f}")
        assert worst < 1e-4
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        saved = {folder: work / "checkpoints"}
        run_world(3, sharded.save_loaded, saved, Sharding(tp=3), megatron=True, timeout=600)
        export(work / "checkpoints", work / "out", folder, dtype=next(iter(tensors(folder).values())).dtype)
        assert_same(tensors(folder), tensors(work / "out"))
        print("load, save at TP 3, export: every tensor bit for bit")
        for question in QUESTIONS:
            answer = generate(folder, question, max_new_tokens=48)
            assert answer == generate(work / "out", question, max_new_tokens=48)
            print(f"the same answer from both: {answer!r}")


def _logits(folder: Path, layout: Sharding) -> torch.Tensor | None:
    with sharded.model(folder, layout) as chunks:
        return sharded.logits(chunks)


if __name__ == "__main__":
    main()
