"""Questions about embedded objects, with true answers.

Answers to yes/no questions state the fact first: "It is wider than it is tall, so no.". A small language model learns
within a few steps to state what it sees, and then needs the text alone for the Yes or No. A bare Yes or No it did not
learn in the same steps: every wording is answered Yes as often as No, so that guessing looks as good as looking.

Questions are written for all objects of a split together, because a yes/no question says nothing about its answer only
if its text is answered Yes as often as No: every noun, every colour and every property is balanced over the split. The
same records give the same conversations on every machine.

Width, height and depth are the sides of the object's box in its catalogue pose, so turning a cloud about the vertical
axis leaves every answer true.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, TypeVar

from pointalign.embedded.debatable import could_be
from pointalign.embedded.descriptions import named
from pointalign.embedded.facts import (
    MARGIN,
    PLACES,
    longest_side,
    main_colour,
    proportion,
    read_name,
    seed_of,
    shape,
)

T = TypeVar("T")

NAME = "What is this?"
COLOUR = "What color is it mostly?"
COLOUR_PARAPHRASES = ("What is its main color?", "Which color covers most of it?")
LONGEST = "Which side is longest: height, width or depth?"
ASPECT = "How do height and width compare: wider, square, taller or twice as tall?"
TALLER_OF_TWO = "Which object is taller for its width, the first or the second?"
OFFERED = {  # property -> questions that offer both answers
    "taller_than_wide": ("Is it taller or wider?", "Is it wider or taller?"),
    "wider_than_deep": ("Is it wider or deeper?", "Is it deeper or wider?"),
}
SAME_KIND = "Are these two the same kind of object?"
LEGS = "How many legs does it have?"
BUCKETS = {"wider": 0.0, "square": 1 / MARGIN, "taller": MARGIN, "twice as tall": 2.0}  # least height / width
PAIR_MARGIN = 1.5  # ratio of the two aspects below which no pair is asked about
PAIRS = 2  # objects that each object is compared with
LEG_NUMBERS = "no one two three four five six seven eight nine ten eleven twelve".split()


class Asked(NamedTuple):
    """A question with its true answer.

    `fact` is what it is about; `kind` groups facts for held-out losses and tables.
    """

    object_ids: tuple[str, ...]
    kind: str
    fact: str
    question: str
    answer: str

    @property
    def affirmed(self) -> bool:
        """Whether the answer to this yes/no question is Yes."""
        return self.answer.endswith(", so yes.")


@dataclass(frozen=True)
class Property:
    """A property that an object has, has not, or (None) does not clearly have; the texts that ask for it, the
    evaluation's first; the statements that Yes and No follow from."""

    fact: str
    kind: str
    holds: Callable[[dict], bool | None]
    texts: tuple[str, ...]
    yes: str
    no: str


def _longer(first: str, second: str) -> Callable[[dict], bool | None]:
    def holds(record: dict) -> bool | None:
        a, b = record[first], record[second]
        return bool(a > b) if max(a, b) > MARGIN * min(a, b) else None

    return holds


def _flat(record: dict) -> bool | None:
    small, middle, _ = sorted((record["width"], record["height"], record["depth"]))
    return True if shape(record) == "flat" else False if middle < 2.5 * small else None


def _slender(record: dict) -> bool | None:
    _, middle, large = sorted((record["width"], record["height"], record["depth"]))
    return True if large > 3 * middle else False if large < 2 * middle else None


def _compared(long: str, short: str, first: str, second: str) -> Property:
    """Whether side `first` is longer than side `second`: ("taller", "wide", "height", "width")."""
    words = {"height": ("taller", "tall"), "width": ("wider", "wide"), "depth": ("deeper", "deep")}
    yes, no = (f"it is {words[a][0]} than it is {words[b][1]}" for a, b in ((first, second), (second, first)))
    texts = (f"Is it {long} than it is {short}?", f"Is its {first} greater than its {second}?")
    return Property(f"{long}_than_{short}", "yes-no side", _longer(first, second), texts, yes, no)


def _mirrored(start: str, end: str) -> Property:
    fact, halves = f"mirror_{start}_{end}", f"{start} and {end} halves"
    texts = (
        f"Is it symmetric from {start} to {end}?",
        f"Are its {halves} mirror images?",
        f"Do its {halves} mirror each other?",
    )
    holds = lambda record: record[fact]  # noqa: E731
    return Property(fact, "yes-no symmetry", holds, texts, f"its {halves} mirror each other", f"its {halves} differ")


PROPERTIES = {
    item.fact: item
    for item in (
        _compared("taller", "wide", "height", "width"),
        _compared("wider", "tall", "width", "height"),
        _compared("wider", "deep", "width", "depth"),
        _compared("deeper", "wide", "depth", "width"),
        Property("flat", "yes-no shape", _flat, ("Is it flat?", "Does it lie flat?"), "it is flat", "it is not flat"),
        Property(
            "slender",
            "yes-no shape",
            _slender,
            ("Is it slender?", "Is one side much longer than the others?"),
            "it is slender",
            "it is not slender",
        ),
        _mirrored("left", "right"),
        _mirrored("front", "back"),
    )
}


