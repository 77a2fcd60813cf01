"""The conversations about embedded objects: descriptions, and questions with true answers.

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
from pointalign.embedded.descriptions import BRIEF, DETAILED, brief, describe, named, stated
from pointalign.embedded.facts import MARGIN, PLACES, longest_side, main_colour, read_name, seed_of, shape

T = TypeVar("T")

NAME = "What is this?"
COLOUR = "What color is it mostly?"
COLOUR_PARAPHRASES = ("What is its main color?", "Which color covers most of it?")
LONGEST, SHORTEST = "Which side is longest: height, width or depth?", "Which side is shortest: height, width or depth?"
ASPECT = "How do height and width compare: wider, about equal, taller or twice as tall?"
TALLER_OF_TWO = "Which object is taller for its width, the first or the second?"
SAME_KIND = "Are these two the same kind of object?"
LEGS = "How many legs does it have?"
BUCKETS = {"wider": 0.0, "about equal": 1 / MARGIN, "taller": MARGIN, "twice as tall": 2.0}  # least height / width
PAIR_MARGIN = 1.5  # ratio of the two aspects below which no pair is asked about
PAIRS = 2  # objects that each object is compared with
QUIZ_ROUNDS = 2  # times that a quiz opens with each of the questions for the noun
QUIZ_KINDS = (  # after the opening, one question of each group
    ("colour", "place", "yes-no colour"), ("side", "aspect"), ("yes-no side",),
    ("yes-no shape", "yes-no symmetry", "legs", "length"),
)  # fmt: skip
NUMBERS = "None One Two Three Four Five Six Seven Eight Nine Ten Eleven Twelve".split()


class Asked(NamedTuple):
    """A question with its true answer, which begins with the key word.

    `fact` is what it is about; `kind` groups facts for held-out losses and tables.
    """

    object_ids: tuple[str, ...]
    kind: str
    fact: str
    question: str
    answer: str


@dataclass(frozen=True)
class Property:
    """A property that an object has, has not, or (None) does not clearly have; the texts that ask for it, the
    evaluation's first; the statements that follow Yes and No."""

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


# ------------------------------------------------------------------------------------------------------------ balancing


def _shuffled(records: Sequence[dict], purpose: str) -> list[dict]:
    """The records in an order that depends on their ids and the purpose alone."""
    return sorted(records, key=lambda record: _draw(record, purpose))


def _draw(record: dict, purpose: str) -> int:
    return seed_of(f"{record['object_id']}/{purpose}")


def _pick(options: Sequence[T], record: dict, purpose: str) -> T:
    return options[_draw(record, purpose) % len(options)]


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
    order = _shuffled(records, "other noun")
    heads = [record["head_noun"] for record in order]
    found = partners(len(order), lambda i, j: not could_be(order[i]["name"], heads[i], heads[j]))
    pairs = [(i, j) for i, j in enumerate(found) if j is not None]
    asked = [(order[j], heads[j], "Yes") for _, j in pairs] + [(order[i], heads[j], "No") for i, j in pairs]
    return [
        Asked((record["object_id"],), "yes-no name", "is_noun", noun_question(noun), f"{word}, {stated(record)}.")
        for record, noun, word in asked
    ]


def noun_question(noun: str) -> str:
    """ "Is this a door?", "Are these scissors?"."""
    named = read_name(noun)
    return f"{'Are these' if named.plural else 'Is this'} {named.phrase}?"


def colour_questions(records: Sequence[dict]) -> list[Asked]:
    """ "Is it mostly red?" about each object's main colour and about a colour that it does not have; balanced as nouns
    are."""
    order = [(record, colour) for record in _shuffled(records, "other colour") if (colour := main_colour(record))]
    found = partners(len(order), lambda i, j: order[j][1] not in order[i][0]["colors"])
    asked = [(*order[j], order[j][1], "Yes") for j in found if j is not None]
    asked += [(*order[i], order[j][1], "No") for i, j in enumerate(found) if j is not None]
    return [
        Asked((r["object_id"],), "yes-no colour", "is_color", f"Is it mostly {other}?", f"{word}, it is mostly {main}.")
        for r, main, other, word in asked
    ]


