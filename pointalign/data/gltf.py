"""glTF trees, rewritten to what trimesh reads right; what it would read wrong is refused by name.

trimesh reads the first set of texture coordinates alone, as floats, without texture transforms, takes normalised
integers of positions for lengths, leaves zeros where an extension compresses the geometry, knows no instances, and
drops textures that it cannot open. Source: the glTF 2.0 specification, sections 3.6 (accessors), 3.9 (materials),
KHR_texture_transform, KHR_draco_mesh_compression, KHR_mesh_quantization, EXT_mesh_gpu_instancing.
"""

import base64
import io
import json
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from pointalign.data.gltf_scene import bound_scene
from pointalign.data.point_records import Buffer, PointCloudError, check_expansion
from pointalign.data.textures import BesideFiles, check_pixels

_KINDS = {5120: "i1", 5121: "u1", 5122: "i2", 5123: "u2", 5125: "u4", 5126: "f4"}
_WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4}
_DRACO = "KHR_draco_mesh_compression"
_MESHOPT = ("EXT_meshopt_compression", "KHR_meshopt_compression")
_INSTANCES = "EXT_mesh_gpu_instancing"
_TRANSFORM = "KHR_texture_transform"
_GLOSSINESS = "KHR_materials_pbrSpecularGlossiness"
# Extensions that a file may require: read here, or without a bearing on geometry and base colour. Textures that are not
# read are refused where they are opened.
_KNOWN = (
    _DRACO, _TRANSFORM, "KHR_mesh_quantization", "KHR_texture_basisu", "EXT_texture_", "KHR_materials_", "KHR_lights_",
    "KHR_animation_", "KHR_audio", "KHR_xmp", "KHR_node_", "EXT_lights_",
)  # fmt: skip
_RESAVE = "open the file in an editor such as Blender and export it again without that extension"


class Tree(NamedTuple):
    """The JSON of a file, its buffers, the numbers of the images that were opened, and what Draco unpacked."""

    header: dict[str, Any]
    buffers: list[bytes]
    opened: set[int]
    decoded: list[int]  # bytes of every compressed primitive


def plain_gltf(data: Buffer, path: Path, beside: BesideFiles) -> bytes:
    """The content of a .glb or .gltf file as a .glb that trimesh reads as the specification says.

    Raises: PointCloudError: a missing buffer, an accessor larger than the file, an extension that compresses geometry
        or a base texture and that cannot be decoded, sparse geometry, or triangle fans.
    """
    tree = _read_tree(data, beside)
    header = tree.header
    size = len(data) + sum(len(buffer) for buffer in tree.buffers)
    _check_extensions(header)
    compressed = _DRACO in header.get("extensionsUsed", [])  # whose accessors have no view
    for accessor in header.get("accessors", []):
        if accessor["count"] > size * (8 if compressed and "bufferView" not in accessor else 1):
            raise PointCloudError(f"an accessor promises {accessor['count']} entries, the file holds {size} bytes")
    bound_scene(header, size)
    for mesh in header.get("meshes", []):
        for primitive in mesh["primitives"]:
            if primitive.get("mode", 4) == 6:
                raise PointCloudError(f"triangle fans are not read: {_RESAVE.replace('without that extension', '')}")
            if _DRACO in primitive.get("extensions", {}):
                _decode_draco(tree, primitive)
            _check_sparse(header, primitive)
            _set_plain_positions(tree, primitive)
            if "material" in primitive:
                _set_texture_coordinates(tree, primitive, header["materials"][primitive["material"]], beside)
    return _write_glb(tree)


