"""The two files of pinned packages agree, and every package of the second has hashes."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def pins(name: str) -> dict[str, tuple[str, str]]:
    """Package -> version, and the text up to the next package."""
    blocks = re.split(r"\n(?=\S)", (ROOT / name).read_text())
    found = [(re.match(r"([\w.-]+)==([^\s;]+)", block), block) for block in blocks]
    return {m[1].lower().replace("_", "-").replace(".", "-"): (m[2], block) for m, block in found if m}


def test_every_pinned_package_is_hashed_in_the_same_version():
    hashed, pinned = pins("requirements-hashed.txt"), pins("constraints.txt")
    assert {"torch", "transformers", "peft", "numpy", "jinja2"} <= hashed.keys(), "transitive ones too"
    for name, (version, block) in hashed.items():
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", block), name
        assert name not in pinned or pinned[name][0] == version, f"{name}: run `make lock`"
    assert set(pinned) <= set(hashed), "a pinned package that nothing asks for"
