"""What an audit shows: edits that leave answers true, edits that flip one, noise, and a plan that follows the seed."""

import numpy as np
import pytest

from pointalign.audit import perturbations, plan
from pointalign.audit.perturbations import INVARIANCES
from pointalign.embedded.facts import colour_shares, longest_side, main_colour

SIZE = plan.Size(24, 8, 24, 6, 12, 12)


@pytest.fixture(scope="module")
def planned():
    return plan.make("procedural", SIZE, 0)


@pytest.fixture(scope="module")
def objects():
    _, held_out = plan.procedural(SIZE, 0)
    return [(record, held_out.cloud(record["object_id"])) for record in held_out.records]


def facts_of(cloud, record):
    sides = dict(zip(("width", "height", "depth"), np.ptp(cloud[:, :3], axis=0).tolist(), strict=True))
    return record | sides | {"colors": colour_shares(cloud[:2048, 3:])}


def test_perturbations_leave_true_what_they_are_asked_about(objects):
    rng = np.random.default_rng(0)
    checked = 0
    for record, cloud in objects[:8]:
        before = facts_of(cloud, record)
        for name, group in INVARIANCES.items():
            for level, edit in group.levels.items():
                if name.startswith("noise") and level == "4":
                    continue  # strong enough to move a box that is barely taller than wide
                edited = edit(cloud, rng)
                assert edited.dtype == np.float32 and edited.shape[1] == 6 and edited[:, 3:].min() >= 0
                after = facts_of(edited, record)
                if "taller or wider" in group.kinds and plan.is_taller(before) is not None:
                    first, second = (after["height"] > after[side] for side in ("width", "depth"))
                    assert {first, second} == {plan.is_taller(before)}, (name, level)
                    checked += 1
                if "colour" in group.kinds and main_colour(before):
                    assert main_colour(after) == main_colour(before), (name, level)
    assert checked > 50


def test_perturbations_change_what_they_say(objects):
    rng = np.random.default_rng(0)
    _, cloud = objects[0]
    assert len(perturbations.thinned(512)(cloud, rng)) == 512
    moved = perturbations.jittered(0.02)(cloud, rng)[:, :3] - cloud[:, :3]
    radius = np.linalg.norm(cloud[:, :3] - cloud[:, :3].mean(axis=0), axis=1).max()
    assert moved.std() == pytest.approx(0.02 * radius, rel=0.05)
    grey = perturbations.greyed(cloud, rng)[:, 3:]
    assert np.ptp(grey, axis=1).max() < 1e-6 and np.allclose(perturbations.turned(360)(cloud, rng), cloud, atol=1e-5)
    assert np.allclose(perturbations.turned(90)(cloud, rng)[:, 1], cloud[:, 1])
    assert perturbations.lit(0.5)(cloud, rng)[:, 3:] == pytest.approx(cloud[:, 3:] / 2)


def test_a_stretched_object_is_clearly_the_other(objects):
    rng = np.random.default_rng(0)
    both = set()
    for record, cloud in objects:
        if (tall := plan.is_taller(record)) is None:
            continue
        both.add(tall)
        edited = perturbations.stretched(cloud, rng)
        assert plan.is_taller(facts_of(edited, record)) is (not tall)
        assert np.array_equal(np.delete(edited, 1, axis=1), np.delete(cloud, 1, axis=1)), "one factor only"
    assert both == {True, False}


def test_a_recoloured_object_has_another_main_colour_and_the_same_shape(objects):
    count = 0
    for record, cloud in objects:
        colour = perturbations.new_colour(record, cloud, np.random.default_rng(0))
        if colour is None or main_colour(record) is None:
            continue
        edited = perturbations.recoloured(colour)(cloud, np.random.default_rng(0))
        assert main_colour(facts_of(edited, record)) == colour != main_colour(record)
        assert np.array_equal(edited[:, :3], cloud[:, :3])
        count += 1
    assert count > 10


def test_noise_shows_nothing_and_differs():
    made = [perturbations.noise_cloud(np.random.default_rng(seed)) for seed in range(6)]
    assert all(main_colour({"head_noun": "", "colors": colour_shares(cloud[:, 3:])}) is None for cloud in made)
    assert all(np.isfinite(cloud).all() and 0 <= cloud[:, 3:].min() and cloud[:, 3:].max() <= 1 for cloud in made)
    assert len({cloud.tobytes() for cloud in made}) == 6


def test_a_plan_follows_its_seed_and_asks_nothing_twice(planned):
    asks = planned.asks()
    assert len({(ask.cloud, ask.item.text) for ask in asks}) == len(asks)
    again, other = plan.make("procedural", SIZE, 0), plan.make("procedural", SIZE, 1)
    assert [(ask.cloud, ask.item.text, ask.item.label) for ask in again.asks()] == [
        (ask.cloud, ask.item.text, ask.item.label) for ask in asks
    ]
    assert [ask.cloud for ask in other.asks()] != [ask.cloud for ask in asks]
    name = planned.pairs[0].cloud
    assert np.array_equal(planned.clouds(name), again.clouds(name))


def test_the_inputs_differ_in_the_cloud_alone(planned):
    for kind, asks in planned.inputs.items():
        assert [ask.item for ask in asks] == [ask.item for ask in planned.inputs["true"]]
        clouds = {ask.cloud == ask.item.object_id for ask in asks}
        assert clouds == {kind == "true"}
    assert planned.clouds(plan.BLIND) is None and not planned.clouds(plan.ZEROED).any()


def test_questions_are_true_of_their_objects(objects):
    for record, _ in objects:
        items = {item.kind: item for item in plan.items_of(record, sorted(plan.EVERYDAY))}
        assert all(item.label in item.options for item in items.values())
        name = items["name"]
        assert name.label == record["head_noun"] and len(name.options) <= plan.OFFERED_NAMES
        if "longest side" in items:
            assert items["longest side"].label == longest_side(record)
        if "taller or wider" in items:
            taller = items["taller or wider"].label == "taller"
            assert (
                record["height"] > max(record["width"], record["depth"])
                if taller
                else (record["height"] < min(record["width"], record["depth"]))
            )
            assert items["taller, yes or no"].label == ("yes" if taller else "no")