def _read_tree(data: Buffer, beside: BesideFiles) -> Tree:
    content = bytes(data)
    binary = content[:4] == b"glTF"
    chunk = b""
    if binary:
        if len(content) < 20:
            raise PointCloudError("the file ends inside its glTF header")
        version, _, length = struct.unpack_from("<III", content, 4)
        if version != 2:
            raise PointCloudError(f"expected glTF 2, got version {version}")
        rest = content[20 + length :]
        content = content[20 : 20 + length]
        if len(rest) >= 8:
            (length,) = struct.unpack_from("<I", rest)
            chunk = rest[8 : 8 + length]
    header = json.loads(content)
    if not isinstance(header, dict):
        raise PointCloudError(f"expected a JSON object, got {type(header).__name__}")
    buffers = []
    for buffer in header.get("buffers", []):
        uri = buffer.get("uri")
        if uri is None:
            buffers.append(chunk)
        elif uri.startswith("data:"):
            buffers.append(base64.b64decode(uri.partition(",")[2]))
        else:
            file = beside.find(uri)
            if file is None:
                raise PointCloudError(f"the buffer {uri!r} that the file refers to is missing beside it")
            buffers.append(beside.read(file))
    return Tree(header, buffers, set(), [])


def _check_extensions(header: dict[str, Any]) -> None:
    """Refuse meshopt, whose views hold compressed bytes, instances, and what else the file calls required."""
    views = [name for view in header.get("bufferViews", []) for name in view.get("extensions", {})]
    required = header.get("extensionsRequired", [])
    for name in _MESHOPT:
        if name in [*views, *required]:
            raise PointCloudError(f"the geometry is compressed by {name}, which is not read: {_RESAVE}")
    if any(_INSTANCES in node.get("extensions", {}) for node in header.get("nodes", [])):
        raise PointCloudError(f"the scene has instances of {_INSTANCES}, which are not read: {_RESAVE}")
    if unknown := [name for name in required if not name.startswith(_KNOWN)]:
        raise PointCloudError(f"the file requires {unknown[0]}, which is not read: {_RESAVE}")


def _set_plain_positions(tree: Tree, primitive: dict[str, Any]) -> None:
    """Replace normalised integers of positions by the lengths that they stand for."""
    attributes = primitive.get("attributes", {})
    accessor = attributes.get("POSITION")
    if accessor is not None and tree.header["accessors"][accessor].get("normalized"):
        attributes["POSITION"] = _add_accessor(tree, np.maximum(_read_accessor(tree, accessor), -1.0))


def _check_sparse(header: dict[str, Any], primitive: dict[str, Any]) -> None:
    used = [*primitive.get("attributes", {}).values(), *([primitive["indices"]] if "indices" in primitive else [])]
    if any("sparse" in header["accessors"][index] for index in used):
        raise PointCloudError("sparse accessors of geometry are not read: export the file again without them")


def _decode_draco(tree: Tree, primitive: dict[str, Any]) -> None:
    """Replace the accessors of a compressed primitive by decoded ones."""
    try:
        import DracoPy
    except ImportError as error:
        raise PointCloudError(
            f"the geometry is compressed by {_DRACO}: pip install 'pointalign[draco]', or {_RESAVE}"
        ) from error
    extension = primitive["extensions"].pop(_DRACO)
    view = tree.header["bufferViews"][extension["bufferView"]]
    start = view.get("byteOffset", 0)
    content = tree.buffers[view["buffer"]][start : start + view["byteLength"]]
    tree.decoded.append(24 * sum(_draco_counts(content)))
    check_expansion(sum(tree.decoded), sum(map(len, tree.buffers)), f"the geometry compressed by {_DRACO}")
    try:
        mesh = DracoPy.decode(content)
    except DracoPy.FileTypeException as error:
        raise PointCloudError(f"the geometry compressed by {_DRACO} is corrupt ({error})") from error
    decoded = {attribute["unique_id"]: np.asarray(attribute["data"]) for attribute in mesh.attributes}
    accessors = tree.header["accessors"]
    for name, ident in extension["attributes"].items():
        if name not in primitive["attributes"] or ident not in decoded:
            raise PointCloudError(f"the geometry compressed by {_DRACO} lacks the attribute {name}")
        normalized = accessors[primitive["attributes"][name]].get("normalized", False)
        primitive["attributes"][name] = _add_accessor(tree, decoded[ident], normalized)
    if "indices" in primitive:
        primitive["indices"] = _add_accessor(tree, np.asarray(mesh.faces, np.uint32).reshape(-1))


