"""Meshes and scenes to coloured points: area-weighted samples of the surface (reading by trimesh)."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pointalign.data.point_formats import Buffer, PointCloudError

if TYPE_CHECKING:
    import trimesh
    from PIL import Image
    from trimesh.visual import TextureVisuals

GREY = 0.5  # colour of points whose file states none


def load_scene(data: Buffer, path: Path) -> trimesh.Scene:
    """The scene in the content `data` of `path`; materials and textures are looked up beside the file."""
    import trimesh
    from trimesh.resolvers import FilePathResolver

    kind = path.suffix.lower().lstrip(".")
    if kind in ("glb", "gltf"):
        _check_gltf(data, path)
    resolver = FilePathResolver(str(path))
    # process=False: else trimesh drops non-finite vertices, which are to be reported
    return trimesh.load_scene(io.BytesIO(data), file_type=kind, resolver=resolver, process=False)


def sample_mesh(scene: trimesh.Scene | trimesh.Trimesh, num_points: int, seed: int) -> np.ndarray:
    """Samples the surface of a mesh, or of a scene with its transforms applied, uniformly by area.

    Colours come from textures and materials (glTF base colour factors multiply their texture and are not converted
    from linear to sRGB), vertex colours or face colours; a surface without any is mid-grey (0.5), and one whose texture
    is missing has the colour of its material. trimesh reads no colours from .stl and .off. Of a scene without faces all
    points are returned, however many they are.

    Returns: [num_points, 6] float64, xyz + rgb in 0..1; the same for the same `seed`.

    Raises: PointCloudError: a scene with no surface and no points, non-finite vertices or indices out of range.
    """
    import trimesh

    scene = trimesh.Scene(scene) if isinstance(scene, trimesh.Trimesh) else scene
    nodes = [scene.graph[node] for node in scene.graph.nodes_geometry]
    parts = [(scene.geometry[name], np.asarray(transform)) for transform, name in nodes if name in scene.geometry]
    surfaces = [(part, at) for part, at in parts if isinstance(part, trimesh.Trimesh) and len(part.faces)]
    if not surfaces:
        points = [(part, at) for part, at in parts if isinstance(part, trimesh.PointCloud | trimesh.Trimesh)]
        if not sum(len(part.vertices) for part, _ in points):
            raise PointCloudError("the file holds neither faces nor points")
        return np.concatenate([np.hstack([_placed(part, at), _vertex_colours(part)]) for part, at in points])

    rng = np.random.Generator(np.random.PCG64(seed))
    areas = np.array([_face_areas(part, at).sum() for part, at in surfaces])
    if not 0 < areas.sum() < np.inf:
        raise PointCloudError(f"the faces of the mesh have a total area of {areas.sum()}: nothing to sample")
    drawn = np.bincount(_draw(areas, num_points, rng), minlength=len(surfaces))
    samples = []
    for (part, at), count in zip(surfaces, drawn, strict=True):
        if count:
            faces = _draw(_face_areas(part, at), count, rng)
            weights = _barycentric(count, rng)
            corners = _placed(part, at)[part.faces[faces]]  # [count, 3 corners, xyz]
            xyz = (weights[:, :, None] * corners).sum(axis=1)
            samples.append(np.hstack([xyz, _surface_colours(part, faces, weights)]))
    return np.concatenate(samples)


def _placed(part, transform: np.ndarray) -> np.ndarray:
    vertices = np.asarray(part.vertices, np.float64)
    bad = np.flatnonzero(~np.isfinite(vertices).all(axis=1))
    if len(bad):
        raise PointCloudError(f"vertex {bad[0]} is NaN or infinite ({vertices[bad[0]]}); {len(bad)} such vertices")
    return vertices @ transform[:3, :3].T + transform[:3, 3]


def _face_areas(mesh: trimesh.Trimesh, transform: np.ndarray) -> np.ndarray:
    faces = np.asarray(mesh.faces)
    if faces.min() < 0 or faces.max() >= len(mesh.vertices):
        raise PointCloudError(f"a face refers to vertex {faces.max()} of {len(mesh.vertices)}")
    a, b, c = _placed(mesh, transform)[faces].transpose(1, 0, 2)
    return 0.5 * np.linalg.norm(np.cross(b - a, c - a), axis=1)


def _draw(weights: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` indices, each with probability proportional to its weight; none of weight 0."""
    cumulative = np.cumsum(weights)
    return np.searchsorted(cumulative, rng.random(count) * cumulative[-1], side="right")


