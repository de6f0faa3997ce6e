"""Wording of the questions and answers about a phenotype: functions of a term, its neighbours and a random generator.

A kind of pair is a function `(term, terms, rng) -> (question, answer) | None`, None if the ontology has too little for
it; KINDS lists them. This module neither reads the ontology nor writes files.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Phenotype:
    """One term of the ontology. Parents and children are ids, the rest is text; empty if the ontology has nothing.

    Genes and diseases include those of the more specific terms below it.
    """

    name: str
    definition: str = ""
    comment: str = ""
    synonyms: tuple[str, ...] = ()
    parents: tuple[str, ...] = ()
    children: tuple[str, ...] = ()
    genes: tuple[str, ...] = ()
    diseases: tuple[str, ...] = ()


Pair = tuple[str, str]  # a question and its answer
Terms = Mapping[str, Phenotype]  # by id; parents and children that are not in it are not mentioned

MOST_LISTED = 8  # names in one enumeration; a phenotype can have thousands of genes


def say(rng: random.Random, wordings: Sequence[str], *values: str) -> str:
    """Return one of the wordings with the values filled in."""
    return rng.choice(wordings).format(*values)


def listed(names: Sequence[str]) -> str:
    """Return `A, B and C`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def some(rng: random.Random, names: Sequence[str], most: int = MOST_LISTED) -> list[str]:
    """Return at most `most` of the names, drawn at random, in their original order."""
    return [names[i] for i in sorted(rng.sample(range(len(names)), min(most, len(names))))]


def known(keys: Sequence[str], terms: Terms) -> list[Phenotype]:
    """Return the terms of these ids, without those that are not in `terms`."""
    return [terms[key] for key in keys if key in terms]


def joined(*sentences: str) -> str:
    """Join the non-empty sentences to one paragraph."""
    return " ".join(sentence for sentence in sentences if sentence)


def broader(term: Phenotype, terms: Terms, rng: random.Random) -> str:
    """Return a sentence on the parents."""
    wordings = ("It is a kind of {}.", "It is a more specific form of {}.", "It falls under {}.", "It belongs to {}.")
    names = [parent.name for parent in known(term.parents, terms)]
    return say(rng, wordings, listed(names)) if names else ""


def narrower(term: Phenotype, terms: Terms, rng: random.Random) -> str:
    """Return a sentence on the children."""
    names = [child.name for child in known(term.children, terms)]
    if len(names) < 2:
        return f"A more specific form is {names[0]}." if names else ""
    whole = len(names) <= MOST_LISTED
    return f"{'Its' if whole else 'Among its'} more specific forms are {listed(some(rng, names))}."


def also_called(term: Phenotype, rng: random.Random) -> str:
    """Return a sentence on the synonyms."""
    wordings = ("It is also called {}.", "It is also known as {}.", "Other wordings: {}.", "Reports may call it {}.")
    return say(rng, wordings, listed(some(rng, term.synonyms, 4))) if term.synonyms else ""


def behind_it(term: Phenotype, rng: random.Random) -> str:
    """Return a sentence on the genes."""
    wordings = ("Genes associated with it include {}.", "It has been linked to genes such as {}.")
    return say(rng, wordings, listed(some(rng, term.genes))) if len(term.genes) > 1 else ""


def seen_in(term: Phenotype, rng: random.Random) -> str:
    """Return a sentence on the diseases, separated by semicolons because their names contain commas."""
    wordings = ("It is a feature of {}.", "Diseases that can show it: {}.", "It has been described in {}.")
    return say(rng, wordings, "; ".join(some(rng, term.diseases, 4))) if term.diseases else ""


def in_passing(term: Phenotype, rng: random.Random) -> str:
    """Return the definition as an aside, for answers to other questions."""
    return say(
        rng, ("As to the finding itself: {}", "The finding, in a word: {}", "For reference: {}"), term.definition
    )


def define(term: Phenotype, terms: Terms, rng: random.Random) -> Pair:
    """Ask for the definition."""
    questions = (
        "What is {}?",
        "What does {} mean?",
        "Define {}.",
        "Can you explain {} to me?",
        "A report mentions {}. What is that?",
        "How would you describe {} to a student?",
    )
    openings = ("{1}", "{0}: {1}", "{0} is defined as follows. {1}", "In short, {0} means this: {1}")
    opening = say(rng, openings, term.name, term.definition)
    answer = joined(opening, term.comment, also_called(term, rng), broader(term, terms, rng))
    return say(rng, questions, term.name), answer


def overview(term: Phenotype, terms: Terms, rng: random.Random) -> Pair:
    """Ask for all that the ontology has on the term and its parents."""
    questions = (
        "Give me an overview of {}.",
        "Tell me what is known about {}.",
        "Write a short encyclopedia entry on {}.",
        "I am reading up on {}. What should I know?",
    )
    answer = joined(
        f"{term.name}: {term.definition}",
        term.comment,
        broader(term, terms, rng),
        *[f"{parent.name}: {parent.definition}" for parent in known(term.parents, terms) if parent.definition],
        also_called(term, rng),
        narrower(term, terms, rng),
        behind_it(term, rng),
        seen_in(term, rng),
    )
    return say(rng, questions, term.name), answer


