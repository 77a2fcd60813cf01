"""Conversations of the embedded objects: true answers, and texts that say nothing about their answer."""

import json
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
from made_records import box, committed_names, made_split, record
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from pointalign import assets
from pointalign.data.conversations import load_conversations
from pointalign.embedded import annotations, descriptions, facts, questions
from pointalign.embedded.debatable import could_be
from pointalign.embedded.procedural import MAKERS, procedural_object
from pointalign.embedded.procedural_questions import procedural_record
from pointalign.evaluation import metrics, naming, tasks
from pointalign.evaluation.choices import geometry_questions, yes_no_questions


def built_split(split: str) -> list[dict]:
    path = assets.home() / "furniture" / "objects.json"
    if not path.exists():
        pytest.skip("the embedded objects are not built here: run `pointalign assets`")
    return [item for item in json.loads(path.read_text(encoding="utf-8")) if item["split"] == split]


@pytest.fixture(scope="module", params=["made", "built"])
def records(request):
    return made_split() if request.param == "made" else built_split("train")


@pytest.fixture(scope="module")
def entries(records):
    return annotations.conversations(records)


def turns(entry: dict) -> list[tuple[str, str]]:
    """(question, answer) of every round."""
    values = [turn["value"].replace("<point>\n", "") for turn in entry["conversations"]]
    return list(zip(values[::2], values[1::2], strict=True))


def conclusion(answer: str) -> str:
    return answer.rpartition(", so ")[2].rstrip(".")


def counts(entries: list[dict], kind: str) -> dict[str, Counter]:
    """Question -> how often its answers conclude in each way: "yes", "no", "the first", "the second"."""
    found: dict[str, Counter] = defaultdict(Counter)
    for entry in entries:
        if entry["kind"].startswith(kind):
            [(question, answer)] = turns(entry)
            found[question][conclusion(answer)] += 1
    return found


# ------------------------------------------------------------------------------------------------------------- balance


def test_every_yes_no_text_has_as_many_yes_as_no(entries):
    found = counts(entries, "yes-no") | counts(entries, "same kind")
    unequal = {text: count for text, count in found.items() if count["yes"] != count["no"]}
    assert not unequal
    assert all(count["yes"] + count["no"] == count.total() for count in found.values()), "nothing but yes and no"
    texts = {text for item in questions.PROPERTIES.values() for text in item.texts}
    assert texts | {questions.SAME_KIND} <= found.keys()


def test_every_noun_is_asked_about_and_every_object_twice(records, entries):
    found = counts(entries, "yes-no name")
    nouns = Counter(item["head_noun"] for item in records)
    assert {text: count["yes"] for text, count in found.items()} == {
        questions.noun_question(noun): count for noun, count in nouns.items()
    }
    asked = defaultdict(list)
    for entry in entries:
        if entry["kind"] == "yes-no name":
            asked[entry["object_id"]].append(conclusion(turns(entry)[0][1]))
    assert asked == {item["object_id"]: asked[item["object_id"]] for item in records}
    assert all(sorted(words) == ["no", "yes"] for words in asked.values())


def test_every_main_colour_is_asked_about(records, entries):
    mains = Counter(colour for item in records if (colour := facts.main_colour(item)))
    found = {text: count["yes"] for text, count in counts(entries, "yes-no colour").items()}
    assert found == {f"Is it mostly {colour}?": count for colour, count in mains.items()}


def test_first_and_second_are_equally_often_taller(entries):
    [(_, count)] = counts(entries, "two clouds").items()
    assert count["the first"] == count["the second"] > 1000


def test_paraphrases_ask_about_different_objects_of_the_more_frequent_answer():
    items = [record_with_mirror(i, i < 2) for i in range(10)]
    asked = [q for q in questions.property_questions(items) if q.fact == "mirror_left_right"]
    assert len(asked) == 3 * 2 * 2 and len({q.question for q in asked}) == 3
    assert len({q.object_ids for q in asked if not q.affirmed}) == 6, "three texts, two objects each"
    assert len({q.object_ids for q in asked if q.affirmed}) == 2


def record_with_mirror(number: int, mirror: bool) -> dict:
    sides = {"width": 1.0, "height": 1.0, "depth": 1.0}
    return {"object_id": str(number), "mirror_left_right": mirror, "mirror_front_back": None} | sides


