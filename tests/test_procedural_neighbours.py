"""The nearest neighbour with procedural clouds: they are added to its neighbours, and counted apart by kind of noun."""

import numpy as np

from experiments.procedural_neighbours import METHODS, compare, table, with_procedural
from pointalign.embedded.procedural import procedural_object
from pointalign.evaluation.tasks import ObjectSet


def objects(nouns: list[str], clouds: list[np.ndarray]) -> ObjectSet:
    ids = [str(number) for number in range(len(nouns))]
    return ObjectSet(ids, lambda name: clouds[int(name)], nouns, list(nouns))


def test_procedural_clouds_join_the_neighbours_and_help_where_training_clouds_mislead():
    rng = np.random.default_rng(0)
    bottle, wardrobe = (procedural_object(noun, rng)[1] for noun in ("bottle", "wardrobe"))
    held_out = objects(["bottle", "wardrobe", "gazebo"], [bottle, wardrobe, rng.random((1024, 6))])
    training = objects(
        ["bottle", "wardrobe", "gazebo"], [wardrobe, bottle, rng.random((1024, 6))]
    )  # two are mislabelled

    more = with_procedural(training, 12)
    assert len(more.ids) == 3 + 2 * 12 and more.labels[3:15] == ["bottle"] * 12, "gazebo has no generator"
    assert np.array_equal(more.clouds[3], with_procedural(training, 2).clouds[3]), "drawn alike every time"

    right = []
    for noun, cloud in (("bottle", bottle), ("wardrobe", wardrobe)):
        far = objects(["bottle", "wardrobe"], [rng.random((1024, 6)), rng.random((1024, 6))])
        result = compare(objects([noun], [cloud]), far, 12)
        right.append(result["accuracy"][METHODS[1]]["procedural nouns"]["mean"])
    assert right == [1.0, 1.0]

    result = compare(held_out, training, 2)
    assert result["clouds"] == {METHODS[0]: 3, METHODS[1]: 7}
    assert result["accuracy"][METHODS[0]]["procedural nouns"]["mean"] == 0.0
    assert {"with a generator (n=2)", "without (n=1)"} <= {cell.strip() for cell in table(result).split("|")}
