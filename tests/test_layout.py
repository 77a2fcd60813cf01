"""The house rules that a machine can check."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [*(ROOT / "pointalign").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]

# module -> what it must not import; the direction is kernels <- alignment, models <- trainer <- train
FORBIDDEN = {
    "pointalign_kernels": ("pointalign",),
    "pointalign.data": ("pointalign.models", "pointalign.trainer", "pointalign.train", "pointalign.evaluation"),
    "pointalign.models": ("pointalign.trainer", "pointalign.train", "pointalign.evaluation", "pointalign.stages"),
    "pointalign.alignment": ("pointalign",),
    "pointalign.checkpointing": ("pointalign",),
    "pointalign.trainer": ("pointalign.train", "pointalign.evaluation", "pointalign.chat"),
    "pointalign.evaluation": ("pointalign.trainer", "pointalign.train", "pointalign.chat"),
    "pointalign.chat": ("pointalign.trainer", "pointalign.train"),
}


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {one.name for one in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {node.module or ""} | {f"{node.module}.{one.name}" for one in node.names}
    return found


def test_imports_point_one_way():
    for path in SOURCES:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removeprefix("kernels.")
        for package, forbidden in FORBIDDEN.items():
            if within(module, package):
                wrong = [i for i in imports(path) for f in forbidden if within(i, f) and not within(i, package)]
                assert not wrong, f"{module} imports {wrong}"


def test_the_folder_of_the_kernels_shadows_no_package():
    assert (ROOT / "kernels" / "pointalign_kernels" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing says which files belong to it")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in names.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_is_named_utils():
    assert [one for one in tracked() if one.name in ("utils.py", "helpers.py", "misc.py")] == []


def test_no_path_of_one_machine():
    paths = re.compile(rb"(?<![\w.}~*-])/(work|root|home/\w+|tmp/\w+)/")
    text = (".py", ".md", ".toml", ".yaml", ".yml", ".json", ".txt", ".cpp", ".cu", ".h", "")
    found = [one for one in tracked() if one.suffix in text and paths.search(one.read_bytes())]
    assert [str(one.relative_to(ROOT)) for one in found] == []
