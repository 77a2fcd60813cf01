"""`import pointalign`: light, lazy, and known to transformers in either order of imports."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from made_programs import run_program

import pointalign

ROOT = Path(__file__).parents[1]


def run_python(*arguments: str, cwd: Path = ROOT) -> str:
    """Output of a new interpreter, both streams; it sees this checkout from any folder."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    }
    result = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def printed(tmp_path_factory, processor):
    """`printed(name)`: what that program prints, both streams, in a process that has imported torch alone."""
    from conftest import tiny_model

    folder = tmp_path_factory.mktemp("programs")
    tiny_model().save_pretrained(folder)
    processor.save_pretrained(folder)

    def run(name: str) -> str:
        done = run_program(PROGRAMS[name].replace("{folder}", str(folder)))
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    return run


def test_import_is_light(tmp_path):
    code = (
        "import sys, time; start = time.process_time(); import pointalign; print(time.process_time() - start);"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules]); print(dir(pointalign))"
    )
    seconds, heavy, names = run_python("-c", code, cwd=tmp_path).splitlines()
    assert float(seconds) < 0.05
    assert heavy == "[]"
    assert all(repr(name) in names for name in pointalign.__all__)


@pytest.mark.parametrize("name", pointalign.__all__)
def test_every_public_name_is_there(name):
    assert getattr(pointalign, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'atttach'"):
        pointalign.atttach  # noqa: B018


ORDERS = (
    "import pointalign, transformers",
    "import transformers, pointalign",
    "import pointalign; from transformers.models.blip_2 import configuration_blip_2; import transformers",
)
AUTO_CLASSES = """
folder = "{folder}"
print(type(transformers.AutoConfig.from_pretrained(folder)).__name__)
print(type(transformers.AutoProcessor.from_pretrained(folder)).__name__)
print(type(transformers.AutoModelForMultimodalLM.from_pretrained(folder)).__name__)
"""
LOOKING = """
import importlib.util, sys, pointalign
assert importlib.util.find_spec("transformers").origin.endswith("__init__.py")
assert "transformers" not in sys.modules
import transformers
assert "pointalign.models" in sys.modules
"""
# On any CPU: bitsandbytes is told that this one has AVX512-BF16, for which it asks a hub for a kernel.
KERNELS = """
import ctypes, sys, types
package = None
if {with_package}:
    package = sys.modules["kernels"] = types.ModuleType("kernels")
    package.get_kernel = lambda *_arguments, **_options: print("FETCHED")
{pointalign}
load = ctypes.cdll.LoadLibrary
def load_library(*arguments):
    library = load(*arguments)
    if "bitsandbytes" in str(arguments[0]):
        library.has_avx512bf16_cpu = lambda: True
    return library
ctypes.cdll.LoadLibrary = load_library
import bitsandbytes
from bitsandbytes.backends.cpu import ops
assert ops.has_avx512bf16()
if "pointalign" in sys.modules:
    assert ops.gemm_4bit_forward_kernel is None and sys.modules.get("kernels") is package
"""
# transformers asks for the version of a package `kernels`, and finds the folder of that name.
KERNELS_FOLDER = """
import importlib.metadata, sys
{pointalign}
listed = []
importlib.metadata.packages_distributions = lambda: listed.append(1) or {}
import transformers.integrations.hub_kernels
from transformers.utils import is_kernels_available
print(len(listed), is_kernels_available(), "kernels" in sys.modules)
"""


def kernels_program(with_package: bool, pointalign: str) -> str:
    return KERNELS.replace("{with_package}", str(with_package)).replace("{pointalign}", pointalign)


PROGRAMS = {order: f"{order}\n{AUTO_CLASSES}" for order in ORDERS} | {"looking": LOOKING}
PROGRAMS |= {
    f"folder {how}": KERNELS_FOLDER.replace("{pointalign}", "import pointalign" if how == "with" else "")
    for how in ("with", "without")
}
if find_spec("bitsandbytes"):
    PROGRAMS |= {
        f"{how} {package}": kernels_program(package == "package", "import pointalign" if how == "with" else "")
        for how in ("with", "without")
        for package in ("folder", "package")
    }


@pytest.mark.parametrize("imports", ORDERS)
def test_auto_classes_know_the_models_in_either_order(imports, printed):
    expected = ["PointAlignConfig", "PointAlignProcessor", "PointAlignForConditionalGeneration"]
    assert [line for line in printed(imports).splitlines() if line.startswith("PointAlign")] == expected


def test_looking_for_transformers_does_not_use_up_the_step(printed):
    assert "Error" not in printed("looking")


def test_the_folder_kernels_costs_no_search_through_all_packages(printed):
    assert printed("folder with").split() == ["0", "False", "False"]
    assert printed("folder without").split()[0] == "1"  # the test can fail


@pytest.mark.skipif(not find_spec("bitsandbytes"), reason="bitsandbytes is not installed")
@pytest.mark.parametrize("package", ["folder", "package"])
def test_bitsandbytes_prints_nothing_and_fetches_no_kernel(package, printed):
    """Whether `kernels` is the folder of this checkout or the published package of that name."""
    assert printed(f"with {package}") == ""
    said = "FETCHED" if package == "package" else "Failed to load CPU gemm_4bit_forward"
    assert said in printed(f"without {package}")  # the test can fail
