"""The stop tokens of a model folder: `eos_token_id` of generation_config.json, or of config.json where that has none.

transformers' `generate`, vLLM, SGLang and TGI stop at every token of that list. config.json and the tokenizer keep the
base model's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bft_megatron.textfiles import read_object

FILE = "generation_config.json"

_OF_CONFIG = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Fields of config.json that transformers reads for generation only where there is no generation_config.json. The
supported architectures have no others."""


def stop_tokens(folder: Path) -> list[int]:
    """Return the ids of a model folder's stop tokens, in its order. Raises UserError if a file of it is no JSON."""
    return _ids(_generation(folder)) or _ids(_config(folder))


def with_stops(folder: Path, learned: Iterable[int]) -> str | None:
    """Return the generation_config.json of a model folder with more stop tokens after its own; None: it has them all.

    Raises:
        UserError: a file of it is no JSON.
    """
    own = stop_tokens(folder)
    more = sorted(set(learned) - set(own))
    if not more:
        return None
    kept = _generation(folder) or {key: value for key, value in _config(folder).items() if key in _OF_CONFIG}
    return json.dumps(kept | {"eos_token_id": own + more}, indent=2) + "\n"


def beyond_config(folder: Path) -> list[int]:
    """Return the stop tokens of a model folder, if generation_config.json has others than config.json; else none."""
    stops = stop_tokens(folder)
    return stops if set(stops) - set(_ids(_config(folder))) else []


def named(folder: Path, tokens: Iterable[int]) -> str:
    """Return tokens by their texts and ids: `<|endoftext|> (0), <|im_end|> (5)`; without text where none is found."""
    texts = _texts(folder)
    return ", ".join(f"{texts[token]} ({token})" if token in texts else str(token) for token in tokens)


def announce(folder: Path) -> None:
    """Print the stop tokens of an exported model folder, if config.json does not name them all."""
    if stops := beyond_config(folder):
        print(f"stop tokens in {FILE}: {named(folder, stops)}", flush=True)


def _ids(values: dict[str, Any]) -> list[int]:
    found = values.get("eos_token_id")
    found = found if isinstance(found, list) else [found]
    return [token for token in found if isinstance(token, int) and not isinstance(token, bool)]


def _generation(folder: Path) -> dict[str, Any]:
    return read_object(folder / FILE) if (folder / FILE).exists() else {}


def _config(folder: Path) -> dict[str, Any]:
    return read_object(folder / "config.json")


def _texts(folder: Path) -> dict[int, str]:
    """Return the added tokens of a folder's tokenizer.json by id; none if there is no such file."""
    file = folder / "tokenizer.json"
    added = read_object(file).get("added_tokens", []) if file.exists() else []
    return {token["id"]: token["content"] for token in added}
