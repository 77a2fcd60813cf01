"""Procedural shapes: reproducible, and every factor is really in the cloud."""

import json
from dataclasses import replace

import numpy as np
import pytest

from experiments import shapes

PLAIN = shapes.Shape("red", "square", 4, taper=1.0, holes=0, aspect=1.0, roughness=0.0, lopsided=False)


def cloud(points: int = 4000, seed: int = 0, **changes) -> np.ndarray:
    return shapes.sample(replace(PLAIN, **changes), np.random.default_rng(seed), points)


def test_the_same_seed_gives_the_same_objects():
    first, second, other = (list(shapes.generate(3, seed)) for seed in (0, 0, 1))
    for (a_name, a, a_cloud), (b_name, b, b_cloud) in zip(first, second, strict=True):
        assert a_name == b_name and a == b and np.array_equal(a_cloud, b_cloud)
    assert [one for _, one, _ in first] != [one for _, one, _ in other]
    assert next(shapes.generate(1))[1] == first[0][1]  # object n depends on n, not on how many there are


def test_clouds_are_what_the_model_reads():
    points = cloud()
    assert points.shape == (4000, 6) and points.dtype == np.float32
    assert np.linalg.norm(points[:, :3], axis=1).max() == pytest.approx(1, abs=1e-5)
    assert points[:, 3:].min() >= 0 and points[:, 3:].max() <= 1


def test_combinations_are_held_out_and_values_are_not():
    train = [one for _, one, _ in shapes.generate(300, points=8)]
    test = [one for _, one, _ in shapes.generate(300, held_out=True, points=8)]
    combinations = [{tuple(getattr(one, f) for f in shapes.FACTORS_A) for one in part} for part in (train, test)]
    assert not combinations[0] & combinations[1]
    for factor in shapes.FACTORS_A:
        assert {getattr(one, factor) for one in test} <= {getattr(one, factor) for one in train}
    for factor in shapes.FACTORS_B:  # B is drawn apart from A: no caption gives it away
        values = np.array([float(getattr(one, factor)) for one in train])
        for legs in shapes.LEGS:
            rows = np.array([one.legs == legs for one in train])
            assert abs(values[rows].mean() - values.mean()) < 4 * values.std() / rows.sum() ** 0.5


def test_captions_state_a_and_never_b():
    assert PLAIN.caption() == "This is a red stool with a square top and four legs."
    changed = replace(PLAIN, taper=0.3, holes=3, aspect=1.8, roughness=0.03, lopsided=True)
    assert changed.caption() == PLAIN.caption()
    for name, value in (("colour", "blue"), ("top", "round"), ("legs", 3)):
        assert replace(PLAIN, **{name: value}).caption() != PLAIN.caption()


def top_of(points):
    """Points of the top: those that are not wooden."""
    return (
        points[np.abs(points[:, 3:] - points[0, 3:]).max(axis=1) < 2]
        if len(points) == 0
        else points[points[:, 3] > 0.65]
    )


def test_each_factor_changes_the_cloud_it_should():
    height = lambda points: np.ptp(points[:, 1]) / np.ptp(top_of(points)[:, [0, 2]], axis=0).max()  # noqa: E731
    assert height(cloud(aspect=1.7)) > 1.5 * height(cloud(aspect=0.8))
    foot = lambda points: points[:, 1] < np.quantile(points[:, 1], 0.05)  # noqa: E731
    wooden = lambda points: points[points[:, 3] < 0.65]  # noqa: E731

    def spread_of_feet(points):
        feet = wooden(points)
        low, high = (feet[(feet[:, 1] - feet[:, 1].min()) / np.ptp(feet[:, 1]) < 0.1],
                     feet[(feet[:, 1] - feet[:, 1].min()) / np.ptp(feet[:, 1]) > 0.9])  # fmt: skip
        return tuple(np.hypot(part[:, 0], part[:, 2]).std() for part in (low, high))

    narrow, wide = spread_of_feet(cloud(20000, taper=0.3, top="round", legs=6))
    assert narrow < 0.6 * wide
    even, also = spread_of_feet(cloud(20000, taper=1.0, top="round", legs=6))
    assert even == pytest.approx(also, rel=0.15)
    assert foot(cloud()).any()
    # holes: with three of them, no point of the top lies in a ring of circles that are empty
    full, holed = top_of(cloud(20000, top="round")), top_of(cloud(20000, top="round", holes=3))
    assert empty_cells(holed) > empty_cells(full) + 20
    centre = lambda points: np.linalg.norm(wooden(points)[:, [0, 2]].mean(0) - top_of(points)[:, [0, 2]].mean(0))  # noqa: E731
    assert centre(cloud(20000, lopsided=True)) > 3 * centre(cloud(20000, lopsided=False))


def empty_cells(top: np.ndarray) -> int:
    """Empty cells within nine tenths of the top's radius, of a 40 by 40 grid."""
    plane = top[:, [0, 2]] - (top[:, [0, 2]].max(0) + top[:, [0, 2]].min(0)) / 2
    plane /= np.abs(plane).max()
    grid, x, z = np.histogram2d(plane[:, 0], plane[:, 1], bins=40, range=[[-1, 1], [-1, 1]])
    inside = np.hypot(*np.meshgrid((x[1:] + x[:-1]) / 2, (z[1:] + z[:-1]) / 2, indexing="ij")) < 0.9
    return int((grid[inside] == 0).sum())


def test_files_are_in_the_fields_own_format(tmp_path):
    from pointalign.data.dataset import ConversationDataset

    shapes.main(["--count", "4", "--points", "64", "--output", str(tmp_path)])
    dataset = ConversationDataset(tmp_path / "annotations" / "train.json", tmp_path / "clouds")
    records = {one["object_id"]: one for one in json.loads((tmp_path / "objects.json").read_text())}
    assert len(dataset) == 4 and len(records) == 5
    for item in (dataset[i] for i in range(4)):
        known = records[item["object_ids"][0]]
        assert known["colour"] in item["messages"][1]["content"][0]["text"] and known["split"] == "train"
