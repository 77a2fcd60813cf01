"""Meshes and scenes: their surface is sampled by area, with the colours of textures, materials, vertices and faces."""

import numpy as np
import pytest
import trimesh
from made_clouds import EXPECTED, QUADRANTS, RGB, XYZ, square
from PIL import Image
from trimesh.visual.material import PBRMaterial, SimpleMaterial

from pointalign.data.point_cloud import load_point_cloud


@pytest.mark.parametrize("suffix", [".ply", ".obj", ".glb", ".gltf", ".stl", ".off"])
def test_mesh_is_sampled_by_area(tmp_path, suffix):
    path = tmp_path / f"box{suffix}"
    trimesh.creation.box((1, 2, 4)).export(path)
    points = load_point_cloud(path, num_points=4000)
    assert points.shape == (4000, 6) and (points[:, 3:] == 0).all()
    half = np.array([0.5, 1, 2], np.float32)
    on_face = np.isclose(np.abs(points[:, :3]), half, atol=1e-6)
    assert on_face.any(axis=1).all() and (np.abs(points[:, :3]) <= half + 1e-6).all()
    # faces across x, y, z have areas 8, 4, 2 (each twice): 5 standard deviations of a binomial
    np.testing.assert_allclose(on_face.mean(axis=0), np.array([8, 4, 2]) / 14, atol=0.04)
    np.testing.assert_array_equal(points, load_point_cloud(path, num_points=4000))


def test_mesh_seed_comes_from_the_content(tmp_path):
    trimesh.creation.box((1, 2, 4)).export(tmp_path / "a.stl")
    (tmp_path / "b.stl").write_bytes((tmp_path / "a.stl").read_bytes())
    trimesh.creation.box((1, 2, 4.001)).export(tmp_path / "c.stl")
    a, b, c = (load_point_cloud(tmp_path / f"{name}.stl") for name in "abc")
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 0.1


@pytest.mark.parametrize("suffix", [".obj", ".glb"])
def test_texture_colours(tmp_path, suffix):
    texture = Image.fromarray(QUADRANTS.repeat(8, 0).repeat(8, 1))
    material = PBRMaterial(baseColorTexture=texture) if suffix == ".glb" else SimpleMaterial(image=texture)
    square(material=material).export(tmp_path / f"a{suffix}")
    points = load_point_cloud(tmp_path / f"a{suffix}")
    right, up = points[:, 0] > 1, points[:, 1] > 0.5
    np.testing.assert_array_equal(points[:, 3:], QUADRANTS[1 - up.astype(int), right.astype(int)] / np.float32(255))


def test_material_colours(tmp_path):
    square(material=SimpleMaterial(diffuse=[255, 51, 0, 255])).export(tmp_path / "a.obj")
    np.testing.assert_allclose(load_point_cloud(tmp_path / "a.obj")[:, 3:], [[1, 0.2, 0]] * 8192, atol=1e-6)
    grey = Image.fromarray(np.full((4, 4, 3), 102, np.uint8))
    square(material=PBRMaterial(baseColorTexture=grey, baseColorFactor=[255, 0, 0, 255])).export(tmp_path / "b.glb")
    np.testing.assert_allclose(load_point_cloud(tmp_path / "b.glb")[:, 3:], [[0.4, 0, 0]] * 8192, atol=1e-6)


@pytest.mark.parametrize("suffix", [".ply", ".obj", ".glb"])
def test_vertex_colours_are_interpolated(tmp_path, suffix):
    mesh = square()
    mesh.visual.vertex_colors = [[0, 0, 0, 255], [255, 0, 0, 255], [255, 0, 0, 255], [0, 0, 0, 255]]
    mesh.export(tmp_path / f"a{suffix}")
    points = load_point_cloud(tmp_path / f"a{suffix}")
    np.testing.assert_allclose(points[:, 3], points[:, 0] / 2, atol=1e-5)
    assert (points[:, 4:] == 0).all()


def test_face_colours(tmp_path):
    mesh = square()
    mesh.visual.face_colors = [[255, 0, 0, 255], [0, 0, 255, 255]]
    mesh.export(tmp_path / "a.ply")
    points = load_point_cloud(tmp_path / "a.ply")
    lower = points[:, 1] < points[:, 0] / 2
    np.testing.assert_array_equal(points[:, 3:], np.where(lower[:, None], [[1, 0, 0]], [[0, 0, 1]]))


def test_scene_transforms_are_applied(tmp_path):
    scene = trimesh.Scene()
    for x, scale in ((0.0, 1.0), (10.0, 3.0)):
        transform = np.diag([scale, scale, scale, 1.0])
        transform[0, 3] = x
        scene.add_geometry(square(), geom_name="square", transform=transform)
    scene.export(tmp_path / "a.glb")
    points = load_point_cloud(tmp_path / "a.glb")
    far = points[:, 0] >= 10
    np.testing.assert_allclose(far.mean(), 0.9, atol=0.02)  # 9 times the area
    np.testing.assert_allclose(points[far, :2].max(axis=0), [16, 3], atol=0.1)


@pytest.mark.parametrize("suffix", [".obj", ".glb"])
def test_mesh_formats_without_faces_give_their_points(tmp_path, suffix):
    trimesh.PointCloud(XYZ, colors=np.hstack([RGB, np.full((200, 1), 255, np.uint8)])).export(tmp_path / f"a{suffix}")
    np.testing.assert_allclose(load_point_cloud(tmp_path / f"a{suffix}"), EXPECTED, atol=1e-6)
