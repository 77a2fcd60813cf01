"""What an audit asks: objects, the questions about them, and every cloud that is shown with each question."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from pointalign import assets
from pointalign.audit import perturbations
from pointalign.audit.perturbations import INVARIANCES
from pointalign.embedded import questions
from pointalign.embedded.debatable import could_be
from pointalign.embedded.facts import (
    MARGIN,
    PALETTE,
    longest_side,
    main_colour,
    name_sentence,
    read_name,
    seed_of,
)
from pointalign.embedded.procedural import procedural_object
from pointalign.embedded.procedural_questions import procedural_record
from pointalign.embedded.questions import COLOUR, LONGEST, NAME, OFFERED, PROPERTIES, concluded, mostly, pick
from pointalign.evaluation import tasks
from pointalign.evaluation.choices import SIDES, YES_NO, evenly
from pointalign.evaluation.naming import shuffled
from pointalign.evaluation.tasks import ObjectSet

INPUTS = ("true", "shuffled", "zeroed", "blind")
ZEROED, BLIND = "zeroed", "blind"  # names of clouds: of zeros, and none
POINTS = 8192
OFFERED_NAMES = 8  # nouns whose likelihoods are compared
KINDS = ("name", "colour", "taller or wider", "longest side", "taller, yes or no")
EDITS = ("stretched", "recoloured")
EVERYDAY = (  # nouns with a generator, of which procedural objects are made
    "chair", "table", "bed", "sofa", "lamp", "car", "bottle", "door", "television", "refrigerator", "bicycle", "plate",
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """How much an audit asks.

    Attributes:
        objects: held-out objects that are asked about under every input.
        perturbed: of them, those that are also asked about as perturbed clouds.
        pairs: most counterfactual pairs of each edit.
        noise: clouds that show nothing.
        probe_train, probe_test: objects that probes are fitted on and scored on.
    """

    objects: int = 40
    perturbed: int = 12
    pairs: int = 24
    noise: int = 24
    probe_train: int = 160
    probe_test: int = 80


FULL, QUICK = Size(), Size(10, 2, 6, 6, 40, 20)


@dataclass(frozen=True)
class Item:
    """A question about one object.

    Attributes:
        kind: of `KINDS`.
        label: of the right answer, a key of `options`.
        options: label -> the sentence whose likelihood is compared.
    """

    object_id: str
    family: str
    kind: str
    text: str
    label: str
    options: dict[str, str] = field(hash=False)


@dataclass(frozen=True)
class Ask:
    """A question with the name of the cloud that it is asked about, and whether its options are scored.

    Attributes:
        candidates: in the list of all questions, the sentences that are scored.
    """

    item: Item
    cloud: str
    scored: bool = False
    candidates: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pair:
    """A question about an object before and after an edit of one factor.

    Attributes:
        edit: of `EDITS`.
        cloud: name of the edited cloud.
        after: what is right of it: another label than `item.label` if the question is about the factor.
    """

    edit: str
    item: Item
    cloud: str
    after: str

    @property
    def flips(self) -> bool:
        return self.after != self.item.label


@dataclass
class Plan:
    """All that an audit asks.

    Attributes:
        inputs: input of `INPUTS` -> a question for each item, in the same order.
        perturbed: group and level -> questions about perturbed clouds.
        pairs: counterfactual pairs.
        noise: "What is this?" about clouds that show nothing.
        probes: objects to fit and to test probes on.
        clouds: name -> the cloud, None for `BLIND`.
    """

    inputs: dict[str, list[Ask]]
    perturbed: dict[str, dict[str, list[Ask]]]
    pairs: list[Pair]
    noise: list[Ask]
    probes: tuple[ObjectSet, ObjectSet]
    clouds: "Clouds"

    def asks(self) -> list[Ask]:
        """Every question about a cloud once, with the options of all items that score it; kind by kind."""
        listed = [ask for part in self.inputs.values() for ask in part]
        listed += [ask for levels in self.perturbed.values() for part in levels.values() for ask in part]
        listed += [Ask(pair.item, name) for pair in self.pairs for name in (pair.item.object_id, pair.cloud)]
        sentences: dict[tuple[str, str], dict[str, None]] = {}
        first: dict[tuple[str, str], Ask] = {}
        for ask in [*listed, *self.noise]:
            key = ask.cloud, ask.item.text
            first.setdefault(key, ask)
            sentences.setdefault(key, {}).update(dict.fromkeys(ask.item.options.values() if ask.scored else ()))
        asks = [replace(ask, candidates=tuple(sentences[key])) for key, ask in first.items()]
        return sorted(asks, key=lambda ask: KINDS.index(ask.item.kind))  # answers of one length go together


class Clouds:
    """Clouds by name: an object's id, with `/` and an edit behind it, `ZEROED`, `BLIND`, or `noise/NUMBER`."""

    def __init__(self, cloud: Callable[[str], np.ndarray], seed: int):
        self.cloud, self.seed = cloud, seed

    def __call__(self, name: str) -> np.ndarray | None:
        if name == BLIND:
            return None
        if name == ZEROED:
            return np.zeros((POINTS, 6), dtype=np.float32)
        rng = self.rng(name)
        object_id, _, edit = name.partition("/")
        if object_id == "noise":
            return perturbations.noise_cloud(rng)
        cloud = np.asarray(self.cloud(object_id), dtype=np.float32)
        if not edit:
            return cloud
        kind, _, level = edit.partition("/")
        if kind == "stretched":
            return perturbations.stretched(cloud, rng)
        if kind == "recoloured":
            return perturbations.recoloured(level)(cloud, rng)
        return INVARIANCES[kind].levels[level](cloud, rng)

    def rng(self, name: str) -> np.random.Generator:
        return np.random.default_rng(seed_of(f"{self.seed}/{name}"))