def concluded(statement: str, yes: bool) -> str:
    """ "it is flat" -> "It is flat, so yes."."""
    return f"{statement[0].upper()}{statement[1:]}, so {'yes' if yes else 'no'}."


# ------------------------------------------------------------------------------------------------------------ balancing


def shuffled(records: Sequence[dict], purpose: str) -> list[dict]:
    """The records in an order that depends on their ids and the purpose alone."""
    return sorted(records, key=lambda record: draw(record, purpose))


def draw(record: dict, purpose: str) -> int:
    return seed_of(f"{record['object_id']}/{purpose}")


def pick(options: Sequence[T], record: dict, purpose: str) -> T:
    return options[draw(record, purpose) % len(options)]


def partners(count: int, allowed: Callable[[int, int], bool]) -> list[int | None]:
    """For each of `count` items another item, each at most once; None where no partner is left for it.

    As many items as possible have a partner: a maximum matching, by shortest augmenting paths.
    """
    partner: list[int | None] = [None] * count
    taken_by: list[int | None] = [None] * count
    closed: set[int] = set()  # places from which no free place can be reached, now or later
    for start in range(count):
        reached_from: dict[int, int] = {}
        queue = deque([start])
        end = None
        while queue and end is None:
            item = queue.popleft()
            for place in ((item + step) % count for step in range(1, count)):
                if place in reached_from or place in closed or not allowed(item, place):
                    continue
                reached_from[place] = item
                holder = taken_by[place]
                if holder is None:
                    end = place
                    break
                queue.append(holder)
        if end is None:
            closed.update(reached_from)
        while end is not None:  # every item on the path moves on by one place
            item = reached_from[end]
            previous, partner[item], taken_by[end] = partner[item], end, item
            end = previous
    return partner


def noun_questions(records: Sequence[dict]) -> list[Asked]:
    """ "Is this a <noun>?" about each object's noun and about another object's noun that it could not be called.

    Every noun is asked about with as many Yes as No: where an object finds no other noun, the object whose noun is left
    over is not asked about its noun either.
    """
    order = shuffled(records, "other noun")
    heads = [record["head_noun"] for record in order]
    found = partners(len(order), lambda i, j: not could_be(order[i]["name"], heads[i], heads[j]))
    pairs = [(i, j) for i, j in enumerate(found) if j is not None]
    asked = [(order[j], heads[j], True) for _, j in pairs] + [(order[i], heads[j], False) for i, j in pairs]
    return [
        Asked((record["object_id"],), "yes-no name", "is_noun", noun_question(noun), concluded(named(record)[:-1], yes))
        for record, noun, yes in asked
    ]


def noun_question(noun: str) -> str:
    """ "Is this a door?", "Are these scissors?"."""
    named = read_name(noun)
    return f"{'Are these' if named.plural else 'Is this'} {named.phrase}?"


def colour_questions(records: Sequence[dict]) -> list[Asked]:
    """ "Is it mostly red?" about each object's main colour and about a colour that it does not have; balanced as nouns
    are."""
    order = [(record, colour) for record in shuffled(records, "other colour") if (colour := main_colour(record))]
    found = partners(len(order), lambda i, j: order[j][1] not in order[i][0]["colors"])
    asked = [(*order[j], order[j][1], True) for j in found if j is not None]
    asked += [(*order[i], order[j][1], False) for i, j in enumerate(found) if j is not None]
    return [
        Asked((r["object_id"],), "yes-no colour", "is_color", f"Is it mostly {other}?", concluded(mostly(main), yes))
        for r, main, other, yes in asked
    ]


def mostly(colour: str) -> str:
    return f"it is mostly {colour}"


def property_questions(records: Sequence[dict]) -> list[Asked]:
    """Every property, in every of its texts with as many Yes as No.

    Of the more frequent answer each text takes other objects, so that paraphrases cover more of them.
    """
    asked = []
    for item in PROPERTIES.values():
        order = shuffled(records, item.fact)
        groups = [[record for record in order if item.holds(record) is truth] for truth in (True, False)]
        count = min(map(len, groups))
        for turn, text in enumerate(item.texts):
            answers = concluded(item.yes, True), concluded(item.no, False)
            for group, answer in zip(groups, answers, strict=True):
                chosen = [group[(turn * count + i) % len(group)] for i in range(count)]
                asked += [Asked((record["object_id"],), item.kind, item.fact, text, answer) for record in chosen]
    return asked