def recognise(term: Phenotype, terms: Terms, rng: random.Random) -> Pair | None:
    """Ask for the name, given the definition; None if the definition contains the name."""
    if term.name.lower() in term.definition.lower():
        return None
    questions = (
        'Which phenotype is described here? "{}"',
        'What is the name of this finding? "{}"',
        "Name the phenotypic abnormality that fits this description: {}",
    )
    openings = ("This is {}.", "The description fits {}.", "The finding is called {}.", "That would be {}.")
    answer = joined(
        say(rng, openings, term.name),
        term.comment,
        broader(term, terms, rng),
        also_called(term, rng),
        narrower(term, terms, rng),
        seen_in(term, rng),
    )
    return say(rng, questions, term.definition), answer


def translate(term: Phenotype, terms: Terms, rng: random.Random) -> Pair | None:
    """Ask for the name, given a synonym."""
    if not term.synonyms:
        return None
    questions = (
        'A patient file says "{}". Which phenotype is that?',
        'What is meant by "{}"?',
        'What do clinicians call "{}"?',
    )
    openings = ('"{1}" is another name for {0}.', 'The usual name of "{1}" is {0}.', '"{1}" means {0}.')
    synonym = rng.choice(term.synonyms)
    opening = say(rng, openings, term.name, synonym)
    answer = joined(opening, term.definition, term.comment, broader(term, terms, rng), narrower(term, terms, rng))
    return say(rng, questions, synonym), answer


def place(term: Phenotype, terms: Terms, rng: random.Random) -> Pair | None:
    """Ask for the way up the ontology, through the first parent each time."""
    questions = (
        "Where does {} belong among human phenotypes?",
        "Classify {}, from the specific to the general.",
        "What broader findings does {} fall under?",
    )
    steps = [term]
    while parents := known(steps[-1].parents, terms):
        steps.append(parents[0])
    if len(steps) < 4:
        return None
    parent, *above = [step.name for step in steps[1:6]]
    way_up = f"{term.name} is a kind of {parent}. Above that come {', then '.join(above)}."
    return say(rng, questions, term.name), joined(way_up, in_passing(term, rng), narrower(term, terms, rng))


def compare(term: Phenotype, terms: Terms, rng: random.Random) -> Pair | None:
    """Ask for the difference between two forms of the same broader finding."""
    questions = (
        "What is the difference between {} and {}?",
        "How do I tell {} from {}?",
        "Compare {} with {}.",
    )
    openings = ("Both are forms of {}.", "They have a broader finding in common, {}.", "Each of them is a kind of {}.")
    for parent in known(term.parents, terms):
        others = [other for other in known(parent.children, terms) if other.definition and other != term]
        if others:
            other = rng.choice(others)
            sides = [f"{side.name}: {side.definition}" for side in (term, other)]
            return say(rng, questions, term.name, other.name), joined(say(rng, openings, parent.name), *sides)
    return None


def divide(term: Phenotype, terms: Terms, rng: random.Random) -> Pair | None:
    """Ask for the more specific terms, answered with their definitions."""
    children = [f"- {child.name}: {child.definition}" for child in known(term.children, terms) if child.definition]
    if len(children) < 2:
        return None
    questions = (
        "What forms of {} are there?",
        "List some kinds of {} and say what each is.",
        "Into which more specific findings can {} be divided?",
    )
    openings = ("Forms of {} include the following.", "Some kinds of {}:", "{} can be divided further:")
    return say(rng, questions, term.name), "\n".join([say(rng, openings, term.name), *some(rng, children)])


def genes(term: Phenotype, terms: Terms, rng: random.Random) -> Pair | None:
    """Ask for the genes, answered with the definition as context."""
    if len(term.genes) < 3:
        return None
    questions = (
        "Which genes are associated with {}?",
        "Name genes that have been linked to {}.",
        "Name genes to look at in a patient with {}.",
    )
    openings = ("Genes associated with {} include {}.", "For {}, the genes on record include {}.")
    opening = say(rng, openings, term.name, listed(some(rng, term.genes)))
    return say(rng, questions, term.name), joined(opening, in_passing(term, rng), broader(term, terms, rng))


def diseases(term: Phenotype, terms: Terms, rng: random.Random) -> Pair | None:
    """Ask for the diseases, answered with the definition as context."""
    if len(term.diseases) < 2:
        return None
    questions = (
        "In which inherited diseases is {} seen?",
        "Which Mendelian diseases can present with {}?",
        "A patient has {}. Name some diseases that can show it.",
    )
    openings = ("{} is a feature of several diseases:", "Diseases in which {} has been described:")
    items = [f"- {name}" for name in some(rng, term.diseases, 6)]
    context = joined(in_passing(term, rng), broader(term, terms, rng))
    return say(rng, questions, term.name), "\n".join([say(rng, openings, term.name), *items, context])


KINDS = (define, overview, recognise, translate, place, compare, divide, genes, diseases)