def test_a_single_object_is_not_asked_what_gives_its_answer_away():
    kinds = {entry["kind"] for entry in annotations.conversations([record(box(2, 5, 1))])}
    assert "side" in kinds and not [kind for kind in kinds if kind.startswith(("yes-no", "same", "two"))]


def test_a_noun_without_a_counterpart_is_left_out():
    nouns = ["chair", "chair", "sofa", "car"]
    items = [procedural_record(record(box(1, 2, 1), noun), str(i)) for i, noun in enumerate(nouns)]
    asked = [(q.question, q.affirmed) for q in questions.noun_questions(items)]
    assert Counter(asked).keys() >= {("Is this a car?", True), ("Is this a car?", False)} and len(asked) == 4


@pytest.mark.parametrize("density", [0.02, 0.1, 0.5])
def test_as_many_partners_as_a_matching_can_have(density):
    for seed in range(20):
        allowed = np.random.default_rng(seed).random((40, 40)) < density
        np.fill_diagonal(allowed, False)
        found = questions.partners(40, lambda i, j, allowed=allowed: bool(allowed[i, j]))
        pairs = [(i, j) for i, j in enumerate(found) if j is not None]
        assert all(allowed[i, j] for i, j in pairs) and len({j for _, j in pairs}) == len(pairs)
        assert len(pairs) == (maximum_bipartite_matching(csr_array(allowed)) >= 0).sum()


# --------------------------------------------------------------------------------------------------------------- truth


@pytest.mark.parametrize(
    ("name", "noun", "debatable"),
    [
        ("armchair", "chair", True),
        ("armchair", "sofa", True),
        ("light", "lamp", True),
        ("kitchen cupboard", "cabinet", True),
        ("cabinet", "wardrobe", True),
        ("plant", "tree", True),
        ("wine glass", "cup", True),
        ("dollhouse", "house", True),
        ("desk chair", "desk", True),
        ("shelves", "bookcase", True),
        ("hot dog", "dog", True),
        ("trash can", "dustbin", True),
        ("office chair", "lamp", False),
        ("car", "door", False),
        ("banana", "chair", False),
        ("table", "tree", False),
        ("washbasin", "bottle", False),
    ],
)
def test_which_nouns_could_name_an_object(name, noun, debatable):
    head = facts.head_noun(name)
    assert could_be(name, head, noun) is debatable
    if not debatable or name == noun:
        assert could_be(noun, noun, head) is debatable


def test_no_debatable_noun_is_denied(records, entries):
    by_id = {item["object_id"]: item for item in records}
    alike = [
        {"chair", "armchair", "sofa", "bench", "stool"},
        {"lamp", "light", "lantern", "lamppost"},
        {"cabinet", "cupboard", "wardrobe", "locker", "bookcase", "shelf"},
        {"plant", "tree", "bush", "flower", "hedge", "lily", "orchid"},
        {"glass", "cup", "mug", "bottle", "jar", "vase"},
        {"table", "desk", "workbench", "vanity"},
        {"bathtub", "tub", "basin", "sink", "washbasin"},
        {"stove", "oven", "cooker", "microwave"},
        {"bicycle", "bike"},
        {"man", "woman", "boy", "girl", "mannequin"},
        {"box", "crate", "carton", "trunk", "safe"},
    ]
    denied = 0
    for entry in entries:
        if entry["kind"] != "yes-no name" or conclusion(turns(entry)[0][1]) != "no":
            continue
        item = by_id[entry["object_id"]]
        noun = re.fullmatch(r"(?:Is this|Are these) (?:an? )?(.+)\?", turns(entry)[0][0])[1]
        assert noun not in item["name"].split() and noun != item["head_noun"]
        assert not any({noun, item["head_noun"]} <= group for group in alike), (noun, item["name"])
        denied += 1
    assert denied == len(records)


def side(item: dict, name: str) -> float:
    return item[{"tall": "height", "wide": "width", "deep": "depth"}.get(name, name)]