def _barycentric(count: int, rng: np.random.Generator) -> np.ndarray:
    """Uniform weights [count, 3] inside a triangle: the far half of the parallelogram is folded back."""
    uv = rng.random((count, 2))
    uv = np.where(uv.sum(axis=1, keepdims=True) > 1, 1 - uv, uv)
    return np.column_stack([1 - uv.sum(axis=1), uv])


def _surface_colours(mesh: trimesh.Trimesh, faces: np.ndarray, weights: np.ndarray) -> np.ndarray:
    from trimesh.visual import ColorVisuals, TextureVisuals

    visual = mesh.visual
    if isinstance(visual, TextureVisuals):
        colours = _material_colours(visual, mesh.faces[faces], weights)
        tint = visual.vertex_attributes.get("color")  # COLOR_0 of glTF multiplies the material
        if tint is not None and len(tint) == len(mesh.vertices):
            colours = colours * _interpolate(_unit(tint), mesh.faces[faces], weights)
        return colours
    if isinstance(visual, ColorVisuals) and visual.kind == "face":
        return _unit(visual.face_colors)[faces]
    return _interpolate(_vertex_colours(mesh), mesh.faces[faces], weights)


def _base_colour(material) -> tuple[Image.Image | None, np.ndarray]:
    """Texture of a material, if any, and the colour that multiplies it or stands alone."""
    from trimesh.visual.color import DEFAULT_COLOR
    from trimesh.visual.material import PBRMaterial, color_image

    if isinstance(material, PBRMaterial):
        factor = material.baseColorFactor
        return material.baseColorTexture, np.ones(3) if factor is None else _unit(factor)
    image = getattr(material, "image", None)
    if image is not None and not (image.size == (2, 2) and image.tobytes() == color_image().tobytes()):
        return image, np.ones(3)  # beside a texture the Kd of an OBJ is often black or a leftover
    # trimesh stands a grey image, or its default colour, in for a material that states none
    unstated = image is not None or (np.asarray(material.main_color) == DEFAULT_COLOR).all()
    return None, np.full(3, GREY) if unstated else _unit(material.main_color)


def _material_colours(visual: TextureVisuals, corners: np.ndarray, weights: np.ndarray) -> np.ndarray:
    image, plain = _base_colour(visual.material)
    if image is None or visual.uv is None:
        return np.broadcast_to(plain, (len(corners), 3))
    uv = np.nan_to_num((weights[:, :, None] * np.asarray(visual.uv, np.float64)[corners][:, :, :2]).sum(axis=1))
    texels = np.asarray(image.convert("RGB"))
    height, width = texels.shape[:2]
    # textures repeat; v points up, image rows go down
    column = np.minimum((uv[:, 0] % 1 * width).astype(np.int64), width - 1)
    row = np.minimum((-uv[:, 1] % 1 * height).astype(np.int64), height - 1)
    return texels[row, column] / 255.0 * plain


def _vertex_colours(part) -> np.ndarray:
    """[V, 3]: the vertex colours of a mesh or point cloud, mid-grey where it has none."""
    colours = part.visual.vertex_colors if part.visual.kind == "vertex" else None
    if colours is None or len(colours) != len(part.vertices):
        return np.full((len(part.vertices), 3), GREY)
    return _unit(colours)


def _interpolate(values: np.ndarray, corners: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return (weights[:, :, None] * values[corners]).sum(axis=1)


def _unit(colours) -> np.ndarray:
    """RGB in 0..1 of colours stored as integers of any width or as floats."""
    colours = np.asarray(colours)[..., :3]
    return np.clip(colours / (np.iinfo(colours.dtype).max if colours.dtype.kind in "iu" else 1.0), 0, 1)


def _check_gltf(data: Buffer, path: Path) -> None:
    """Refuse accessors with more entries than the file has bytes: without a bufferView they allocate zeros at once."""
    tree = bytes(data)
    if tree[:4] == b"glTF":
        if len(tree) < 20:
            raise PointCloudError("the file ends inside its glTF header")
        tree = tree[20 : 20 + struct.unpack_from("<I", tree, 12)[0]]
    header = json.loads(tree)
    size = len(data)
    for buffer in header.get("buffers", []):
        uri = buffer.get("uri", "data:")
        if not uri.startswith("data:"):
            beside = path.parent / uri
            if not beside.is_file():
                raise PointCloudError(f"the buffer {uri!r} that the file refers to is missing beside it")
            size += beside.stat().st_size
    for accessor in header.get("accessors", []):
        if accessor["count"] > size:
            raise PointCloudError(f"an accessor promises {accessor['count']} entries, the file holds {size} bytes")