# -- objects -----------------------------------------------------------------------------------------------------------


def embedded(size: Size) -> tuple[ObjectSet, ObjectSet]:
    """Training objects for probes, and the held-out ones whose noun occurs in training."""
    folder = assets.embedded_objects()
    training, held_out = (tasks.embedded_objects(folder, split) for split in ("train", tasks.HELD_OUT))
    known = held_out.subset(i for i, noun in enumerate(held_out.labels) if noun in held_out.candidates)
    return training.first(size.probe_train), known


def procedural(size: Size, seed: int) -> tuple[ObjectSet, ObjectSet]:
    """Made-up objects of `EVERYDAY` nouns, which need no download; each is a family of its own."""
    count = max(size.objects, size.probe_test)
    parts = []
    for part, number in (("train", size.probe_train), ("test", count)):
        records, clouds = [], {}
        for index in range(number):
            noun = EVERYDAY[index % len(EVERYDAY)]
            object_id = f"{part}-{index}-{noun}"
            record, cloud = procedural_object(noun, np.random.default_rng(seed_of(f"{seed}/{object_id}")), POINTS)
            record = procedural_record(record, object_id) | {"family": object_id}
            clouds[object_id] = cloud
            records.append(record)
        nouns = [record["head_noun"] for record in records]
        ids = list(clouds)
        parts.append(ObjectSet(ids, clouds.__getitem__, nouns, nouns, ids, tasks.closed_set(sorted(EVERYDAY)), records))
    return parts[0], parts[1]


# -- questions ---------------------------------------------------------------------------------------------------------


def items_of(record: dict, nouns: Sequence[str]) -> list[Item]:
    """The questions that the facts of an object answer clearly.

    Args:
        nouns: of which the wrong names are taken.
    """
    rows: list[tuple[str, str, str, dict[str, str]]] = [("name", NAME, record["head_noun"], names(record, nouns))]
    if colour := main_colour(record):
        rows.append(("colour", COLOUR, colour, {name: f"{mostly(name).capitalize()}." for name in PALETTE}))
    if side := longest_side(record):
        rows.append(("longest side", LONGEST, side, {name: f"The {name}." for name in SIDES}))
    if (taller := is_taller(record)) is not None:
        fact = PROPERTIES["taller_than_wide"]
        texts = {"taller": f"{fact.yes.capitalize()}.", "wider": f"{fact.no.capitalize()}."}
        question = pick(OFFERED["taller_than_wide"], record, "audit")
        rows.append(("taller or wider", question, "taller" if taller else "wider", texts))
        concluding = {"yes": concluded(fact.yes, True), "no": concluded(fact.no, False)}
        rows.append(("taller, yes or no", fact.texts[0], YES_NO[not taller], concluding))
    return [Item(record["object_id"], record["family"], *row) for row in rows]


def is_taller(record: dict) -> bool | None:
    """Whether it is taller than wide from every side; None where that is not clear or depends on the side."""
    low, high = sorted((record["width"], record["depth"]))
    if record["height"] > MARGIN * high:
        return True
    return False if low > MARGIN * record["height"] else None