def is_true(item: dict, question: str, answer: str) -> bool:
    """Whether an answer about an object is right, worked out from its record without the writing code."""
    statement, _, concluded = answer.rstrip(".").lower().rpartition(", so ")
    yes, statement = concluded == "yes", statement or concluded
    word = re.sub("^(it is|they are|it is mostly|the category is) ", "", statement)
    sides = {name: item[name] for name in ("width", "height", "depth")}
    small, middle, large = sorted(sides.values())
    adjectives = {"taller": "height", "wider": "width", "deeper": "depth"}
    side_of = {"tall": "height", "wide": "width", "deep": "depth"}
    stated = re.fullmatch(r"it is (\w+) than it is (\w+)", statement)
    stated_holds = stated is not None and side(item, adjectives[stated[1]]) > side(item, stated[2])
    if match := re.fullmatch(r"Is it (\w+) than it is (\w+)\?", question):
        return stated_holds and yes == (side(item, adjectives[match[1]]) > 1.1 * side(item, match[2]))
    if match := re.fullmatch(r"Is its (\w+) greater than its (\w+)\?", question):
        return stated_holds and yes == (sides[match[1]] > 1.1 * sides[match[2]])
    if question in (
        "Is it taller or wider?",
        "Is it wider or taller?",
        "Is it wider or deeper?",
        "Is it deeper or wider?",
    ):
        return stated_holds and {adjectives[stated[1]], side_of[stated[2]]} == {
            adjectives[choice] for choice in re.findall("taller|wider|deeper", question)
        }
    if question.startswith("Which side is longest"):
        return word == f"the {max(sides, key=lambda name: sides[name])}"
    if question.startswith("How do height and width compare"):
        ratio = item["height"] / item["width"]
        buckets = ["wider", "square", "taller", "twice as tall"]
        return word == buckets[sum(ratio >= limit for limit in (1 / 1.1, 1.1, 2))]
    if question in ("Is it flat?", "Does it lie flat?"):
        return yes == (middle > 4 * small and item["height"] == small) and (yes or middle < 3 * small)
    if question in ("Is it slender?", "Is one side much longer than the others?"):
        return yes == (large > 3 * middle) and (yes or large < 2 * middle)
    if match := re.search(r"(left|front)\b.*\b(right|back)", question):
        return item[f"mirror_{match[1]}_{match[2]}"] is yes
    if match := re.fullmatch(r"Is it mostly (\w+)\?", question):
        first = max(item["colors"], key=item["colors"].get)
        return (
            statement == f"it is mostly {first}"
            and yes == (match[1] == first)
            and (yes or match[1] not in item["colors"])
        )
    if "color" in question:
        word = word.removeprefix("mostly ")
        return word == max(item["colors"], key=item["colors"].get) and item["colors"][word] >= 0.4
    if match := re.fullmatch(r"Which category fits this object: (.+), (.+) or (.+)\?", question):
        return word == item["category"] and word in match.groups()
    if match := re.fullmatch(r"It is (\d+) cm (\w+)\. How (\w+) is it\?", question):
        known, length = (side(item, name) for name in match.groups()[1:])
        number = int(re.fullmatch(r"About (\d+) cm\.", answer)[1])
        return abs(number - int(match[1]) * length / known) <= max(5, 0.15 * number)
    if match := re.fullmatch(r"(Is this|Are these) (?:an? )?(.+)\?", question):
        return yes == (match[2] == item["head_noun"]) and names(item, f"{statement}.")
    if question == "What is this?":
        return names(item, answer)
    raise AssertionError(f"an unknown question: {question}")


def names(item: dict, sentence: str) -> bool:
    """Whether a sentence names the object by its head noun alone, in the number of its name."""
    match = re.fullmatch(r"(this is|these are) (?:an? )?(.+)\.", sentence.lower())
    assert match is not None, sentence
    right_number = (match[1] == "these are") == item["plural"]
    return facts.singular(match[2]) == facts.singular(item["head_noun"]) and right_number


def test_every_answer_is_true(records, entries):
    by_id = {item["object_id"]: item for item in records}
    for entry in entries:
        if entry["conversation_type"] in ("single_round", "multi_round"):
            for question, answer in turns(entry):
                assert is_true(by_id[entry["object_id"]], question, answer), (entry, by_id[entry["object_id"]])
        elif entry["conversation_type"] == "comparison":
            first, second = (by_id[name] for name in entry["object_id"])
            [(question, answer)] = turns(entry)
            if question == questions.TALLER_OF_TWO:
                ratio = first["height"] / first["width"] / (second["height"] / second["width"])
                assert ratio > 1.5 if conclusion(answer) == "the first" else ratio < 1 / 1.5
                stated = re.match(r"The first is (\w+), the second is (\w+), so", answer)
                numbers = [facts.PROPORTIONS.index(word) for word in stated.groups()]
                assert numbers[0] > numbers[1] if conclusion(answer) == "the first" else numbers[0] < numbers[1]
            else:
                same = first["head_noun"] == second["head_noun"]
                assert question == questions.SAME_KIND and conclusion(answer) == ("yes" if same else "no")
                stated = re.match(r"The first is an? (.+) and the second is an? (.+), so", answer)
                assert stated.groups() == (first["head_noun"], second["head_noun"])