def property_questions(records: Sequence[dict]) -> list[Asked]:
    """Every property, in every of its texts with as many Yes as No.

    Of the more frequent answer each text takes other objects, so that paraphrases cover more of them.
    """
    asked = []
    for item in PROPERTIES.values():
        order = _shuffled(records, item.fact)
        groups = [[record for record in order if item.holds(record) is truth] for truth in (True, False)]
        count = min(map(len, groups))
        for turn, text in enumerate(item.texts):
            for group, answer in zip(groups, (f"Yes, {item.yes}.", f"No, {item.no}."), strict=True):
                chosen = [group[(turn * count + i) % len(group)] for i in range(count)]
                asked += [Asked((record["object_id"],), item.kind, item.fact, text, answer) for record in chosen]
    return asked


def comparisons(records: Sequence[dict]) -> list[Asked]:
    """Questions about two objects. Pairs of clearly different height over width are asked about in both orders; same
    kinds and different kinds are equally many, and of the same objects."""
    order = _shuffled(records, "taller of two")
    asked = []
    for place, record in enumerate(order):
        aspect = record["height"] / record["width"]
        others = order[place + 1 :] + order[:place]
        ratios = ((other, other["height"] / other["width"] / aspect) for other in others)
        clear = ((other, ratio > 1) for other, ratio in ratios if not 1 / PAIR_MARGIN <= ratio <= PAIR_MARGIN)
        for other, taller in islice(clear, PAIRS):
            ids = record["object_id"], other["object_id"]
            for first, second, last_is_taller in ((*ids, taller), (*ids[::-1], not taller)):
                answer = "The second." if last_is_taller else "The first."
                asked.append(Asked((first, second), "two clouds", "taller_of_two", TALLER_OF_TWO, answer))
    return asked + _same_kind(records)


