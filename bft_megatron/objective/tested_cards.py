"""The GPUs on which the Triton kernels passed their tests, where they are the default: tested_cards.json.

`make test-gpu` writes the file where all tests of the head pass; it is committed with the package. Triton compiles the
same machine code for all cards of a compute capability, so a card stands for the others of its own.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = Path(__file__).with_name("tested_cards.json")


@dataclass(frozen=True)
class Card:
    """A card, the tests that passed on it, and the versions.

    capability: its compute capability, as `9.0`.
    date: of the last time that it passed, in ISO form.
    passed: test files of which every test passed.
    """

    card: str
    capability: str
    driver: str
    torch: str
    triton: str
    date: str
    passed: list[str]


def read(file: Path = FILE) -> list[Card]:
    """Return the cards of the file."""
    return [Card(**card) for card in json.loads(file.read_text(encoding="utf-8"))]


@functools.cache
def is_tested(capability: tuple[int, int]) -> bool:
    """Return whether a card of this compute capability is in the file."""
    return any(card.capability == "{}.{}".format(*capability) for card in read())


def add(card: Card, file: Path = FILE) -> None:
    """Write a card into the file, in place of the same card under the same versions; the newest comes last."""
    versions = (card.card, card.driver, card.torch, card.triton)
    others = [old for old in read(file) if (old.card, old.driver, old.torch, old.triton) != versions]
    text = json.dumps([asdict(each) for each in [*others, card]], indent=2)
    file.write_text(text + "\n", encoding="utf-8")


def torch_is_slower(card: str, capability: tuple[int, int]) -> str:
    """Return the sentence of a run whose head computes with torch's operators because its card is not in the file."""
    return (
        f"the head's Triton kernels are untested on {card} (compute capability {capability[0]}.{capability[1]}): "
        "torch's operators compute it, in more passes over memory; `make test-gpu` adds the card, and "
        "`objective.kernels: triton` takes them untested"
    )
