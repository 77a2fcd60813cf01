"""Names of objects, facts that can be seen in a cloud, and the conversations written from them.

Nothing is guessed: a fact that is not clear is not mentioned, and a comparison closer than 10 % is not asked about.

Width, height and depth are the sides of the object's box in its catalogue pose, so turning a cloud about the vertical
axis leaves every answer true.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from scipy.spatial import KDTree

MARGIN = 1.1  # two sides whose ratio is below this count as equally long
MAJORITY, LEAD = 0.4, 0.15  # least share of a main colour, and least distance to the second colour's share
SYMMETRIC, ASYMMETRIC = 1.15, 1.6  # limits of `mirror_error`; between them symmetry is not mentioned
PALETTE = {
    "black": ["#000000", "#202020"],
    "gray": ["#505050", "#808080", "#b0b0b0"],
    "white": ["#ffffff", "#e4e4e4"],
    "red": ["#c81414", "#e63c32", "#821420"],
    "orange": ["#f08214"],
    "yellow": ["#f5dc32", "#ffff96", "#c8b41e"],
    "beige": ["#e1cda5", "#f5e6cd", "#c8b491"],
    "brown": ["#6e411e", "#96643c", "#c86e28", "#462d1e", "#5a4a3c"],
    "green": ["#1e8228", "#5a963c", "#14461a", "#96be5a", "#566b2f"],
    "blue": ["#1e3cb4", "#5a96dc", "#141e5a", "#aacdf0", "#465a82"],
    "purple": ["#782896", "#aa82c8"],
    "pink": ["#fa96be", "#e65096", "#f5c8c8"],
}
SINGULAR_ENDINGS = ("ss", "us", "is")  # "glass", "bus", "tennis"
PLURAL_ONLY = frozenset("clothes glasses headphones pliers scissors shorts stairs sunglasses trousers".split())
IRREGULAR_PLURALS = {
    "bookshelves": "bookshelf", "buses": "bus", "children": "child", "knives": "knife", "leaves": "leaf",
    "men": "man", "people": "person", "shelves": "shelf", "women": "woman",
}  # fmt: skip
PREPOSITIONS = ("with", "of", "on", "under", "for")
PEOPLE = {"man", "woman", "boy", "girl"}  # the surface's colour is that of clothes, so it is not mentioned
UNCOUNTABLE = {"bread", "butter", "soap"}
SPOKEN_CONSONANT = ("uri", "ute", "uni")  # "a urinal"
OTHERS = {  # noun -> words in a name that would make "Is this a <noun>?" debatable
    "chair": "chair seat stool bench sofa lounger bed stroller ottoman beanbag potty toilet hammock bidet swing",
    "table": "table desk stand bench workbench vanity stool island cooktop ottoman extension tray",
    "lamp": "lamp light lantern spotlight flashlight lamppost candle",
    "tree": "tree plant bush hedge flower cactus lily",
    "bottle": "bottle jar vase shaker pot extinguisher",
    "car": "car truck van bus forklift",
    "sofa": "sofa bench armchair futon seat bed lounger ottoman",
    "bed": "bed crib futon sofa lounger mattress hammock mat bag",
    "door": "door window cabinet wardrobe cupboard closet locker elevator stall refrigerator shutter",
    "box": "box cabinet chest trunk container crate carton case bin basket locker safe",
}
PLACES = ("living room", "kitchen", "bedroom", "bathroom", "exterior", "office", "lights", "vehicles")


@dataclass(frozen=True)
class ObjectName:
    name: str  # "office chair"
    head: str  # "chair"
    phrase: str  # "an office chair"
    plural: bool


@cache
def _corrections() -> dict[str, list[str]]:
    """Catalogue title or object id -> [name] or [name, head noun]: what the general rules would get wrong."""
    return json.loads((Path(__file__).parent / "furniture_data" / "names.json").read_text(encoding="utf-8"))


@cache
def _corrected_heads() -> dict[str, str]:
    """Corrected name -> its corrected head noun, both in lower case: "swing set" -> "swing"."""
    return {entry[0].lower(): entry[1].lower() for entry in _corrections().values() if len(entry) == 2}


def read_name(title: str, object_id: str = "") -> ObjectName:
    """A catalogue title as plain English: the committed correction of the object or of the title if there is one, else
    the title without counters.
    """
    correction = _corrections().get(object_id) or _corrections().get(title, [])
    words = correction[0].split() if correction else [w if w.isupper() else w.lower() for w in title.split()]
    if not correction:
        words = [word for word in words if not re.fullmatch(r"\d\S*", word)]
    last = _before_preposition(words)[-1]
    name = " ".join(words)
    plural = last.endswith("s") and not last.endswith(SINGULAR_ENDINGS)
    article = "an " if name[0].lower() in "aeiou" and not name.startswith(SPOKEN_CONSONANT) else "a "
    phrase = name if plural or last in UNCOUNTABLE else article + name
    return ObjectName(name, correction[1] if len(correction) == 2 else head_noun(name), phrase, plural)


def head_noun(name: str) -> str:
    """The noun that says what an object is, in lower case and in the singular where it has one; "" of an empty name.

    Catalogue names and answers of a model go through this rule alike: the longest end of the name that has a committed
    correction ("swing set" -> "swing", "metal trash can" -> "trash can"), else the last word before the first
    preposition ("chair with a cushion" -> "chair", "oak shelves" -> "shelf").
    """
    words = name.lower().split()
    if words[:2] in (["pair", "of"], ["set", "of"]) and len(words) > 2:
        words = words[2:]
    end = len(_before_preposition(words))
    for start in range(end):
        for stop in (len(words), end):  # "roll of tape" is corrected with its preposition
            phrase = " ".join(words[start:stop])
            if corrected := _corrected_heads().get(phrase) or _corrected_heads().get(singular(phrase)):
                return singular(corrected)
    return singular(words[end - 1]) if words else ""


def _before_preposition(words: list[str]) -> list[str]:
    """The words before the first preposition; all of them if there is none or the name opens with one."""
    places = [place for place, word in enumerate(words) if word in PREPOSITIONS]
    return words[: places[0]] if places and places[0] else words


def singular(noun: str) -> str:
    """A noun in lower case, of which the last word is put in the singular: "trash cans" -> "trash can"."""
    first, _, last = noun.rpartition(" ")
    if last in IRREGULAR_PLURALS:
        last = IRREGULAR_PLURALS[last]
    elif last.endswith("s") and not last.endswith(SINGULAR_ENDINGS) and last not in PLURAL_ONLY:
        if last.endswith("ies") and len(last) > 4:
            last = last[:-3] + "y"
        else:
            last = last[:-2] if last.endswith(("ches", "shes", "sses", "xes")) else last[:-1]
    return f"{first} {last}".strip()


def name_sentence(phrase: str, plural: bool) -> str:
    """The reference answer to "What is this?": "This is an office chair.", "These are shelves."."""
    return f"{'These are' if plural else 'This is'} {phrase}."


def seed_of(object_id: str) -> int:
    """A seed that depends on the object's id alone, the same on every machine."""
    return int.from_bytes(hashlib.sha256(object_id.encode()).digest()[:8], "big")


