"""Meshes and scenes to coloured points: area-weighted samples of the surface (reading by trimesh)."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pointalign.data.point_records import Buffer, PointCloudError

if TYPE_CHECKING:
    import trimesh
    from PIL import Image
    from trimesh.visual import TextureVisuals

_BLOCK = 1 << 18  # faces computed at once
PARTS = ("points", "mesh", "all")


class MeshOptions(NamedTuple):
    """How a scene is read: samples of its surface, what of it is used, grey level of what has no colour, share of bad
    vertices that may be left out."""

    num_points: int = 8192
    parts: str = "points"
    missing: float = 0.0
    max_nonfinite: float = 0.05


class Sampled(NamedTuple):
    """[N, 6] float64, xyz + rgb in 0..1, and what was left out, for the user."""

    points: np.ndarray
    notes: tuple[str, ...]


def load_scene(data: Buffer, path: Path) -> tuple[trimesh.Scene, tuple[str, ...]]:
    """The scene in the content `data` of `path`, and notes on textures that are missing beside it."""
    import trimesh

    from pointalign.data.gltf import plain_gltf
    from pointalign.data.ply import plain_mesh_header
    from pointalign.data.textures import BesideFiles

    kind, beside = path.suffix.lower().lstrip("."), BesideFiles(path)
    if kind in ("glb", "gltf"):
        data, kind = plain_gltf(data, path, beside), "glb"
    elif kind == "ply":
        data = plain_mesh_header(data)
    elif kind == "obj":
        # trimesh would name all parts after the first object, and take quadratic time to number them
        data = re.sub(rb"(?m)^o(?=[ \t])", b"#", data)
    # process=False: else trimesh drops non-finite vertices, which are to be reported
    scene = trimesh.load_scene(io.BytesIO(data), file_type=kind, resolver=beside, process=False)
    missing = dict.fromkeys(beside.missing)
    note = f"missing beside it: {', '.join(missing)[:200]}; plain colours stand in"
    return scene, (note,) if missing else ()


def sample_mesh(scene: trimesh.Scene | trimesh.Trimesh, options: MeshOptions, seed: int) -> Sampled:
    """Samples the surface of a mesh, or of a scene with its transforms applied, uniformly by area.

    Colours come from textures and materials (glTF base colour factors multiply their texture and are not converted
    from linear to sRGB), vertex colours or face colours; a surface without any has the grey level `missing`, and one
    whose texture is missing the colour of its material. trimesh reads no colours from .stl and .off.

    Of a scene that holds points and surfaces `parts` says what is used: its points, all of them and as they are; a
    sample of its surfaces; or both. A scene without points is sampled, one without faces gives its points.

    Returns: the same for the same `seed`. A point that is not finite is returned as it is.

    Raises: PointCloudError: a scene without what is to be used, too many non-finite vertices, or indices out of range.
    """
    import trimesh

    scene = trimesh.Scene(scene) if isinstance(scene, trimesh.Trimesh) else scene
    nodes = [scene.graph[node] for node in scene.graph.nodes_geometry]
    parts = [(scene.geometry[name], np.asarray(transform)) for transform, name in nodes if name in scene.geometry]
    surfaces = [(part, at) for part, at in parts if isinstance(part, trimesh.Trimesh) and len(part.faces)]
    clouds = [
        (part, at)
        for part, at in parts
        if isinstance(part, trimesh.PointCloud) or (isinstance(part, trimesh.Trimesh) and not len(part.faces))
    ]
    clouds = [(part, at) for part, at in clouds if len(part.vertices)]
    if not surfaces and not clouds:
        raise PointCloudError("the file holds neither faces nor points")
    if options.parts == "mesh" and not surfaces:
        raise PointCloudError("the file holds points and no faces: read it with --data.parts points")
    notes: list[str] = []
    if options.parts == "points" and surfaces and any(isinstance(part, trimesh.PointCloud) for part, _ in clouds):
        faces = sum(len(part.faces) for part, _ in surfaces)
        notes.append(f"{len(surfaces)} meshes ({faces} faces) beside the points were left out (--data.parts points)")
        surfaces = []
    elif surfaces and clouds and options.parts != "all":
        left = sum(len(part.vertices) for part, _ in clouds)
        notes.append(f"{left} points beside the mesh were left out (--data.parts {options.parts})")
        clouds = []
    drawn = [np.hstack([_placed(part, at), _vertex_colours(part, options.missing)]) for part, at in clouds]
    if surfaces:
        left_out = _drop_bad_faces(surfaces, options.max_nonfinite)
        notes += [f"{left_out} faces with NaN or infinite vertices were left out"] if left_out else []
        drawn.append(_sample_surfaces(surfaces, options, seed))
    return Sampled(np.concatenate(drawn), tuple(notes))


def _sample_surfaces(surfaces: list, options: MeshOptions, seed: int) -> np.ndarray:
    rng = np.random.Generator(np.random.PCG64(seed))
    areas = np.array([_face_areas(part, at).sum() for part, at in surfaces])
    if not 0 < areas.sum() < np.inf:
        raise PointCloudError(f"the faces of the mesh have a total area of {areas.sum()}: nothing to sample")
    drawn = np.bincount(_draw(areas, options.num_points, rng), minlength=len(surfaces))
    samples = np.empty((drawn.sum(), 6))
    textures: dict[object, list[_TexturePlaces]] = {}  # by their content: each is decoded once
    end = 0
    for (part, at), count in zip(surfaces, drawn, strict=True):
        if count:
            faces = _draw(_face_areas(part, at), count, rng)
            weights = _barycentric(count, rng)
            corners = _placed(part, at)[part.faces[faces]]  # [count, 3 corners, xyz]
            rows = samples[end : end + count]
            end += count
            rows[:, :3] = (weights[:, :, None] * corners).sum(axis=1)
            rows[:, 3:], places = _surface_colours(part, faces, weights, options.missing)
            if places is not None:
                textures.setdefault(places.key, []).append(places._replace(rows=rows[:, 3:]))
    for shared in textures.values():
        _multiply_texels(shared)
    return samples


class _TexturePlaces(NamedTuple):
    """Pixels of a texture that rows of colours are to be multiplied by."""

    key: object  # equal for equal textures
    image: Image.Image
    row: np.ndarray
    column: np.ndarray
    rows: np.ndarray | None = None  # [N, 3], a view


def _multiply_texels(shared: list[_TexturePlaces]) -> None:
    from pointalign.data.textures import read_texels

    row, column = (np.concatenate([getattr(places, name) for places in shared]) for name in ("row", "column"))
    texels = read_texels(shared[0].image, row, column) / 255.0
    start = 0
    for places in shared:
        assert places.rows is not None
        places.rows[:] *= texels[start : start + len(places.rows)]
        start += len(places.rows)


def _placed(part, transform: np.ndarray) -> np.ndarray:
    return np.asarray(part.vertices, np.float64) @ transform[:3, :3].T + transform[:3, 3]


def _drop_bad_faces(surfaces: list, max_nonfinite: float) -> int:
    """Take the faces with NaN or infinite vertices out of the meshes, if few vertices are bad; returns their number."""
    dropped = 0
    for part, _ in surfaces:
        _check_indices(part)
        bad = ~np.isfinite(np.asarray(part.vertices, np.float64)).all(axis=1)
        if not bad.any():
            continue
        first = int(np.flatnonzero(bad)[0])
        if bad.mean() > max_nonfinite:
            raise PointCloudError(
                f"vertex {first} is NaN or infinite ({part.vertices[first]}); {bad.sum()} of {len(bad)} vertices are, "
                f"more than --data.max_nonfinite {max_nonfinite:g} allows to leave out"
            )
        usable = ~bad[part.faces].any(axis=1)
        dropped += len(usable) - int(usable.sum())
        part.update_faces(usable)
        part.vertices = np.where(bad[:, None], 0.0, part.vertices)
    return dropped


def _check_indices(mesh: trimesh.Trimesh) -> None:
    faces = np.asarray(mesh.faces)
    if faces.min() < 0 or faces.max() >= len(mesh.vertices):
        raise PointCloudError(f"a face refers to vertex {faces.max()} of {len(mesh.vertices)}")


def _face_areas(mesh: trimesh.Trimesh, transform: np.ndarray) -> np.ndarray:
    faces, vertices = np.asarray(mesh.faces), _placed(mesh, transform)
    areas = np.empty(len(faces))
    for start in range(0, len(faces), _BLOCK):
        a, b, c = vertices[faces[start : start + _BLOCK]].transpose(1, 0, 2)
        areas[start : start + _BLOCK] = 0.5 * np.linalg.norm(np.cross(b - a, c - a), axis=1)
    return areas


def _draw(weights: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` indices, each with probability proportional to its weight; none of weight 0."""
    cumulative = np.cumsum(weights)
    return np.searchsorted(cumulative, rng.random(count) * cumulative[-1], side="right")


