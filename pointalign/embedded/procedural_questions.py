"""The conversations about procedural objects, of which name, symmetry and real size are not known.

`conversations([procedural_record(...), ...])` balances the questions over a list of objects; where objects are made one
by one, `procedural_conversations` writes what is balanced without a list.
"""

from __future__ import annotations

from functools import cache

from pointalign.embedded.debatable import could_be
from pointalign.embedded.facts import read_name, seed_of
from pointalign.embedded.procedural import MAKERS
from pointalign.embedded.questions import PROPERTIES, Asked, entries_of, noun_question, partners


def procedural_record(record: dict, object_id: str) -> dict:
    """The record of `procedural_object` with the fields that `questions.conversations` reads."""
    name = read_name(record["head_noun"])
    unknown = {"mirror_left_right": None, "mirror_front_back": None, "catalogue_scale": False}
    described = {"name": name.name, "noun_phrase": name.phrase, "plural": name.plural}
    return unknown | described | record | {"object_id": object_id}


@cache
def _other_nouns() -> list[dict[str, str]]:
    """Noun -> another noun, in several permutations of all nouns: what each object is asked about with a true No."""
    nouns = list(MAKERS)
    permutations = []
    for turn in range(len(nouns)):
        order = sorted(nouns, key=lambda noun: seed_of(f"{turn}/{noun}"))
        found = partners(len(order), lambda i, j, order=order: not could_be(order[i], order[i], order[j]))
        permutations.append({order[i]: order[j] for i, j in enumerate(found) if j is not None})
    return permutations


def procedural_conversations(record: dict, object_id: str) -> list[dict]:
    """The annotation entries about one object of `procedural_object`.

    Yes/no questions are balanced per noun and per side if the nouns are drawn evenly: each object is asked about its
    noun and about another, and about its sides in both directions. Colours and shapes are not asked about with Yes or
    No, because their balance needs a list of objects.

    Args:
        record: as `procedural_object` returns it; with `legs` the legs are asked about.
        object_id: decides the other noun and the wordings.
    """
    item = procedural_record(record, object_id)
    noun, ids = item["head_noun"], (object_id,)
    stated = f"it is {item['noun_phrase']}."
    permutations = _other_nouns()
    other = permutations[seed_of(f"{object_id}/other noun") % len(permutations)][noun]
    asked = [
        Asked(ids, "yes-no name", "is_noun", noun_question(noun), f"Yes, {stated}"),
        Asked(ids, "yes-no name", "is_noun", noun_question(other), f"No, {stated}"),
    ]
    for prop in PROPERTIES.values():
        if prop.kind == "yes-no side" and (truth := prop.holds(item)) is not None:
            answer = f"Yes, {prop.yes}." if truth else f"No, {prop.no}."
            asked += [Asked(ids, prop.kind, prop.fact, text, answer) for text in prop.texts]
    return entries_of(item, asked)