# ------------------------------------------------------------------------------------------------------------- measures


def _lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB in 0..1 -> CIELAB (D65), [N, 3]."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    matrix = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ matrix.T / matrix.sum(1)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)


@cache
def _palette() -> tuple[list[str], np.ndarray]:
    names = [name for name, codes in PALETTE.items() for _ in codes]
    codes = [code for codes in PALETTE.values() for code in codes]
    rgb = np.array([[int(code[i : i + 2], 16) for i in (1, 3, 5)] for code in codes]) / 255
    return names, _lab(rgb)


def colour_shares(rgb: np.ndarray) -> dict[str, float]:
    """Share of the points [N, 3] (0..1) nearest to each palette colour in CIELAB, largest first, 5 % at least."""
    names, palette = _palette()
    nearest = np.argmin(((_lab(np.clip(rgb, 0, 1))[:, None] - palette) ** 2).sum(-1), axis=1)
    shares = dict.fromkeys(PALETTE, 0.0)
    for index, count in zip(*np.unique(nearest, return_counts=True), strict=True):
        shares[names[index]] += count / len(rgb)
    return {c: round(s, 3) for c, s in sorted(shares.items(), key=lambda item: -item[1]) if s >= 0.05}


def mirror_error(xyz: np.ndarray, axis: int) -> float:
    """How far a cloud [N, 3] is from its mirror image across the vertical plane normal to `axis`.

    The mean nearest-neighbour distance from one half of the points, reflected, to the other half, over the same
    distance without reflection: 1 for a perfectly symmetric cloud of any density. The plane runs through the middle of
    the box or through the centroid, whichever fits better.
    """
    half, rest = xyz[0::2], xyz[1::2]
    tree = KDTree(rest)
    sampling_error = tree.query(half)[0].mean()
    middles = (xyz[:, axis].min() + xyz[:, axis].max()) / 2, xyz[:, axis].mean()
    errors = []
    for middle in middles:
        mirrored = half.copy()
        mirrored[:, axis] = 2 * middle - mirrored[:, axis]
        errors.append(tree.query(mirrored)[0].mean() / sampling_error)
    return float(min(errors))