def names(record: dict, nouns: Sequence[str]) -> dict[str, str]:
    """The object's noun and others that it could not be called, with the sentences that name it so."""
    head_noun = record["head_noun"]
    wrong = [noun for noun in nouns if noun != head_noun and not could_be(record["name"], head_noun, noun)]
    wrong.sort(key=lambda noun: questions.draw(record, f"audit/{noun}"))
    offered = sorted([head_noun, *wrong[: OFFERED_NAMES - 1]])
    read = {noun: read_name(noun) for noun in offered}
    return {noun: name_sentence(name.phrase, name.plural) for noun, name in read.items()}


# -- the plan ----------------------------------------------------------------------------------------------------------


def make(objects: str, size: Size, seed: int) -> Plan:
    """The plan of an audit about `furniture`, the embedded objects, or about `procedural` ones.

    Raises: ValueError: other objects.
    """
    if objects not in ("furniture", "procedural"):
        raise ValueError(f"--objects {objects}: expected furniture or procedural")
    training, held_out = embedded(size) if objects == "furniture" else procedural(size, seed)
    clouds = Clouds(held_out.cloud, seed)
    nouns = sorted(held_out.candidates)
    asked = held_out.first(size.objects)
    items = [item for record in asked.records for item in items_of(record, nouns)]
    return Plan(
        {kind: _under(items, asked.ids, kind, seed) for kind in INPUTS},
        _perturbed(items, asked.first(size.perturbed).ids),
        _pairs(items, asked.records, clouds, size.pairs),
        _noise(size.noise),
        (training, held_out.first(size.probe_test)),
        clouds,
    )


def _under(items: list[Item], ids: list[str], kind: str, seed: int) -> list[Ask]:
    """The items with the object's cloud, another object's, one of zeros, or none."""
    others = dict(zip(ids, (ids[place] for place in shuffled(len(ids), seed)), strict=True))
    shown = {"true": lambda name: name, "shuffled": others.__getitem__, "zeroed": lambda _: ZEROED}
    cloud = shown.get(kind, lambda _: BLIND)
    return [Ask(item, cloud(item.object_id), scored=True) for item in items]


def _perturbed(items: list[Item], ids: list[str]) -> dict[str, dict[str, list[Ask]]]:
    return {
        name: {
            level: [
                Ask(item, f"{item.object_id}/{name}/{level}")
                for item in items
                if item.object_id in ids and item.kind in group.kinds
            ]
            for level in group.levels
        }
        for name, group in INVARIANCES.items()
    }


def _pairs(items: list[Item], records: list[dict], clouds: Clouds, limit: int) -> list[Pair]:
    """Pairs of each edit: the question about the edited factor, and those about the others, of at most `limit` objects.

    A stretched object may be called something else, so its name is not asked about.
    """
    of_object: dict[str, dict[str, Item]] = {}
    for item in items:
        of_object.setdefault(item.object_id, {})[item.kind] = item
    pairs = []
    tall = [record for record in records if "taller or wider" in of_object[record["object_id"]]]
    for record in [tall[place] for place in evenly(len(tall), limit)] if tall else []:
        asked = of_object[record["object_id"]]
        sides = asked["taller or wider"]
        cloud = f"{record['object_id']}/stretched"
        pairs.append(Pair("stretched", sides, cloud, "wider" if sides.label == "taller" else "taller"))
        if "colour" in asked:
            pairs.append(Pair("stretched", asked["colour"], cloud, asked["colour"].label))
    coloured = [record for record in records if "colour" in of_object[record["object_id"]]]
    for record in [coloured[place] for place in evenly(len(coloured), limit)] if coloured else []:
        asked, name = of_object[record["object_id"]], record["object_id"]
        colour = perturbations.new_colour(record, np.asarray(clouds(name)), clouds.rng(f"{name}/new colour"))
        if colour is None:
            continue
        for kind in ("colour", "name", "taller or wider", "longest side"):
            if kind in asked:
                after = colour if kind == "colour" else asked[kind].label
                pairs.append(Pair("recoloured", asked[kind], f"{name}/recoloured/{colour}", after))
    return pairs


def _noise(count: int) -> list[Ask]:
    return [Ask(Item(f"noise/{i}", f"noise/{i}", "name", NAME, "", {}), f"noise/{i}") for i in range(count)]
