"""Records of procedural objects as `annotations.conversations` reads them; name, symmetry and size are not known."""

from __future__ import annotations

from pointalign.embedded.facts import read_name


def procedural_record(record: dict, object_id: str) -> dict:
    """The record of `procedural_object` with the fields that `annotations.conversations` reads."""
    name = read_name(record["head_noun"])
    unknown = {"mirror_left_right": None, "mirror_front_back": None, "catalogue_scale": False}
    described = {"name": name.name, "noun_phrase": name.phrase, "plural": name.plural}
    return unknown | described | record | {"object_id": object_id}
