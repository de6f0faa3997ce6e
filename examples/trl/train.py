"""Balanced Fine-Tuning in TRL: a model and a file of conversations, with packed rows.

    python examples/trl/train.py MODEL ROWS.jsonl OUTPUT

A line of ROWS.jsonl is {"prompt": ..., "completion": ...} or {"messages": [...]}. For several processes start it
with `accelerate launch`.
"""

import sys

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from bft_megatron.integrations.trl import BftSFTTrainer
from bft_megatron.objective import records


def main(model: str, rows: str, output: str, **options: object) -> BftSFTTrainer:
    """Train a model on the file's rows and save it; `options` are those of `SFTConfig`."""
    trainer = BftSFTTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype="auto"),
        SFTConfig(output_dir=output, packing=True, max_length=2048, report_to=[], **options),
        train_dataset=Dataset.from_json(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
        objective=records.balanced(group_size=256),
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