def test_reference_answers_of_all_objects_are_right():
    measured = {"category": "kitchen", "colors": {"red": 0.7, "blue": 0.2}, "catalogue_scale": False}
    measured |= {"width": 1.0, "height": 2.0, "depth": 0.5, "mirror_left_right": True, "mirror_front_back": None}
    for object_id, name in committed_names().items():
        item = measured | {"object_id": object_id, "name": name.name, "head_noun": name.head}
        item |= {"noun_phrase": name.phrase, "plural": name.plural}
        described = [e for e in annotations.conversations([item]) if "description" in e["conversation_type"]]
        answers = [turns(entry)[0][1] for entry in described]
        assert [entry["kind"] for entry in described] == ["name", "brief", "detail"]
        if not name.plural:
            assert answers[0] == tasks.closed_set([name.head])[name.head]
        assert name.name.lower() in answers[1].lower() and answers[2] == descriptions.describe(item)
        assert answers[2].startswith(facts.name_sentence(name.phrase, name.plural))
        scores = metrics.naming_scores(answers, [name.head] * 3)["head noun"]
        assert scores == [1.0] * 3, (object_id, answers)
        assert naming.correct(answers[:1], tasks.ObjectSet([object_id], dict.get, answers[:1], [name.head])) == 1


# ------------------------------------------------------------------------------------------------- files and evaluation


def test_the_entries_are_an_annotation_file(records, entries, tmp_path):
    path = tmp_path / "train.json"
    path.write_text(json.dumps(entries))
    read = load_conversations(path)
    assert [conversation.conversation_type for conversation in read] == [e["conversation_type"] for e in entries]
    assert {len(c.object_ids) for c in read if c.conversation_type == "comparison"} == {2}
    known = {item["object_id"] for item in records}
    assert {name for conversation in read for name in conversation.object_ids} == known
    assert all("fact" in e for e in entries if e["conversation_type"] in ("single_round", "comparison"))
    texts = [json.dumps([e["object_id"], e["conversations"]]) for e in entries if e["kind"] not in ("name", "quiz")]
    assert len(set(texts)) == len(texts), "no question is asked twice about an object"


def test_the_entries_follow_from_the_records_alone(records, entries):
    assert annotations.conversations(json.loads(json.dumps(records))) == entries
    turned = annotations.conversations(records[::-1])
    assert sorted(map(json.dumps, turned)) == sorted(map(json.dumps, entries))


def test_the_evaluation_asks_in_words_of_the_training():
    trained = built_split("train")
    texts = {question for entry in annotations.conversations(trained) for question, _ in turns(entry)}
    nouns = {item["head_noun"] for item in trained}
    tested = built_split("test")
    asked = geometry_questions(tested) + yes_no_questions(tested, nouns)
    assert {question.text for question in asked} <= texts
    assert {tasks.PROMPTS[0], tasks.PROMPTS[2]} <= texts


# --------------------------------------------------------------------------------------------------- procedural objects


@pytest.fixture(scope="module")
def procedural():
    made = [(noun, seed) for noun in MAKERS for seed in range(4)]
    return {f"{noun}-{seed}": procedural_object(noun, np.random.default_rng(seed), points=64)[0] for noun, seed in made}


def test_a_list_of_procedural_objects_is_balanced(procedural):
    items = [procedural_record(item, name) for name, item in procedural.items()]
    entries = annotations.conversations(items)
    found = counts(entries, "yes-no")
    assert all(count["yes"] == count["no"] for count in found.values())
    assert {questions.noun_question(noun) for noun in MAKERS} <= found.keys()
    by_id = {item["object_id"]: item for item in items}
    single = [entry for entry in entries if entry["conversation_type"] == "single_round"]
    single = [entry for entry in single if entry["kind"] != "legs"]
    assert all(is_true(by_id[e["object_id"]], *turns(e)[0]) for e in single)


def test_a_procedural_object_with_legs_is_asked_about_them():
    item = procedural_object("table", np.random.default_rng(0), points=64)[0]
    entries = annotations.conversations([procedural_record(item | {"legs": 4}, "t")])
    asked = [turns(entry)[0] for entry in entries if entry["kind"] == "legs"]
    assert asked == [(questions.LEGS, "It has four legs.")]