def _verdict(error: float) -> bool | None:
    return True if error < SYMMETRIC else False if error > ASYMMETRIC else None


def measure(points: np.ndarray, size_cm: tuple[float, float, float]) -> dict:
    """The measured part of an object's record, from its cloud [N, 6] in the catalogue pose.

    `catalogue_scale` says whether the catalogue's (width, height, depth) in cm has the cloud's proportions, within 5 %.
    Without that, a question that states a length has no single answer.
    """
    xyz = points[:, :3].astype(np.float64)
    sides = np.ptp(xyz, axis=0)
    ratios = sides / np.array(size_cm)
    return {
        "colors": colour_shares(points[:, 3:6]),
        "width": round(float(sides[0]), 4),
        "height": round(float(sides[1]), 4),
        "depth": round(float(sides[2]), 4),
        "mirror_left_right": _verdict(mirror_error(xyz, 0)),
        "mirror_front_back": _verdict(mirror_error(xyz, 2)),
        "catalogue_scale": bool(ratios.max() <= 1.05 * ratios.min()),
    }


# -------------------------------------------------------------------------------------------------------- conversations


def main_colour(record: dict) -> str | None:
    """The colour of most of the surface, or None where no colour clearly leads and for people."""
    if record["head_noun"] in PEOPLE:
        return None
    shares = [*record["colors"].items(), ("", 0.0), ("", 0.0)]
    (colour, share), (_, following) = shares[:2]
    return colour if share >= MAJORITY and share - following >= LEAD else None


def longest_side(record: dict, shortest: bool = False) -> str | None:
    """ "width", "height" or "depth" where one side exceeds (or, `shortest`, undercuts) both others by 10 %."""
    sides = sorted(((record[side], side) for side in ("width", "height", "depth")), reverse=not shortest)
    (first, name), (second, _) = sides[:2]
    return name if max(first, second) > MARGIN * min(first, second) else None


def shape(record: dict) -> str | None:
    """One clear word about the box, or None."""
    width, height, depth = record["width"], record["height"], record["depth"]
    small, middle, large = sorted((width, height, depth))
    if large < 1.15 * small:
        return "about as tall as it is wide and deep"
    if large > 3 * middle:
        return "long and slender" if large != height else "tall and slender"
    if middle > 4 * small:
        return "flat" if small == height else "thin and upright"
    return None


def facts(record: dict) -> dict[str, str | None]:
    """The facts that the warm-up teaches, by kind: noun, colour, place and longest side; None where not clear."""
    return {
        "noun": record["head_noun"],
        "colour": main_colour(record),
        "place": record["category"] if record["category"] in PLACES else None,
        "longest side": longest_side(record),
    }


def _cm(value: float) -> str:
    step = 10 if value >= 100 else 5 if value >= 20 else 1
    return f"{round(value / step) * step} cm"


def _yes(condition: bool, yes: str, no: str) -> str:
    return f"Yes, {yes}." if condition else f"No, {no}."