def _barycentric(count: int, rng: np.random.Generator) -> np.ndarray:
    """Uniform weights [count, 3] inside a triangle: the far half of the parallelogram is folded back."""
    uv = rng.random((count, 2))
    uv = np.where(uv.sum(axis=1, keepdims=True) > 1, 1 - uv, uv)
    return np.column_stack([1 - uv.sum(axis=1), uv])


def _surface_colours(
    mesh: trimesh.Trimesh, faces: np.ndarray, weights: np.ndarray, missing: float
) -> tuple[np.ndarray, _TexturePlaces | None]:
    """[N, 3] colours at places of faces, and the texture that they are still to be multiplied by, if there is any."""
    from trimesh.visual import ColorVisuals, TextureVisuals

    visual = mesh.visual
    if isinstance(visual, TextureVisuals):
        colours, places = _material_colours(visual, mesh.faces[faces], weights, missing)
        tint = visual.vertex_attributes.get("color")  # COLOR_0 of glTF multiplies the material
        if tint is not None and len(tint) == len(mesh.vertices):
            colours = colours * _interpolate(_unit(tint), mesh.faces[faces], weights)
        return colours, places
    if isinstance(visual, ColorVisuals) and visual.kind == "face":
        return _unit(visual.face_colors)[faces], None
    return _interpolate(_vertex_colours(mesh, missing), mesh.faces[faces], weights), None


