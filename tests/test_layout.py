"""The house rules that a machine can check."""

import ast
import functools
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pointalign", "kernels/pointalign_kernels", "experiments")
MAX_LINES = 400
TO_SPLIT = {"tests/test_alignment_kernels.py", "tests/test_models.py", "tests/test_point_ops.py"}

PROCEDURAL = (  # kinds of procedural objects
    "containers", "devices", "figures", "furniture", "household", "outdoors", "rooms", "small", "structures", "things",
    "vehicles",
)  # fmt: skip

READERS = (  # what reads clouds knows nothing of the embedded objects; data sets do
    "gltf", "gltf_scene", "mesh", "pickles", "ply", "point_cloud", "point_formats", "point_records", "prepare",
    "tables", "textures",
)  # fmt: skip

# A package or module may be imported by those that come later, never the other way; modules on one line are peers.
LAYERS = [
    ["pointalign_kernels", "pointalign.command_line"],
    ["pointalign.training_command", "pointalign.precision"],
    ["pointalign.alignment", "pointalign.storage", "pointalign.training_checks", "pointalign.allocator"],
    ["pointalign.model_options", "pointalign.run_checkpoints"],
    ["pointalign.options"],
    [f"pointalign.attached_{part}" for part in ("logging", "model", "targets")],
    ["pointalign.attachment"],
    ["pointalign.step_checks", "pointalign.interruptions"],
    ["pointalign.early_stopping"],
    ["pointalign.resumable_trainer"],
    ["pointalign.embedded.facts"],
    ["pointalign.embedded.debatable", "pointalign.embedded.descriptions"],
    ["pointalign.embedded.questions"],
    ["pointalign.embedded.annotations"],
    [f"pointalign.data.{name}" for name in READERS],
    ["pointalign.embedded.procedural_parts"],
    ["pointalign.embedded.procedural_groups"],
    [f"pointalign.embedded.procedural_{kind}" for kind in PROCEDURAL],
    ["pointalign.embedded.procedural"],
    ["pointalign.embedded.procedural_questions"],
    ["pointalign.embedded.catalogue", "pointalign.embedded.lua_definitions"],
    ["pointalign.embedded.extra_objects"],
    ["pointalign.assets"],
    ["pointalign.data"],
    ["pointalign.embedded.neighbours"],
    ["pointalign.models"],
    ["pointalign.efficient"],
    ["pointalign.embedded.descent", "pointalign.embedded.views", "pointalign.embedded.words"],
    ["pointalign.convert", "pointalign.language_model"],
    ["pointalign.stage_file", "pointalign.training_dtype"],
    ["pointalign.build"],
    ["pointalign.feature_cache", "pointalign.trainer", "pointalign.certainty", "pointalign.attention_maps"],
    ["pointalign.conversation"],
    ["pointalign.evaluation"],
    [f"pointalign.page.{name}" for name in ("insight", "intake", "views")],
    ["pointalign.page.examples", "pointalign.page.talk"],
    ["pointalign.page.layout"],
    ["pointalign.page"],
    ["pointalign.held_out_losses", "pointalign.run_folder", "pointalign.model_card"],
    [f"pointalign.audit.{part}" for part in ("adapter", "charts", "perturbations", "pointllm_adapter")],
    ["pointalign.audit.own_adapter", "pointalign.audit.plan"],
    ["pointalign.audit.measures"],
    ["pointalign.audit.summary"],
    ["pointalign.audit.report"],
    ["pointalign.audit.run"],
    ["pointalign.audit"],
    [
        *(
            f"pointalign.{name}"
            for name in ("train", "chat", "demo", "evaluate", "check", "annotate", "features", "export")
        ),
        "pointalign.embedded.stage1",
    ],
    ["pointalign.compare", "pointalign.probe"],
    ["pointalign"],  # the file __init__.py alone
    ["pointalign.__main__"],
    ["experiments"],
]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def imported_modules(module: str, source: str, is_package: bool, modules: set[str]) -> set[str]:
    """The `modules` that a file imports anywhere: at the top, in a function, for type checkers, relatively."""
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".") if is_package else module.split(".")[:-1]
            prefix = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*prefix, *([node.module] if node.module else [])])
            for alias in node.names:  # `from package import module` imports the module, else a name of the package
                imported.add(f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base)
    return {name for name in imported if name in modules and name != module}


@functools.cache
def import_graph() -> dict[str, set[str]]:
    return {
        module: imported_modules(module, path.read_text(), path.name == "__init__.py", set(SOURCES))
        for module, path in SOURCES.items()
    }


