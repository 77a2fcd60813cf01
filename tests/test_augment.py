"""Another view of the same object, never another object."""

import numpy as np
import pytest

from pointalign.data.point_cloud import augment, random_pose, turn


def test_turning_is_a_rotation_about_the_vertical(clouds):
    xyz = clouds[0][:50, :3]
    turned = turn(xyz, 0.7)
    np.testing.assert_allclose(turned[:, 1], xyz[:, 1], atol=1e-6)
    np.testing.assert_allclose(turn(turned, -0.7), xyz, atol=1e-6)
    gaps = [np.linalg.norm(one[:, None] - one[None], axis=-1) for one in (xyz, turned)]
    np.testing.assert_allclose(*gaps, atol=1e-5)
    assert turned.dtype == np.float32
    np.testing.assert_allclose(turn(np.eye(3), np.pi / 2)[1], [0, 1, 0], atol=1e-7)


@pytest.mark.parametrize("pose_free", [True, False])
def test_shape_range_and_randomness(pose_free, clouds):
    before = clouds[0].copy()
    views = [augment(clouds[0], np.random.default_rng(seed), pose_free) for seed in (0, 0, 1, 2, 3, 4)]
    assert (clouds[0] == before).all(), "the cloud itself is never changed"
    assert (views[0] == views[1]).all() and views[0].shape != views[2].shape
    for view in views:
        assert view.dtype == np.float32 and len(before) // 4 <= len(view) <= len(before)
        assert 0 <= view[:, 3:].min() and view[:, 3:].max() <= 1


def test_without_pose_freedom_every_point_stays_near_a_point_of_the_object(clouds):
    view = augment(clouds[0], np.random.default_rng(0), pose_free=False)
    centred = clouds[0][:, :3] - clouds[0][:, :3].mean(axis=0)
    gaps = np.linalg.norm(view[:, None, :3] - centred[None], axis=-1).min(axis=1)
    assert gaps.max() < 0.1 * np.linalg.norm(centred, axis=1).max()
    free = augment(clouds[0], np.random.default_rng(0), pose_free=True)
    assert np.linalg.norm(free[:, None, :3] - centred[None], axis=-1).min(axis=1).max() > gaps.max()


def test_jitter_goes_by_the_size_of_the_object_wherever_it_lies(clouds):
    far = clouds[0].copy()
    far[:, :3] += 100
    near, moved = (augment(c, np.random.default_rng(0)) for c in (clouds[0], far))
    np.testing.assert_allclose(near[:, :3], moved[:, :3], atol=1e-3)


@pytest.mark.parametrize("number", [1, 2, 3, 40, 41])
def test_small_clouds_keep_enough_points(number, clouds):
    for seed in range(20):
        view = augment(clouds[0][:number], np.random.default_rng(seed), fewest=40)
        assert min(number, 40) <= len(view) <= number and np.isfinite(view).all()


def test_a_pose_tells_how_long_the_sides_become():
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-2, 2) for z in (-3, 3)], dtype=np.float32)
    pose = random_pose(np.random.default_rng(3), stretch=0.4)
    posed = corners @ pose
    sides = [
        np.linalg.norm(posed[4] - posed[0]),
        np.linalg.norm(posed[2] - posed[0]),
        np.linalg.norm(posed[1] - posed[0]),
    ]
    np.testing.assert_allclose(sides, np.array([2, 4, 6]) * np.linalg.norm(pose, axis=1), rtol=1e-5)
    assert pose[1, 0] == pose[1, 2] == pose[0, 1] == pose[2, 1] == 0, "upright stays upright"
    rigid = random_pose(np.random.default_rng(3), stretch=0)
    np.testing.assert_allclose(rigid @ rigid.T, np.eye(3), atol=1e-6)


def test_a_given_pose_is_taken(clouds):
    pose = np.diag([1.0, 5.0, 1.0]).astype(np.float32)
    high = augment(clouds[0], np.random.default_rng(0), pose=pose)
    extent = np.ptp(high[:, :3], axis=0) / np.ptp(clouds[0][:, :3], axis=0)
    assert extent[1] > 4 * max(extent[0], extent[2])
