"""What an object is and looks like, in sentences: its noun alone, its full name, or two or three sentences of facts."""

from __future__ import annotations

from pointalign.embedded.facts import PEOPLE, longest_side, main_colour, name_sentence, read_name, shape

BRIEF = ("Describe this object briefly.", "Give a short caption of this 3D model.", "Sum up this object in one phrase.")
DETAILED = ("Describe this object in detail.", "Caption this 3D model in detail.", "Tell me more about this object.")


def noun_phrase(record: dict) -> tuple[str, bool]:
    """The head noun with its article, and whether it is a plural: ("a door", False), ("shelves", True)."""
    noun = read_name(record["head_noun"])
    if record["plural"] and not noun.plural:
        return record["name"].split()[-1], True
    return noun.phrase, noun.plural


def named(record: dict) -> str:
    """The answer to "What is this?": "This is a door.", "These are shelves."."""
    return name_sentence(*noun_phrase(record))


def describe(record: dict) -> str:
    """Two or three sentences of facts."""
    plural, people = record["plural"], record["head_noun"] in PEOPLE
    they_are = "They are" if plural else "It is"
    sentences = [name_sentence(record["noun_phrase"], plural)]
    if colour := main_colour(record):
        rest = [c for c, share in record["colors"].items() if c != colour and share >= 0.1][:2]
        sentences.append(f"{they_are} mostly {colour}" + (f", with some {' and '.join(rest)}." if rest else "."))
    elif not people:
        colours = [colour for colour, share in record["colors"].items() if share >= 0.2][:2]
        sentences.append(f"{they_are} {' and '.join(colours or list(record['colors'])[:1])}.")
    clauses = []
    if (word := shape(record)) and not plural:
        clauses.append(f"{'the figure' if people else 'it'} is {word}")
    elif side := longest_side(record):
        clauses.append(f"the {side} is the longest side")
    if record["mirror_left_right"]:
        clauses.append("the left and right halves mirror each other")
    if clauses:
        text = " and ".join(clauses)
        sentences.append(text[0].upper() + text[1:] + ".")
    return " ".join(sentences)


def brief(record: dict) -> str:
    """The full name with the main colour: "A white office chair."."""
    phrase = record["noun_phrase"]
    if colour := main_colour(record):
        article = "" if phrase == record["name"] else "an " if colour[0] in "aeiou" else "a "
        phrase = f"{article}{colour} {record['name']}"
    return phrase[0].upper() + phrase[1:] + "."