@functools.cache
def calls_of(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a ring, or an empty list."""
    finished: set[str] = set()

    def search(module: str, trail: list[str]) -> list[str]:
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module in finished:
            return []
        for imported in sorted(graph[module]):
            if circle := search(imported, [*trail, module]):
                return circle
        finished.add(module)
        return []

    return next((circle for module in graph if (circle := search(module, []))), [])


def layer_of(module: str) -> int | None:
    """The place in LAYERS of the longest name that `module` is or lies in."""
    names = [
        (len(name), place)
        for place, layer in enumerate(LAYERS)
        for name in layer
        if module == name or (name != "pointalign" and module.startswith(f"{name}."))
    ]
    return max(names)[1] if names else None


def test_no_import_circle():
    assert find_circle(import_graph()) == []


def test_circles_are_found_in_functions_and_through_relative_imports():
    modules = {"p", "p.a", "p.b", "p.c"}
    sources = {"p": "", "p.a": "def f():\n    from . import b", "p.b": "from .c import x", "p.c": "import p.a"}
    graph = {name: imported_modules(name, text, name == "p", modules) for name, text in sources.items()}
    assert find_circle(graph) == ["p.a", "p.b", "p.c", "p.a"]
    graph["p.c"] = set()
    assert find_circle(graph) == []


def test_imports_point_one_way():
    graph = import_graph()
    placed = {module: layer_of(module) for module in graph}
    unplaced = [
        module
        for module, layer in placed.items()
        if layer is None and SOURCES[module].read_text().strip() and graph[module]
    ]
    assert unplaced == [], "add these modules to LAYERS"
    wrong = [
        f"{module} imports {imported}"
        for module, imports in graph.items()
        for imported in imports
        if placed[module] is not None and placed[imported] is not None and placed[imported] > placed[module]
    ]
    assert wrong == []


def test_the_library_runs_without_experiments_and_benchmarks():
    outside = re.compile(r"^\s*(?:from|import) (experiments|benchmarks)\b", re.MULTILINE)
    library = [module for module in SOURCES if not module.startswith("experiments")]
    assert [module for module in library if outside.search(SOURCES[module].read_text())] == []


def test_the_folder_of_the_kernels_shadows_no_package():
    assert (ROOT / "kernels" / "pointalign_kernels" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing says which files belong to it")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in names.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_is_named_utils():
    assert [path for path in tracked() if path.name in ("utils.py", "helpers.py", "misc.py")] == []


def test_no_path_of_one_machine():
    paths = re.compile(rb"(?<![\w.}~*-])/(work|root|home/\w+|tmp/\w+)/")
    text = (".py", ".md", ".toml", ".yaml", ".yml", ".json", ".txt", ".cpp", ".cu", ".h", "")
    hits = [path for path in tracked() if path.suffix in text and paths.search(path.read_bytes())]
    assert [str(path.relative_to(ROOT)) for path in hits] == []


def test_no_model_folder_brings_code():
    """Left out, `trust_remote_code` asks the user; a `y` on standard input then runs the folder's own program."""
    offending = []
    for module, path in SOURCES.items():
        for call in calls_of(path):
            if not isinstance(call.func, ast.Attribute):
                continue
            loads = call.func.attr in ("from_pretrained", "from_config")
            if loads and ast.unparse(call.func.value).startswith(("Auto", "PointAlignProcessor")):
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
                if options.get("trust_remote_code") != "False":
                    offending.append(f"{module}: {ast.unparse(call)}")
    assert offending == []


def names_no_encoding(call: ast.Call) -> bool:
    """Whether a call reads or writes text in the encoding of the user's locale."""
    if not isinstance(call.func, ast.Attribute) or any(keyword.arg == "encoding" for keyword in call.keywords):
        return False
    given = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
    if call.func.attr == "open":
        return bool(given) and given[0] in ("r", "w", "a", "x")
    if call.func.attr == "write_text":
        return len(call.args) == 1
    return call.func.attr == "read_text" and not given


def test_text_is_utf_8_in_every_locale():
    calls = {module: calls_of(path) for module, path in SOURCES.items() if not module.startswith("experiments")}
    assert [f"{m}:{call.lineno}" for m, found in calls.items() for call in found if names_no_encoding(call)] == []
    (call,) = (node for node in ast.walk(ast.parse("path.open('a')")) if isinstance(node, ast.Call))
    assert names_no_encoding(call), "the test can fail"


def test_no_module_is_longer_than_a_reader_holds():
    lengths = {
        path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines())
        for package in (*PACKAGES, "tests")
        for path in (ROOT / package).rglob("*.py")
    }
    assert len(lengths) > 200 and {str(path) for path, n in lengths.items() if n > MAX_LINES} <= TO_SPLIT