def _same_kind(records: Sequence[dict]) -> list[Asked]:
    counts = Counter(record["head_noun"] for record in records if not record["plural"])
    order = [
        record
        for record in _shuffled(records, "same kind")
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
        for second, answer in (
            (mate, f"Yes, each is {phrase}."),
            (order[j], f"No, the first is {phrase} and the second is {other}."),
        ):
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
    answer = f"{NUMBERS[count] if count < len(NUMBERS) else count}."
    return Asked((record["object_id"],), "legs", "legs", LEGS, answer)


def choice_questions(record: dict) -> list[Asked]:
    """Every question about the object alone that is not answered by Yes or No."""
    questions: list[tuple[str, str, str, str]] = []
    if colour := main_colour(record):
        for text in (COLOUR, _pick(COLOUR_PARAPHRASES, record, "colour")):
            questions.append(("colour", "main_color", text, f"{colour.capitalize()}."))
    for fact, text in (("longest_side", LONGEST), ("shortest_side", SHORTEST)):
        if side := longest_side(record, shortest=fact == "shortest_side"):
            for wording in (text, text.partition(":")[0] + "?"):
                questions.append(("side", fact, wording, f"The {side}."))
    questions.append(("aspect", "aspect", ASPECT, f"{aspect_bucket(record).capitalize()}."))
    if (category := record["category"]) in PLACES:
        others = sorted((p for p in PLACES if p != category), key=lambda place: _draw(record, f"place/{place}"))
        first, second, third = sorted([category, *others[:2]], key=lambda place: _draw(record, f"order/{place}"))
        text = f"Which category fits this object: {first}, {second} or {third}?"
        questions.append(("place", "category", text, f"{category.capitalize()}."))
    if record["catalogue_scale"] and min(record["width_cm"], record["height_cm"], record["depth_cm"]) >= 3:
        words = {"width": "wide", "height": "tall", "depth": "deep"}
        known, side = sorted(words, key=lambda name: _draw(record, f"length/{name}"))[:2]
        text = f"It is {round(record[known + '_cm'])} cm {words[known]}. How {words[side]} is it?"
        questions.append(("length", f"{side}_from_{known}", text, f"About {_cm(record[side + '_cm'])}."))
    legs = leg_question(record)
    return [Asked((record["object_id"],), *question) for question in questions] + ([legs] if legs else [])


def _cm(value: float) -> str:
    step = 10 if value >= 100 else 5 if value >= 20 else 1
    return f"{round(value / step) * step} cm"


# -------------------------------------------------------------------------------------------------------------- entries


def _entry(object_ids: tuple[str, ...], type_name: str, kind: str, *turns: tuple[str, str], **fact: str) -> dict:
    values = [{"from": who, "value": turn[i]} for turn in turns for i, who in enumerate(("human", "gpt"))]
    values[0]["value"] = "<point>\n" * len(object_ids) + values[0]["value"]
    ids = object_ids[0] if len(object_ids) == 1 else list(object_ids)
    return {
        "object_id": ids,
        "conversation_type": type_name,
        "kind": kind,
        **fact,
        "conversations": values,
    }


def entries_of(record: dict, yes_no: Sequence[Asked] = ()) -> list[dict]:
    """The annotation entries about one object: descriptions, choices, these yes/no questions and a dialogue."""
    ids = (record["object_id"],)
    choices = choice_questions(record)
    entries = [
        _entry(ids, "simple_description", "name", (NAME, named(record))),
        _entry(ids, "simple_description", "brief", (_pick(BRIEF, record, "brief"), brief(record))),
        _entry(ids, "detailed_description", "detail", (_pick(DETAILED, record, "detail"), describe(record))),
    ]
    entries += [
        _entry(ids, "single_round", item.kind, (item.question, item.answer), fact=item.fact)
        for item in (*choices, *yes_no)
    ]
    turns = [(NAME, named(record))]
    for kinds in (("colour",), ("side", "aspect")):
        turns += [(item.question, item.answer) for item in choices if item.kind in kinds][:1]
    dialogues = [_entry(ids, "multi_round", "dialogue", *turns)]
    return [
        *entries,
        *dialogues,
        *(_entry(ids, "multi_round", "quiz", *quiz) for quiz in quizzes(record, [*choices, *yes_no])),
    ]


def quizzes(record: dict, asked: Sequence[Asked]) -> list[list[tuple[str, str]]]:
    """Dialogues of several of the object's questions: most of a sample's tokens are the cloud's, and are shared so.

    The name comes first where it is asked for, and no other question of that dialogue gives it away. Of two dialogues
    that open with a yes/no question about a noun, one is answered with Yes and one with No.
    """
    nouns = sorted((item for item in asked if item.kind == "yes-no name"), key=lambda item: item.answer)
    openings = [(NAME, named(record)), *((item.question, item.answer) for item in nouns)] * QUIZ_ROUNDS
    dialogues = []
    for number, opening in enumerate(openings):
        order = sorted(asked, key=lambda item: _draw(record, f"quiz {number}/{item.question}"))
        followers = [next((item for item in order if item.kind in kinds), None) for kinds in QUIZ_KINDS]
        turns = [(item.question, item.answer) for item in followers if item is not None]
        turns.sort(key=lambda turn: _draw(record, f"quiz {number}/order {turn[0]}"))
        dialogues.append([opening, *turns])
    return dialogues


def conversations(records: Sequence[dict]) -> list[dict]:
    """The annotation entries of all objects of a split, in the PointLLM schema, object by object, then the comparisons.

    Entries also say their `kind`, and those of questions their `fact`.
    """
    yes_no: dict[str, list[Asked]] = {record["object_id"]: [] for record in records}
    for item in noun_questions(records) + colour_questions(records) + property_questions(records):
        yes_no[item.object_ids[0]].append(item)
    entries = [entry for record in records for entry in entries_of(record, yes_no[record["object_id"]])]
    pairs = comparisons(records)
    return entries + [_entry(p.object_ids, "comparison", p.kind, (p.question, p.answer), fact=p.fact) for p in pairs]