def _base_colour(material, missing: float) -> tuple[Image.Image | None, np.ndarray]:
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
    return None, np.full(3, missing) if unstated else _unit(material.main_color)


def _material_colours(
    visual: TextureVisuals, corners: np.ndarray, weights: np.ndarray, missing: float
) -> tuple[np.ndarray, _TexturePlaces | None]:
    from pointalign.data.textures import map_transform, texture_content

    image, plain = _base_colour(visual.material, missing)
    if image is None or visual.uv is None:
        return np.broadcast_to(plain, (len(corners), 3)), None
    uv = np.nan_to_num((weights[:, :, None] * np.asarray(visual.uv, np.float64)[corners][:, :, :2]).sum(axis=1))
    if statement := image.info.get("file_path"):  # the map statement of an MTL file
        uv = np.column_stack([uv, np.ones(len(uv))]) @ map_transform(statement).T
    width, height = image.size
    # textures repeat; v points up, image rows go down
    column = np.minimum((uv[:, 0] % 1 * width).astype(np.int64), width - 1)
    row = np.minimum((-uv[:, 1] % 1 * height).astype(np.int64), height - 1)
    places = _TexturePlaces(texture_content(image) or id(image), image, row, column)
    return np.broadcast_to(plain, (len(corners), 3)), places


def _vertex_colours(part, missing: float) -> np.ndarray:
    """[V, 3]: the vertex colours of a mesh or point cloud, the grey level `missing` where it has none."""
    colours = part.visual.vertex_colors if part.visual.kind == "vertex" else None
    if colours is None or len(colours) != len(part.vertices):
        return np.full((len(part.vertices), 3), missing)
    return _unit(colours)


def _interpolate(values: np.ndarray, corners: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return (weights[:, :, None] * values[corners]).sum(axis=1)


def _unit(colours) -> np.ndarray:
    """RGB in 0..1 of colours stored as integers of any width or as floats."""
    colours = np.asarray(colours)[..., :3]
    return np.clip(colours / (np.iinfo(colours.dtype).max if colours.dtype.kind in "iu" else 1.0), 0, 1)
