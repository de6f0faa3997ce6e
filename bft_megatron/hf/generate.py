"""An answer from a Hugging Face model folder, through transformers alone: to try an export, not to serve one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bft_megatron.errors import UserError


def generate(folder: Path, prompt: str, max_new_tokens: int = 128) -> str:
    """Answer a prompt greedily, in the model's chat template where it has one, on a GPU where there is one.

    Raises:
        UserError: no model and tokenizer in the folder that transformers can load.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging  # seconds: only when it is needed

    logging.disable_progress_bar()

    if not (folder / "config.json").is_file():
        raise UserError("no model folder: it has no config.json", str(folder))
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        # Any: the decorators of its methods hide what they take.
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype="auto"
        )
    except (OSError, ValueError) as e:
        raise UserError(f"transformers cannot load it: {e}", str(folder)) from e
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    if tokenizer.chat_template is None:
        inputs = tokenizer(prompt, return_tensors="pt")
    else:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    inputs = inputs.to(model.device)
    # None for what the model's own generation config may have and what a greedy search warns of.
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, **greedy)
    (answer,) = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer
