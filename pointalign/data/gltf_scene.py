"""The scene of a glTF tree: how much it draws is bounded, and deep chains of nodes become flat ones.

A file of some kilobytes can place a mesh a million times, let thousands of primitives share a buffer, or nest thousands
of nodes, for each of which trimesh multiplies the matrices of all above it.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from pointalign.data.point_records import FREE_BYTES, PointCloudError

MAX_NODES = 100_000
DEPTH = 8  # of nodes that trimesh is left to multiply
REPEATED_CORNERS = 1 << 26  # of faces that instances draw beside the first; 20 million faces
REPEATED_VALUES = 1 << 23  # vertices and indices that primitives share with others
_POINT = 32  # corners that a point counts for: all points of a scene are returned, of faces a sample


class Node(NamedTuple):
    """A node of the scene: its number, its parent's, and how many are above it."""

    index: int
    parent: int | None
    depth: int


def bound_scene(header: dict[str, Any], size: int) -> None:
    """Check what a scene draws against the size of the file, and flatten it if it is deep.

    Raises: PointCloudError: too many nodes, instances, or primitives that share their data.
    """
    views = sum(view["byteLength"] for view in header.get("bufferViews", []))
    if views > 16 * size + FREE_BYTES:
        raise PointCloudError(f"its buffer views hold {views} bytes, the file {size}: refused")
    meshes = [_draws(header, mesh) for mesh in header.get("meshes", [])]
    values = sum(mesh["values"] for mesh in meshes)
    if values > size + REPEATED_VALUES:
        raise PointCloudError(f"its primitives refer to {values} values, the file holds {size} bytes: refused")
    nodes = header.get("nodes", [])
    scene = list(_traverse(header))
    if len(scene) > MAX_NODES:
        raise PointCloudError(f"the scene has {len(scene)} nodes, at most {MAX_NODES} are read: join its meshes")
    placed = [nodes[node.index]["mesh"] for node in scene if "mesh" in nodes[node.index]]
    repeated = sum(meshes[index]["corners"] for index in placed)
    repeated -= sum(meshes[index]["corners"] for index in set(placed))
    if repeated > REPEATED_CORNERS:
        raise PointCloudError(
            f"its instances draw {repeated} corners of faces beside those stored (a point counts for {_POINT}), more "
            f"than {REPEATED_CORNERS}: refused"
        )
    if any(node.depth > DEPTH for node in scene):
        _flatten(header, scene)


def _draws(header: dict[str, Any], mesh: dict[str, Any]) -> dict[str, int]:
    """How many values a mesh refers to, and how many corners of faces it draws."""
    counts = [accessor["count"] for accessor in header.get("accessors", [])]
    values = corners = 0
    for primitive in mesh["primitives"]:
        used = [*primitive.get("attributes", {}).values(), *([primitive["indices"]] if "indices" in primitive else [])]
        values += sum(counts[index] for index in used)
        drawn = primitive.get("indices", primitive.get("attributes", {}).get("POSITION"))
        if drawn is not None:
            corners += counts[drawn] * (_POINT if primitive.get("mode", 4) == 0 else 1)
    return {"values": values, "corners": corners}


def _traverse(header: dict[str, Any]) -> Iterator[Node]:
    """The nodes of the scene, parents first, each once: a file with circles ends too."""
    nodes = header.get("nodes", [])
    roots = header["scenes"][header.get("scene", 0)].get("nodes", []) if "scenes" in header else []
    waiting = [Node(index, None, 0) for index in reversed(roots)]
    seen: set[int] = set()
    while waiting:
        node = waiting.pop()
        if node.index not in seen:
            seen.add(node.index)
            yield node
            children = nodes[node.index].get("children", [])
            waiting += [Node(child, node.index, node.depth + 1) for child in reversed(children)]


def _flatten(header: dict[str, Any], scene: list[Node]) -> None:
    """Put every mesh of the scene under a node of its own, with the product of the matrices above it."""
    nodes, world = header["nodes"], dict[int | None, np.ndarray]({None: np.eye(4)})
    flat = []
    for node in scene:
        description = nodes[node.index]
        world[node.index] = world[node.parent] @ _matrix(description)
        if "mesh" in description:
            flat.append({"mesh": description["mesh"], "matrix": world[node.index].T.reshape(-1).tolist()})
    header["nodes"], header["scenes"], header["scene"] = flat, [{"nodes": list(range(len(flat)))}], 0


def _matrix(node: dict[str, Any]) -> np.ndarray:
    """[4, 4]: translation, rotation and scale of a node, or its matrix."""
    if "matrix" in node:
        return np.array(node["matrix"], np.float64).reshape(4, 4).T
    x, y, z, w = node.get("rotation", (0, 0, 0, 1))
    norm = x * x + y * y + z * z + w * w
    s = 2 / norm if norm else 0.0
    turned = np.array(
        [
            [1 - s * (y * y + z * z), s * (x * y - z * w), s * (x * z + y * w)],
            [s * (x * y + z * w), 1 - s * (x * x + z * z), s * (y * z - x * w)],
            [s * (x * z - y * w), s * (y * z + x * w), 1 - s * (x * x + y * y)],
        ]
    )
    matrix = np.eye(4)
    matrix[:3, :3] = turned * np.asarray(node.get("scale", (1, 1, 1)), np.float64)
    matrix[:3, 3] = node.get("translation", (0, 0, 0))
    return matrix
