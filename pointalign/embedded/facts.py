"""Names of objects, and facts that can be seen in a cloud.

Nothing is guessed: a fact that is not clear is None, and sides closer than 10 % count as equally long.

Width, height and depth are the sides of the object's box in its catalogue pose, so turning a cloud about the vertical
axis leaves every answer true.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from scipy.spatial import KDTree

MARGIN = 1.1  # two sides whose ratio is below this count as equally long
PROPORTIONS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
LOWEST_PROPORTION, PROPORTION_STEP = -2.0, 0.5  # of log2(height / width): "two" begins at their sum
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


# ------------------------------------------------------------------------------------------------------- clear facts


def main_colour(record: dict) -> str | None:
    """The colour of most of the surface, or None where no colour clearly leads and for people."""
    if record["head_noun"] in PEOPLE:
        return None
    shares = [*record["colors"].items(), ("", 0.0), ("", 0.0)]
    (colour, share), (_, following) = shares[:2]
    return colour if share >= MAJORITY and share - following >= LEAD else None


def longest_side(record: dict) -> str | None:
    """ "width", "height" or "depth" where one side exceeds both others by 10 %."""
    sides = sorted(((record[side], side) for side in ("width", "height", "depth")), reverse=True)
    (first, name), (second, _) = sides[:2]
    return name if max(first, second) > MARGIN * min(first, second) else None


def proportion(width: float, height: float) -> str:
    """How tall something is for its width, from "one" to "eight": a step is a factor of the square root of 2, and
    "five" begins where height and width are equal."""
    step = math.floor((math.log2(height / width) - LOWEST_PROPORTION) / PROPORTION_STEP)
    return PROPORTIONS[min(max(step, 0), len(PROPORTIONS) - 1)]


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
    """The facts that stage 1 teaches, by kind: noun, colour, place and longest side; None where not clear."""
    return {
        "noun": record["head_noun"],
        "colour": main_colour(record),
        "place": record["category"] if record["category"] in PLACES else None,
        "longest side": longest_side(record),
    }