def questions(record: dict, rng: np.random.Generator) -> dict[str, list[tuple[str, str, str]]]:
    """Every question the facts can answer: kind -> [(fact, question, answer)]. Answers begin with the key word.

    The order of the draws from `rng` is part of the training data: it must not change.
    """
    by_kind: dict[str, list[tuple[str, str, str]]] = {"color": [], "kind": [], "geometry": [], "metric": []}
    width, height, depth = record["width"], record["height"], record["depth"]
    pick = lambda options: options[int(rng.integers(len(options)))]  # noqa: E731

    if colour := main_colour(record):
        question = pick(["What color is it mostly?", "What is its main color?", "Which color covers most of it?"])
        by_kind["color"].append(("main_color", question, f"{colour.capitalize()}."))
        other = colour if rng.random() < 0.5 else pick([c for c in PALETTE if c not in record["colors"]])
        answer = _yes(other == colour, f"it is mostly {colour}", f"it is mostly {colour}")
        by_kind["color"].append(("is_color", f"Is it mostly {other}?", answer))

    name, category = record["name"], record["category"]
    stated = f"{'they are' if record['plural'] else 'it is'} {record['noun_phrase']}"
    if rng.random() < 0.5 and not record["plural"] and record["head_noun"] in name.split():
        question = f"Is this {read_name(record['head_noun']).phrase}?"
        by_kind["kind"].append(("is_noun", question, f"Yes, {stated}."))
    else:
        other = pick([noun for noun, debatable in OTHERS.items() if not any(w in name for w in debatable.split())])
        by_kind["kind"].append(("is_noun", f"Is this a {other}?", f"No, {stated}."))
    if category in PLACES:
        options = [category, *rng.permutation([p for p in PLACES if p != category])[:2]]
        listed = [str(options[i]) for i in rng.permutation(3)]
        question = f"Which category fits this object: {listed[0]}, {listed[1]} or {listed[2]}?"
        by_kind["kind"].append(("category", question, f"{category.capitalize()}."))

    if max(height, width) > MARGIN * min(height, width):
        answer = _yes(height > width, "it is taller than it is wide", "it is wider than it is tall")
        by_kind["geometry"].append(("taller_than_wide", "Is it taller than it is wide?", answer))
    if max(width, depth) > MARGIN * min(width, depth):
        answer = _yes(width > depth, "it is wider than it is deep", "it is deeper than it is wide")
        by_kind["geometry"].append(("wider_than_deep", "Is it wider than it is deep?", answer))
    for extreme in ("longest", "shortest"):
        if side := longest_side(record, shortest=extreme == "shortest"):
            question = pick([f"Which side is {extreme}: height, width or depth?", f"Which side is {extreme}?"])
            by_kind["geometry"].append((f"{extreme}_side", question, f"The {side}."))
    for start, end in (("left", "right"), ("front", "back")):
        if (mirror := record[f"mirror_{start}_{end}"]) is not None:
            halves = f"{start} and {end} halves"
            question = pick([f"Is it symmetric from {start} to {end}?", f"Are its {halves} mirror images?"])
            answer = _yes(mirror, f"its {halves} mirror each other", f"its {halves} differ")
            by_kind["geometry"].append((f"mirror_{start}_{end}", question, answer))

    if record["catalogue_scale"] and min(record["width_cm"], record["height_cm"], record["depth_cm"]) >= 3:
        words = {"width": "wide", "height": "tall", "depth": "deep"}
        known_side, side = (str(side) for side in rng.permutation(list(words))[:2])
        scale = f"It is {round(record[known_side + '_cm'])} cm {words[known_side]}."
        answer = f"About {_cm(record[side + '_cm'])}."
        by_kind["metric"].append((f"{side}_from_{known_side}", f"{scale} How {words[side]} is it?", answer))
    return by_kind


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


BRIEF = ("Describe this object briefly.", "Give a short caption of this 3D model.", "Sum up this object in one phrase.")
DETAILED = ("Describe this object in detail.", "Caption this 3D model in detail.", "Tell me more about this object.")


def conversations(record: dict) -> list[dict]:
    """The object's annotation entries in the PointLLM schema, plus `fact` (what a single_round question is about).

    The same record always gives the same entries.
    """
    rng = np.random.default_rng(seed_of(record["object_id"] + "/conversations"))
    pick = lambda options: options[int(rng.integers(len(options)))]  # noqa: E731
    entries = []

    def add(kind: str, *turns: tuple[str, str], **extra: str) -> None:
        values = [{"from": who, "value": turn[i]} for turn in turns for i, who in enumerate(("human", "gpt"))]
        values[0]["value"] = "<point>\n" + values[0]["value"]
        entries.append({"object_id": record["object_id"], "conversation_type": kind, "conversations": values, **extra})

    named = name_sentence(record["noun_phrase"], record["plural"])
    add("simple_description", ("What is this?", named))
    colour = main_colour(record)
    coloured = f"{colour} {record['name']}" if colour else record["name"]
    if record["noun_phrase"] != record["name"]:
        coloured = f"{'an' if coloured[0].lower() in 'aeiou' else 'a'} {coloured}" if colour else record["noun_phrase"]
    add("simple_description", (pick(BRIEF), coloured[0].upper() + coloured[1:] + "."))
    add("detailed_description", (pick(DETAILED), describe(record)))

    by_kind = {kind: [items[i] for i in rng.permutation(len(items))] for kind, items in questions(record, rng).items()}
    chosen = by_kind["color"][:1] + by_kind["kind"][:1] + by_kind["geometry"][:2] + by_kind["metric"][:1]
    for fact, question, answer in chosen:
        add("single_round", (question, answer), fact=fact)
    turns = [("What is this?", named)]
    turns += [(question, answer) for _, question, answer in by_kind["color"][-1:] + by_kind["geometry"][-1:]]
    if len(turns) > 1:
        add("multi_round", *turns)
    return entries
