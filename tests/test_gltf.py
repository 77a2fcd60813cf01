"""glTF, OBJ and PLY meshes as exporters really write them: what trimesh alone reads silently wrong."""

import base64
import io
import json
import sys

import numpy as np
import pytest
import trimesh
from PIL import Image
from trimesh.visual import TextureVisuals
from trimesh.visual.material import PBRMaterial, SimpleMaterial

from pointalign.data.point_cloud import PointCloudError, Reading, load_point_cloud, read_point_cloud

# image rows go down: red and green above, blue and yellow below
QUADRANTS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 0]]], np.uint8)
CORNERS = np.array([[0, 0, 0], [2, 0, 0], [2, 1, 0], [0, 1, 0]], np.float32)
UV = np.array([[0, 1], [1, 1], [1, 0], [0, 0]], np.float32)  # of glTF: v points down
POINTS = np.random.default_rng(0).normal(size=(300, 3)).astype(np.float32)
KINDS = {"i1": 5120, "u1": 5121, "i2": 5122, "u2": 5123, "u4": 5125, "f4": 5126}


def png(image=QUADRANTS):
    stream = io.BytesIO()
    Image.fromarray(image.repeat(8, 0).repeat(8, 1)).save(stream, "PNG")
    return stream.getvalue()


def uri(content):
    return "data:application/octet-stream;base64," + base64.b64encode(content).decode()