def comparisons(records: Sequence[dict]) -> list[Asked]:
    """Questions about two objects. Pairs of clearly different height over width are asked about in both orders; same
    kinds and different kinds are equally many, and of the same objects.

    The answer states both proportions, from one to eight, before it compares them.
    """
    order = shuffled(records, "taller of two")
    asked = []
    for place, record in enumerate(order):
        aspect = record["height"] / record["width"]
        others = order[place + 1 :] + order[:place]
        ratios = ((other, other["height"] / other["width"] / aspect) for other in others)
        clear = (
            (other, ratio > 1)
            for other, ratio in ratios
            if not 1 / PAIR_MARGIN <= ratio <= PAIR_MARGIN and proportion_of(other) != proportion_of(record)
        )
        for other, taller in islice(clear, PAIRS):
            for first, second, last_is_taller in ((record, other, taller), (other, record, not taller)):
                answer = (
                    f"The first is {proportion_of(first)}, the second is {proportion_of(second)}, "
                    f"so the {'second' if last_is_taller else 'first'}."
                )
                ids = first["object_id"], second["object_id"]
                asked.append(Asked(ids, "two clouds", "taller_of_two", TALLER_OF_TWO, answer))
    return asked + _same_kind(records)


def proportion_of(record: dict) -> str:
    return proportion(record["width"], record["height"])


def _same_kind(records: Sequence[dict]) -> list[Asked]:
    counts = Counter(record["head_noun"] for record in records if not record["plural"])
    order = [
        record
        for record in shuffled(records, "same kind")
        if not record["plural"] and counts[record["head_noun"]] > 1 and not read_name(record["head_noun"]).plural
    ]

    def differ(i: int, j: int) -> bool:
        names = [(order[k]["name"], order[k]["head_noun"]) for k in (i, j)]
        return not could_be(*names[0], names[1][1]) and not could_be(*names[1], names[0][1])

    asked = []
    for i, j in enumerate(partners(len(order), differ)):
        if j is None:
            continue
        noun = order[i]["head_noun"]
        following = (order[(i + step) % len(order)] for step in range(1, len(order)))
        mate = next(record for record in following if record["head_noun"] == noun)
        phrase, other = (read_name(order[k]["head_noun"]).phrase for k in (i, j))
        for second, name in ((mate, phrase), (order[j], other)):
            answer = concluded(f"the first is {phrase} and the second is {name}", second is mate)
            ids = order[i]["object_id"], second["object_id"]
            asked.append(Asked(ids, "same kind", "same_kind", SAME_KIND, answer))
    return asked


# ------------------------------------------------------------------------------------------- about a single object


def aspect_bucket(record: dict) -> str:
    """The entry of BUCKETS for the object's height over width."""
    return max((least, name) for name, least in BUCKETS.items() if record["height"] / record["width"] >= least)[1]


def leg_question(record: dict) -> Asked | None:
    """ "How many legs does it have?", for records that know it (`legs`)."""
    if "legs" not in record:
        return None
    count = record["legs"]
    number = LEG_NUMBERS[count] if count < len(LEG_NUMBERS) else count
    answer = f"It has {number} leg{'' if count == 1 else 's'}."
    return Asked((record["object_id"],), "legs", "legs", LEGS, answer)


def choice_questions(record: dict) -> list[Asked]:
    """Every question about the object alone that is not answered by Yes or No."""
    questions: list[tuple[str, str, str, str]] = []
    if colour := main_colour(record):
        for text in (COLOUR, pick(COLOUR_PARAPHRASES, record, "colour")):
            questions.append(("colour", "main_color", text, f"It is mostly {colour}."))
    if side := longest_side(record):
        for text in (LONGEST, LONGEST.partition(":")[0] + "?"):
            questions.append(("side", "longest_side", text, f"The {side}."))
    for item in (PROPERTIES["taller_than_wide"], PROPERTIES["wider_than_deep"]):
        if (holds := item.holds(record)) is not None:
            statement = item.yes if holds else item.no
            for text in OFFERED[item.fact]:
                questions.append(("side", item.fact, text, f"{statement[0].upper()}{statement[1:]}."))
    questions.append(("aspect", "aspect", ASPECT, f"It is {aspect_bucket(record)}."))
    if (category := record["category"]) in PLACES:
        others = sorted((p for p in PLACES if p != category), key=lambda place: draw(record, f"place/{place}"))
        first, second, third = sorted([category, *others[:2]], key=lambda place: draw(record, f"order/{place}"))
        text = f"Which category fits this object: {first}, {second} or {third}?"
        questions.append(("place", "category", text, f"The category is {category}."))
    if record["catalogue_scale"] and min(record["width_cm"], record["height_cm"], record["depth_cm"]) >= 3:
        words = {"width": "wide", "height": "tall", "depth": "deep"}
        known, side = sorted(words, key=lambda name: draw(record, f"length/{name}"))[:2]
        text = f"It is {round(record[known + '_cm'])} cm {words[known]}. How {words[side]} is it?"
        questions.append(("length", f"{side}_from_{known}", text, f"About {_cm(record[side + '_cm'])}."))
    legs = leg_question(record)
    return [Asked((record["object_id"],), *question) for question in questions] + ([legs] if legs else [])


def _cm(value: float) -> str:
    step = 10 if value >= 100 else 5 if value >= 20 else 1
    return f"{round(value / step) * step} cm"