def _draco_counts(content: bytes) -> tuple[int, int]:
    """The numbers of faces and of vertices that a compressed mesh promises; (0, 0) of an older or unknown layout.

    Source: the Draco bitstream specification, sections 4.1 (header) and 5 (connectivity).
    """
    if content[:5] != b"DRACO" or len(content) < 13 or content[5] < 2 or content[7] != 1:
        return 0, 0
    place = 11 + (content[8] == 1)  # Edgebreaker connectivity begins with the kind of its traversal
    if int.from_bytes(content[9:11], "little") & 0x8000:  # metadata stand before the counts
        return 0, 0
    counts = []
    for _ in range(2):
        count = shift = 0
        while place < len(content):
            count |= (content[place] & 127) << shift
            shift += 7
            place += 1
            if content[place - 1] < 128:
                break
        counts.append(count)
    return counts[0], counts[1]


def _set_texture_coordinates(
    tree: Tree, primitive: dict[str, Any], material: dict[str, Any], beside: BesideFiles
) -> None:
    """Put the coordinates of the base colour's texture, transformed, in the place that trimesh reads."""
    texture = base_texture(material)
    if texture is None:
        return
    _check_texture(tree, texture["index"], beside)
    transform = texture.get("extensions", {}).get(_TRANSFORM, {})
    channel = f"TEXCOORD_{transform.get('texCoord', texture.get('texCoord', 0))}"
    attributes = primitive["attributes"]
    if channel not in attributes:
        attributes.pop("TEXCOORD_0", None)
        return
    index = attributes[channel]
    if transform or tree.header["accessors"][index]["componentType"] != 5126:
        index = _add_accessor(tree, _transformed(_read_accessor(tree, index), transform))
    attributes["TEXCOORD_0"] = index


def base_texture(material: dict[str, Any]) -> dict[str, Any] | None:
    """The texture reference of a material's base colour."""
    glossy = material.get("extensions", {}).get(_GLOSSINESS, {})
    return material.get("pbrMetallicRoughness", {}).get("baseColorTexture") or glossy.get("diffuseTexture")


def _check_texture(tree: Tree, index: int, beside: BesideFiles) -> None:
    """Refuse an image that trimesh would leave out; one that is missing beside the file is noted when it is read."""
    header = tree.header
    texture = header["textures"][index]
    extensions = texture.get("extensions", {})
    source = texture.get("source", extensions.get("EXT_texture_webp", {}).get("source"))
    if source is None:
        names = ", ".join(extensions) or "no extension"
        raise PointCloudError(f"a base colour texture has no PNG, JPEG or WebP image ({names}): {_RESAVE}")
    image = header["images"][source]
    if "ktx" in image.get("mimeType", "") or image.get("uri", "").lower().endswith((".ktx2", ".ktx")):
        raise PointCloudError(f"a base colour texture is a KTX image, which is not read: {_RESAVE}")
    if source in tree.opened:
        return
    tree.opened.add(source)
    if "bufferView" in image:
        view = header["bufferViews"][image["bufferView"]]
        start = view.get("byteOffset", 0)
        content = tree.buffers[view["buffer"]][start : start + view["byteLength"]]
    elif image["uri"].startswith("data:"):
        content = base64.b64decode(image["uri"].partition(",")[2])
    elif file := beside.find(image["uri"]):
        content = beside.read(file)
    else:
        return
    try:
        with Image.open(io.BytesIO(content)) as picture:
            # trimesh converts the textures of the glossiness extension to 64-bit numbers
            glossy = _GLOSSINESS in header.get("extensionsUsed", ())
            check_pixels(picture, len(content), share=16 if glossy else 1)
    except (OSError, Image.DecompressionBombError) as error:
        raise PointCloudError(f"a base colour texture is no image that Pillow reads ({error})") from error