def square(attributes=(), indices=((0, 1, 2), (0, 2, 3)), mode=4, **tree):
    """A glTF tree of a 2 x 1 rectangle with a texture of four colours; `attributes`: name -> (array, normalized)."""
    arrays = {"POSITION": (CORNERS, False), "TEXCOORD_0": (UV, False)} | dict(attributes)
    header = {
        "asset": {"version": "2.0"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "materials": [{"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}}}],
        "textures": [{"source": 0}],
        "images": [{"uri": uri(png())}],
        "buffers": [],
        "bufferViews": [],
        "accessors": [],
    }
    for array, normalized in [*arrays.values(), (np.array(indices, np.uint32).reshape(-1), False)]:
        number = len(header["buffers"])
        header["buffers"].append({"uri": uri(array.tobytes()), "byteLength": array.nbytes})
        header["bufferViews"].append({"buffer": number, "byteLength": array.nbytes})
        kind = {1: "SCALAR", 2: "VEC2", 3: "VEC3", 4: "VEC4"}[1 if array.ndim == 1 else array.shape[1]]
        entry = {"bufferView": number, "componentType": KINDS[array.dtype.str[-2:]], "count": len(array), "type": kind}
        header["accessors"].append(entry | {"normalized": normalized})
    primitive = {"attributes": {name: i for i, name in enumerate(arrays)}, "indices": len(arrays), "material": 0}
    header["meshes"] = [{"primitives": [primitive | {"mode": mode}]}]
    return header | tree


def texture(**changes):
    return [{"pbrMetallicRoughness": {"baseColorTexture": {"index": 0} | changes}}]


def save(path, header):
    path.write_text(json.dumps(header))
    return path


def assert_quadrants(points, image=QUADRANTS):
    """Every point has the colour of its quadrant of the rectangle."""
    right, up = points[:, 0] > 1, points[:, 1] > 0.5
    np.testing.assert_array_equal(points[:, 3:], image[1 - up.astype(int), right.astype(int)] / np.float32(255))


def error_of(path, **options):
    with pytest.raises(PointCloudError) as caught:
        load_point_cloud(path, **options)
    assert str(path) in str(caught.value)
    return str(caught.value)


# Points and meshes in one scene


@pytest.fixture
def reconstruction(tmp_path):
    """A .glb as VGGT, MASt3R and MonST3R write it: coloured points and a cone per camera."""
    scene = trimesh.Scene()
    colours = np.full((300, 4), [255, 0, 51, 255], np.uint8)
    scene.add_geometry(trimesh.PointCloud(POINTS, colors=colours), transform=trimesh.transformations.scale_matrix(2))
    for x in (5.0, 6.0):
        scene.add_geometry(
            trimesh.creation.cone(0.1, 0.2), transform=trimesh.transformations.translation_matrix([x] * 3)
        )
    scene.export(tmp_path / "scene.glb")
    return tmp_path / "scene.glb"


def test_points_come_before_the_meshes_beside_them(reconstruction, caplog):
    points = load_point_cloud(reconstruction)
    np.testing.assert_allclose(points[:, :3], 2 * POINTS, rtol=1e-6)
    np.testing.assert_allclose(points[:, 3:], [[1, 0, 0.2]] * 300, atol=1e-6)
    assert "2 meshes" in caplog.text and "beside the points were left out" in caplog.text


def test_parts_choose_meshes_or_all(reconstruction, tmp_path):
    mesh, notes = read_point_cloud(reconstruction, Reading(parts="mesh"), 500)
    assert len(mesh) == 500 and mesh[:, :3].min() > 4
    assert notes == ("300 points beside the mesh were left out (--data.parts mesh)",)
    everything, notes = read_point_cloud(reconstruction, Reading(parts="all"), 500)
    assert len(everything) == 800 and notes == ()
    trimesh.creation.box().export(tmp_path / "box.glb")
    assert len(load_point_cloud(tmp_path / "box.glb", num_points=50)) == 50  # no points: the surface
    trimesh.PointCloud(POINTS).export(tmp_path / "points.glb")
    assert "no faces" in error_of(tmp_path / "points.glb", parts="mesh")
    with pytest.raises(ValueError, match="parts must be one of points, mesh, all"):
        load_point_cloud(reconstruction, parts="cones")


# Textures of glTF


def test_the_texture_coordinates_that_the_material_names(tmp_path):
    assert_quadrants(load_point_cloud(save(tmp_path / "a.gltf", square())))
    second = {"TEXCOORD_0": (np.zeros_like(UV), False), "TEXCOORD_1": (UV, False)}
    assert_quadrants(load_point_cloud(save(tmp_path / "b.gltf", square(second, materials=texture(texCoord=1)))))


@pytest.mark.parametrize("kind", ["u1", "u2"])
def test_normalised_integers_are_texture_coordinates(tmp_path, kind):
    stored = (UV * np.iinfo(kind).max).astype(kind)
    assert_quadrants(load_point_cloud(save(tmp_path / "a.gltf", square({"TEXCOORD_0": (stored, True)}))))


def test_a_texture_transform_is_applied(tmp_path):
    """The example of the specification: the lower left quadrant of the image, turned by a quarter."""
    transform = {"offset": [0, 1], "rotation": np.pi / 2, "scale": [0.5, 0.5]}
    changes = {"extensions": {"KHR_texture_transform": transform}}
    fine = np.arange(16, dtype=np.uint8).reshape(4, 4)[..., None].repeat(3, axis=2) * 16
    tree = square(materials=texture(**changes), images=[{"uri": uri(png(fine))}])
    points = load_point_cloud(save(tmp_path / "a.gltf", tree))
    quadrant = fine[2:, :2]
    assert set(np.unique(np.rint(points[:, 3] * 255))) == set(np.unique(quadrant))
    # u' = v / 2, v' = 1 - u / 2: the upper left corner (0, 0) shows the image's lower left texel
    assert_quadrants(points, np.array([[fine[3, 0], fine[2, 0]], [fine[3, 1], fine[2, 1]]]))
    flipped = texture(extensions={"KHR_texture_transform": {"offset": [0, 1], "scale": [1, -1]}})
    assert_quadrants(load_point_cloud(save(tmp_path / "b.gltf", square(materials=flipped))), QUADRANTS[::-1])
    other_set = texture(extensions={"KHR_texture_transform": {"texCoord": 1}})
    second = {"TEXCOORD_0": (np.zeros_like(UV), False), "TEXCOORD_1": (UV, False)}
    assert_quadrants(load_point_cloud(save(tmp_path / "c.gltf", square(second, materials=other_set))))


@pytest.mark.parametrize("kind", ["f4", "u1", "u2"])
def test_vertex_colours_multiply_a_texture(tmp_path, kind):
    colours = np.array([[0.2, 1, 1, 1]] * 4)
    stored = colours.astype("f4") if kind == "f4" else (colours * np.iinfo(kind).max).astype(kind)
    points = load_point_cloud(save(tmp_path / "a.gltf", square({"COLOR_0": (stored, kind != "f4")})))
    points[:, 3] /= 0.2
    np.testing.assert_allclose(
        points[:, 3:], QUADRANTS[(points[:, 1] <= 0.5).astype(int), (points[:, 0] > 1).astype(int)] / 255, atol=0.01
    )


def test_textures_that_are_not_read_are_refused_by_name(tmp_path):
    basis = [{"extensions": {"KHR_texture_basisu": {"source": 0}}}]
    assert "KHR_texture_basisu" in error_of(save(tmp_path / "a.gltf", square(textures=basis)))
    ktx = [{"uri": uri(b"\xabKTX 20\xbb"), "mimeType": "image/ktx2"}]
    assert "KTX" in error_of(save(tmp_path / "b.gltf", square(images=ktx)))
    broken = [{"uri": uri(b"no image")}]
    assert "no image that Pillow reads" in error_of(save(tmp_path / "c.gltf", square(images=broken)))
    fallback = [{"source": 0, "extensions": {"KHR_texture_basisu": {"source": 1}}}]
    images = [{"uri": uri(png())}, ktx[0]]
    assert_quadrants(load_point_cloud(save(tmp_path / "d.gltf", square(textures=fallback, images=images))))
    webp = io.BytesIO()
    Image.fromarray(QUADRANTS.repeat(8, 0).repeat(8, 1)).save(webp, "WEBP", lossless=True)
    tree = square(
        textures=[{"extensions": {"EXT_texture_webp": {"source": 0}}}], images=[{"uri": uri(webp.getvalue())}]
    )
    assert_quadrants(load_point_cloud(save(tmp_path / "e.gltf", tree)))


def test_encoded_names_and_missing_textures_of_gltf(tmp_path):
    (tmp_path / "my texture.png").write_bytes(png())
    (tmp_path / "a b.bin").write_bytes(CORNERS.tobytes())
    tree = square(images=[{"uri": "my%20texture.png"}])
    tree["buffers"][0]["uri"] = "a%20b.bin"
    assert_quadrants(load_point_cloud(save(tmp_path / "a.gltf", tree)))
    gone = square(images=[{"uri": "gone.png"}])
    points, notes = read_point_cloud(save(tmp_path / "b.gltf", gone), Reading())
    assert (points[:, 3:] == 1).all() and notes == ("missing beside it: gone.png; plain colours stand in",)
    (tmp_path / "folder").mkdir()
    tree["buffers"][0]["uri"] = "../a b.bin"  # no file outside the mesh's folder is opened
    assert "missing beside it" in error_of(save(tmp_path / "folder" / "c.gltf", tree))


# Compressed and unusual geometry


def draco_file(path):
    mesh = trimesh.creation.box((1, 2, 4))
    path.write_bytes(trimesh.exchange.gltf.export_glb(mesh.scene(), extension_draco=True))
    assert b"KHR_draco_mesh_compression" in path.read_bytes()
    return path


def test_draco_is_decoded(tmp_path):
    pytest.importorskip("DracoPy", reason="the DracoPy wheel is not installed (extra: draco)")
    points = load_point_cloud(draco_file(tmp_path / "a.glb"))
    np.testing.assert_allclose(np.ptp(points[:, :3], axis=0), [1, 2, 4], atol=1e-3)
    image = Image.fromarray(QUADRANTS.repeat(8, 0).repeat(8, 1))
    mesh = trimesh.Trimesh(CORNERS, [[0, 1, 2], [0, 2, 3]], process=False)
    uv = UV * [1, -1] + [0, 1]  # of trimesh: v points up
    mesh.visual = TextureVisuals(uv=uv, material=PBRMaterial(baseColorTexture=image))
    (tmp_path / "b.glb").write_bytes(trimesh.exchange.gltf.export_glb(mesh.scene(), extension_draco=True))
    points = load_point_cloud(tmp_path / "b.glb")
    inside = (abs(points[:, 0] - 1) > 0.01) & (abs(points[:, 1] - 0.5) > 0.01)  # Draco moves corners a little
    assert_quadrants(points[inside])


def test_draco_without_its_decoder_names_the_extra(tmp_path, monkeypatch):
    pytest.importorskip("DracoPy", reason="the DracoPy wheel is not installed (extra: draco)")
    path = draco_file(tmp_path / "a.glb")
    monkeypatch.setitem(sys.modules, "DracoPy", None)
    message = error_of(path)
    assert "KHR_draco_mesh_compression" in message and "pointalign[draco]" in message


def test_geometry_that_is_not_read_is_refused_by_name(tmp_path):
    tree = square()
    tree["bufferViews"][0]["extensions"] = {"EXT_meshopt_compression": {"buffer": 0}}
    assert "EXT_meshopt_compression" in error_of(save(tmp_path / "a.gltf", tree))
    tree = square()
    tree["accessors"][0]["sparse"] = {"count": 1}
    assert "sparse" in error_of(save(tmp_path / "b.gltf", tree))
    assert "triangle fans" in error_of(save(tmp_path / "c.gltf", square(mode=6)))


@pytest.mark.parametrize("kind", ["i1", "u1", "i2", "u2"])
def test_quantised_positions_are_lengths(tmp_path, kind):
    """Normalised integers span 0..1 or -1..1; the node scales them back. Beside them an integer that is a length."""
    shift = 0.5 if kind[0] == "i" else 0.0
    corners = CORNERS / 2 - shift
    tree = square({"POSITION": (np.round(corners * np.iinfo(kind).max).astype(kind), True)})
    tree |= {"extensionsUsed": ["KHR_mesh_quantization"], "extensionsRequired": ["KHR_mesh_quantization"]}
    tree["nodes"][0] |= {"scale": [2, 2, 2], "translation": [5, 0, 0]}
    points = load_point_cloud(save(tmp_path / "a.gltf", tree))
    left = 5 - 2 * shift
    np.testing.assert_allclose([points[:, 0].min(), points[:, 0].max()], [left, left + 2], atol=0.03)
    lengths = square({"POSITION": ((CORNERS * 100).astype("u2"), False)})
    lengths["nodes"][0]["scale"] = [0.01] * 3
    assert load_point_cloud(save(tmp_path / "b.gltf", lengths))[:, 0].max() == pytest.approx(2, abs=0.01)


def test_instances_and_required_extensions_that_are_not_read_are_refused_by_name(tmp_path):
    tree = square()
    tree["nodes"][0]["extensions"] = {"EXT_mesh_gpu_instancing": {"attributes": {"TRANSLATION": 0}}}
    assert "EXT_mesh_gpu_instancing" in error_of(save(tmp_path / "a.gltf", tree))
    assert "KHR_gaussian_splatting" in error_of(
        save(tmp_path / "b.gltf", square(extensionsRequired=["KHR_gaussian_splatting"]))
    )
    fine = square(extensionsRequired=["KHR_materials_unlit"], extensionsUsed=["EXT_unheard_of"])
    assert_quadrants(load_point_cloud(save(tmp_path / "c.gltf", fine)))


# OBJ and PLY


@pytest.mark.parametrize(
    ("statement", "file"),
    [
        ("-s 1 1 1 wood.png", "wood.png"),
        ("-bm 0.2 -clamp on wood.png", "wood.png"),
        (r"textures\wood.png", "textures/wood.png"),
        (r"C:\Users\me\wood.png", "wood.png"),
        ("my%20wood.png", "my wood.png"),
        ("my wood.png", "my wood.png"),
        ("Wood.PNG", "wood.png"),
        ("./textures/wood.png", "textures/wood.png"),
    ],
)
def test_texture_names_of_obj(tmp_path, statement, file):
    (tmp_path / "textures").mkdir()
    (tmp_path / file).write_bytes(png())
    (tmp_path / "a.mtl").write_text(f"newmtl m\nKd 0 0 0\nmap_Kd {statement}\n")
    faces = "usemtl m\nf 1/1 2/2 3/3\nf 1/1 3/3 4/4\n"
    corners = "".join(f"v {x} {y} {z}\n" for x, y, z in CORNERS) + "vt 0 0\nvt 1 0\nvt 1 1\nvt 0 1\n"
    (tmp_path / "a.obj").write_text("mtllib a.mtl\n" + corners + faces)
    assert_quadrants(load_point_cloud(tmp_path / "a.obj"))


def test_scale_and_offset_of_an_obj_map(tmp_path):
    (tmp_path / "wood.png").write_bytes(png())
    (tmp_path / "a.mtl").write_text("newmtl m\nmap_Kd -o 0.5 0 0 -s 1 0.5 1 wood.png\n")
    corners = "".join(f"v {x} {y} {z}\n" for x, y, z in CORNERS) + "vt 0 0\nvt 1 0\nvt 1 1\nvt 0 1\n"
    (tmp_path / "a.obj").write_text("mtllib a.mtl\n" + corners + "usemtl m\nf 1/1 2/2 3/3\nf 1/1 3/3 4/4\n")
    # u' = u + 1/2, v' = v / 2: the lower half of the image, its halves exchanged
    assert_quadrants(load_point_cloud(tmp_path / "a.obj"), np.stack([QUADRANTS[1, ::-1]] * 2))


def test_a_mesh_ply_with_other_names_and_comments(tmp_path):
    mesh = trimesh.creation.box()
    mesh.visual.vertex_colors = np.tile([255, 0, 51, 255], (8, 1)).astype(np.uint8)
    raw = mesh.export(file_type="ply")
    header, body = raw[: raw.index(b"end_header")], raw[raw.index(b"end_header") :]
    header = header.replace(b" red\n", b" Red\n").replace(b" green\n", b" diffuse_green\n").replace(b" blue\n", b" B\n")
    header = header.replace(b"ply\n", "ply\ncomment 椅子\n".encode("gbk"), 1)
    (tmp_path / "a.ply").write_bytes(header + body)
    np.testing.assert_allclose(load_point_cloud(tmp_path / "a.ply")[:, 3:], [[1, 0, 0.2]] * 8192, atol=1e-6)


def test_a_missing_obj_texture_is_said(tmp_path):
    mesh = trimesh.Trimesh(CORNERS, [[0, 1, 2], [0, 2, 3]], process=False)
    image = Image.fromarray(QUADRANTS)
    mesh.visual = TextureVisuals(uv=UV, material=SimpleMaterial(image=image, diffuse=[255, 0, 0, 255]))
    mesh.export(tmp_path / "a.obj")
    next(tmp_path.glob("*.png")).unlink()
    _, notes = read_point_cloud(tmp_path / "a.obj", Reading())
    assert len(notes) == 1 and ".png" in notes[0] and "missing beside it" in notes[0]
