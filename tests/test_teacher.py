"""The views and targets of the teacher study; its network is replaced by the mean colour of an image."""

import numpy as np
import pytest
import torch
from torch import nn

from experiments import teacher, teacher_check


class MeanColour(nn.Module):
    """Features `[V, 3, 1, 1]`: the mean colour of each image."""

    def extract_features(self, pixels):
        return pixels.mean(dim=(2, 3), keepdim=True)


@pytest.fixture
def panel() -> np.ndarray:
    """A slab whose front is red and whose back is blue."""
    rng = np.random.default_rng(0)
    xyz = rng.uniform(-0.7, 0.7, (8192, 3))
    front = rng.random(8192) < 0.5
    xyz[:, 2] = np.where(front, 0.1, -0.1)
    rgb = np.where(front[:, None], [1.0, 0, 0], [0, 0, 1.0])
    return np.concatenate([xyz, rgb], axis=1).astype(np.float32)


def test_the_near_side_hides_the_far_side(panel):
    front, back = teacher.render(panel, [0, np.pi])
    middle = slice(teacher.SIZE // 3, 2 * teacher.SIZE // 3)
    assert front.shape == (3, teacher.SIZE, teacher.SIZE)
    for view, near, far in ((front, 0, 2), (back, 2, 0)):
        solid = (view[near, middle, middle] > 0.3) & (view[far, middle, middle] < 0.2)
        assert solid.mean() > 0.97  # few gaps between splats
    for view in (front, back):
        np.testing.assert_allclose(view[:, :3, :3], teacher.BACKGROUND, atol=1e-3)


def test_normals_are_those_of_the_plane(panel):
    normals, spacing = teacher.surface(panel[panel[:, 2] > 0, :3])
    np.testing.assert_allclose(np.abs(normals), np.tile([0, 0, 1], (len(normals), 1)), atol=1e-3)
    assert spacing.shape == (len(normals),) and (spacing > 0).all()


def test_features_are_averaged_over_four_sides_so_a_quarter_turn_changes_nothing(panel):
    features = teacher.turned_features(MeanColour(), panel, [0.2, 0.2 + np.pi / 2, 0.9])
    assert features.shape == (3, 3)
    np.testing.assert_allclose(features[0], features[1], atol=2e-3)
    assert np.abs(features[0] - features[2]).max() > 2e-3


def test_procedural_objects_depend_on_their_number_alone():
    parts = [teacher.procedural_features(MeanColour(), numbers, [0.3]) for numbers in (range(3), range(2, 3))]
    for name in parts[0]:
        np.testing.assert_array_equal(parts[0][name][2:], parts[1][name])
    assert parts[0]["procedural_clouds"].shape == (3, teacher.STORED_POINTS, 6)


def test_targets_are_of_unit_length_and_their_axes_come_from_the_training_objects(tmp_path):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(300, 2, 400)).astype(np.float16)
    content = {
        "object_ids": np.array([f"object-{n}" for n in range(300)]),
        "splits": np.array(["train"] * 290 + ["validation"] * 10),
        "features": features,
        "procedural_features": features[:2, :1],
    }
    teacher.write(tmp_path / "a.npz", content)
    targets = teacher.teacher_targets(tmp_path / "a.npz")
    assert list(targets)[-2:] == ["procedural-0", "procedural-1"] and len(targets) == 302
    assert all(target.shape == (teacher.DIMENSIONS,) for target in targets.values())
    np.testing.assert_allclose([np.linalg.norm(target) for target in targets.values()], 1, rtol=1e-5)
    features[295] *= 9
    teacher.write(tmp_path / "b.npz", content)
    again = teacher.teacher_targets(tmp_path / "b.npz")
    np.testing.assert_array_equal(targets["object-0"], again["object-0"])
    assert np.abs(targets["object-295"] - again["object-295"]).max() > 1e-3


def test_ridge_and_neighbours_name_separate_clusters():
    rng = np.random.default_rng(0)
    nouns = np.arange(60) % 3
    centres, words = rng.normal(size=(4, 20)) * 4, torch.eye(4, 8).numpy()
    features = centres[nouns] + rng.normal(size=(60, 20))
    queries = centres[nouns] + rng.normal(size=(60, 20))
    np.testing.assert_array_equal(teacher_check.ridge(features, nouns, queries, words, 1.0), nouns)
    np.testing.assert_array_equal(teacher_check.nearest(features, nouns, queries, 5), nouns)
    unseen = teacher_check.ridge(features, nouns, centres[3:] + np.zeros((1, 20)), words, 1.0)
    assert unseen[0] in (0, 1, 2)  # a noun without a training object is never answered
