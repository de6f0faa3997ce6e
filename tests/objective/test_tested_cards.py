"""The file of cards on which the Triton kernels are tested, and what a head takes on a card by it."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
import torch

from bft_megatron.objective import tested_cards
from bft_megatron.objective.kernels import takes_triton
from bft_megatron.recipe.schema import ObjectiveSettings
from bft_megatron.training.head import untested_card

CUDA = torch.device("cuda")


def test_every_card_says_what_passed_when():
    cards = tested_cards.read()
    assert cards
    for card in cards:
        assert all((card.card, card.driver, card.torch, card.triton))
        assert date.fromisoformat(card.date)
        assert "tests/gpu/test_head.py" in card.passed
        assert all((Path(__file__).parents[2] / file).exists() for file in card.passed)
        assert tested_cards.is_tested(tuple(map(int, card.capability.split("."))))


def test_a_card_stands_once_for_its_versions(tmp_path: Path):
    file, old = tmp_path / "cards.json", tested_cards.read()[0]
    file.write_text("[]\n")
    for card in (old, replace(old, torch="2.14.1"), again := replace(old, date="2027-01-01")):
        tested_cards.add(card, file)
    assert tested_cards.read(file) == [replace(old, torch="2.14.1"), again]


@pytest.mark.parametrize(("capability", "tested"), [((9, 0), True), ((8, 0), False)])
def test_a_head_takes_triton_on_tested_cards_or_where_asked(
    capability: tuple[int, int], tested: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
    found = {kernels: takes_triton(kernels, CUDA) for kernels in ("auto", "torch", "triton")}
    assert found == {"auto": tested, "torch": False, "triton": True}
    assert not takes_triton("auto", torch.device("cpu"))
    said = untested_card(ObjectiveSettings())
    assert said == [] if tested else "a card (compute capability 8.0)" in said[0]
    assert untested_card(ObjectiveSettings(kernels="torch")) == []
