"""`import pointalign`: light, lazy, and known to transformers in either order of imports."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import pointalign

ROOT = Path(__file__).parents[1]


def run_python(code: str, cwd: Path = ROOT) -> str:
    """Output of a new interpreter, both streams; it sees this checkout from any folder."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    }
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    return result.stdout


def test_import_is_light(tmp_path):
    code = (
        "import sys, time; start = time.process_time(); import pointalign; print(time.process_time() - start);"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules]); print(dir(pointalign))"
    )
    seconds, heavy, names = run_python(code, tmp_path).splitlines()
    assert float(seconds) < 0.05
    assert heavy == "[]"
    assert all(repr(name) in names for name in pointalign.__all__)


@pytest.mark.parametrize("name", pointalign.__all__)
def test_every_public_name_is_there(name):
    assert getattr(pointalign, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'atttach'"):
        pointalign.atttach  # noqa: B018


@pytest.mark.parametrize(
    "imports",
    [
        "import pointalign, transformers",
        "import transformers, pointalign",
        "import pointalign; from transformers.models.blip_2 import configuration_blip_2; import transformers",
    ],
)
def test_auto_classes_know_the_models_in_either_order(imports, tmp_path, processor):
    from conftest import tiny_model

    tiny_model().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    code = (
        f"{imports}\n"
        f"folder = {str(tmp_path)!r}\n"
        "print(type(transformers.AutoConfig.from_pretrained(folder)).__name__)\n"
        "print(type(transformers.AutoProcessor.from_pretrained(folder)).__name__)\n"
        "print(type(transformers.AutoModelForMultimodalLM.from_pretrained(folder)).__name__)\n"
    )
    expected = ["PointAlignConfig", "PointAlignProcessor", "PointAlignForConditionalGeneration"]
    assert [line for line in run_python(code, tmp_path).splitlines() if line.startswith("PointAlign")] == expected


def test_looking_for_transformers_does_not_use_up_the_step(tmp_path):
    code = (
        "import importlib.util, sys, pointalign\n"
        "assert importlib.util.find_spec('transformers').origin.endswith('__init__.py')\n"
        "assert 'transformers' not in sys.modules\n"
        "import transformers\n"
        "assert 'pointalign.models' in sys.modules\n"
    )
    run_python(code, tmp_path)


@pytest.mark.parametrize(
    "with_package",
    [
        pytest.param(False, id="kernels-is-the-folder"),
        pytest.param(
            True,
            id="kernels-is-the-package",
            marks=pytest.mark.skipif(
                "POINTALIGN_LONG_TESTS" not in os.environ, reason="the same path again: run it by `make test-long`"
            ),
        ),
    ],
)
def test_bitsandbytes_prints_nothing_and_fetches_no_kernel(with_package, tmp_path):
    """On any CPU: bitsandbytes is told that this one has AVX512-BF16, for which it asks a hub for a kernel."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    package = "import types; package = sys.modules['kernels'] = types.ModuleType('kernels')\n"
    package += "def get_kernel(*_args, **_kwargs): print('FETCHED')\n"
    package += "package.get_kernel = get_kernel\n"
    code = (
        "import ctypes, sys\n"
        + (package if with_package else "package = None\n")
        + "{pointalign}\n"
        "load = ctypes.cdll.LoadLibrary\n"
        "def load_library(*arguments):\n"
        "    library = load(*arguments)\n"
        "    if 'bitsandbytes' in str(arguments[0]):\n"
        "        library.has_avx512bf16_cpu = lambda: True\n"
        "    return library\n"
        "ctypes.cdll.LoadLibrary = load_library\n"
        "import bitsandbytes\n"
        "from bitsandbytes.backends.cpu import ops\n"
        "assert ops.has_avx512bf16()\n"
    )  # fmt: skip
    unchanged = "assert ops.gemm_4bit_forward_kernel is None and sys.modules.get('kernels') is package\n"
    assert run_python(code.replace("{pointalign}", "import pointalign") + unchanged) == ""
    without = run_python(code.replace("{pointalign}", ""))
    assert ("FETCHED" if with_package else "Failed to load CPU gemm_4bit_forward") in without  # the test can fail