def _transformed(uv: np.ndarray, transform: dict[str, Any]) -> np.ndarray:
    """uv [V, 2] under KHR_texture_transform: scaled, turned clockwise about the origin, shifted."""
    angle = transform.get("rotation", 0.0)
    cos, sin = np.cos(angle), np.sin(angle)
    scaled = uv * np.asarray(transform.get("scale", (1.0, 1.0)), np.float64)
    turned = scaled @ np.array([[cos, -sin], [sin, cos]])
    return (turned + np.asarray(transform.get("offset", (0.0, 0.0)), np.float64)).astype(np.float32)


def _read_accessor(tree: Tree, index: int) -> np.ndarray:
    """[count, width] float64, normalised integers in 0..1."""
    accessor = tree.header["accessors"][index]
    kind, width, count = np.dtype("<" + _KINDS[accessor["componentType"]]), _WIDTHS[accessor["type"]], accessor["count"]
    if "bufferView" not in accessor:
        return np.zeros((count, width))
    view = tree.header["bufferViews"][accessor["bufferView"]]
    start = view.get("byteOffset", 0) + accessor.get("byteOffset", 0)
    row = kind.itemsize * width
    stride = view.get("byteStride", row)
    content = tree.buffers[view["buffer"]]
    if count and (min(start, stride) < 0 or start + (count - 1) * stride + row > len(content)):
        raise PointCloudError(f"accessor {index} promises {count} entries beyond the end of its buffer")
    table = np.ndarray((count, width), kind, content, start, (stride, kind.itemsize))
    values = table.astype(np.float64)
    return values / np.iinfo(kind).max if kind.kind in "iu" and accessor.get("normalized") else values


def _add_accessor(tree: Tree, values: np.ndarray, normalized: bool = False) -> int:
    """Append an array as a buffer, a view and an accessor; returns the accessor's number."""
    if values.dtype.kind == "f":
        values = values.astype(np.float32)
    codes = {kind: code for code, kind in _KINDS.items()}
    content = np.ascontiguousarray(values.astype(values.dtype.newbyteorder("<"))).tobytes()
    tree.buffers.append(content)
    header = tree.header
    header["buffers"].append({"byteLength": len(content)})
    header["bufferViews"].append({"buffer": len(tree.buffers) - 1, "byteLength": len(content)})
    width = 1 if values.ndim == 1 else values.shape[1]
    names = {number: name for name, number in _WIDTHS.items()}
    header["accessors"].append(
        {
            "bufferView": len(header["bufferViews"]) - 1,
            "componentType": codes[values.dtype.str[-2:]],
            "count": len(values),
            "type": names[width],
            "normalized": normalized,
        }
    )
    return len(header["accessors"]) - 1


def _write_glb(tree: Tree) -> bytes:
    """The tree with all buffers laid end to end in the binary chunk of a .glb."""
    header = dict(tree.header)
    starts, content = [], bytearray()
    written: dict[int, int] = {}  # several may be of one file
    for buffer in tree.buffers:
        if id(buffer) not in written:
            content += bytes(-len(content) % 4)
            written[id(buffer)] = len(content)
            content += buffer
        starts.append(written[id(buffer)])
    content += bytes(-len(content) % 4)
    views = []
    for view in header.get("bufferViews", []):
        start = starts[view["buffer"]] + view.get("byteOffset", 0)
        if start + view["byteLength"] > starts[view["buffer"]] + len(tree.buffers[view["buffer"]]):
            raise PointCloudError("a buffer view promises more bytes than its buffer holds: the file is truncated")
        views.append(view | {"buffer": 0, "byteOffset": start})
    header["bufferViews"], header["buffers"] = views, [{"byteLength": len(content)}]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 4)
    total = 12 + 8 + len(text) + 8 + len(content)
    head = struct.pack("<4sIIII", b"glTF", 2, total, len(text), 0x4E4F534A)
    return head + text + struct.pack("<II", len(content), 0x004E4942) + bytes(content)
