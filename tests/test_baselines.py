"""Majority, yaw and nearest neighbours against plain computations."""

import numpy as np
from made_records import box
from scipy.spatial.distance import cdist

from pointalign.data.point_cloud import normalise, subsample, turn
from pointalign.evaluation.naming import majority, nearest_by_chamfer, random_yaw


def test_majority():
    assert majority(["sofa", "bed", "bed", "lamp"]) == "bed"
    assert majority(["sofa", "lamp", "bed", "lamp", "bed"]) == "bed"


def test_nearest_by_chamfer_equals_brute_force(clouds):
    rng = np.random.default_rng(0)
    references = [cloud[rng.permutation(len(cloud))[:1500]] for cloud in clouds]
    references += [normalise(rng.random((1200, 6)) * rng.random(6)) for _ in range(26)]  # more than one chunk
    queries = [cloud[rng.permutation(len(cloud))[:1500]] for cloud in clouds[:2]]

    def points(cloud):
        return normalise(subsample(cloud, 1024))[:, :3].astype(np.float64)

    distances = np.empty((len(queries), len(references)))
    for i, query in enumerate(queries):
        for j, reference in enumerate(references):
            gaps = cdist(points(query), points(reference))
            distances[i, j] = gaps.min(axis=0).mean() + gaps.min(axis=1).mean()
    nearest = nearest_by_chamfer(queries, references)
    assert nearest.tolist() == distances.argmin(axis=1).tolist() == [0, 1]
    moved = [np.hstack([3 * one[:, :3] + 7, one[:, 3:]]) for one in references[4:]]
    assert nearest_by_chamfer(queries, moved).tolist() == distances[:, 4:].argmin(axis=1).tolist()


def test_a_turned_copy_is_found_by_the_search_over_yaws_alone():
    bar, other = box(4, 1, 1), box(1, 1.3, 4, seed=1)
    turned = box(4, 1, 1, seed=2)
    turned[:, :3] = turn(turned[:, :3], np.pi / 2)
    assert nearest_by_chamfer([turned], [other, bar]).tolist() == [0], "in a fixed pose the other bar is nearer"
    assert nearest_by_chamfer([turned], [other, bar], turns=16).tolist() == [1]


def test_random_yaw_turns_each_by_another_angle(clouds):
    turned = random_yaw([clouds[0], clouds[0]], seed=1)
    assert not np.allclose(turned[0], turned[1]) and not np.allclose(turned[0], clouds[0])
    for one in turned:
        np.testing.assert_allclose(one[:, [1, 3, 4, 5]], clouds[0][:, [1, 3, 4, 5]], atol=1e-6)
        np.testing.assert_allclose(
            np.linalg.norm(one[:, :3], axis=1), np.linalg.norm(clouds[0][:, :3], axis=1), atol=1e-5
        )
    again = random_yaw([clouds[0], clouds[0]], seed=1)
    assert all((a == b).all() for a, b in zip(turned, again, strict=True))
