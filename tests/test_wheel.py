"""What `make dist` builds works in an empty environment, away from the checkout."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from pointalign import assets

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    not os.environ.get("POINTALIGN_LONG_TESTS"), reason="compiles for a minute: run it by `make test-long`"
)


def call(*command: str | Path, **options) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the source archive and the wheel, from the tracked files alone."""
    pytest.importorskip("build", reason="the package build is not installed")
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"
    source.mkdir()
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    archive = folder / "tracked.tar"
    call("tar", "--create", "--null", "--files-from=-", "--file", archive, cwd=ROOT, input=files.decode())
    call("tar", "--extract", "--file", archive, cwd=source)
    environment = os.environ | {"POINTALIGN_BUILD": "cpu"}
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source, env=environment)
    return folder


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """The programs of a new environment with the wheel; it sees the packages here, but not this checkout."""
    folder = tmp_path_factory.mktemp("environment")
    call(sys.executable, "-m", "venv", folder)
    (site,) = folder.glob("lib/python*/site-packages")
    packages = [path for path in sys.path if Path(path).name == "site-packages"]
    (site / "packages.pth").write_text("\n".join(packages) + "\n")  # their own .pth files are not read
    (wheel,) = built.glob("*.whl")
    call(folder / "bin" / "pip", "install", "--no-deps", "--no-index", "--force-reinstall", wheel)
    return folder / "bin"


def test_the_archives_hold_what_they_should(built):
    (sdist,), (wheel,) = built.glob("*.tar.gz"), built.glob("*.whl")
    with tarfile.open(sdist) as files:
        source = {name.partition("/")[2] for name in files.getnames()}
    with zipfile.ZipFile(wheel) as files:
        names = set(files.namelist())
    assert {"setup.py", "csrc/point_ops_cuda.cu", "csrc/build_backend.py", "README.md", "LICENSE"} <= source
    data = {f"pointalign/recipes/{path.name}" for path in (ROOT / "pointalign" / "recipes").glob("*.yaml")}
    data |= {f"pointalign/checkpoints/{path.name}" for path in (ROOT / "pointalign" / "checkpoints").iterdir()}
    data |= {"pointalign/embedded/furniture_data/ATTRIBUTION.md", "pointalign_kernels/_native.abi3.so"}
    assert "pointalign/checkpoints/README.md" in data and data <= names
    for listing in (source, names):
        assert not [name for name in listing if name.startswith(("tests", "benchmarks", "experiments", "docs", "runs"))]
    assert not [name for name in source if name.endswith(".so")]


def test_an_empty_environment_reads_a_mesh_with_compiled_operations(installed, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    assert "usage: pointalign COMMAND" in call(installed / "pointalign", "--help", cwd=tmp_path, env=environment)
    program = (
        "import pointalign, pointalign_kernels; from pointalign_kernels import point_ops;"
        f"print(pointalign.load_point_cloud({str(ROOT / 'examples/objects/desk_lamp.glb')!r}).shape);"
        "print(pointalign.__file__, pointalign_kernels.__file__, *point_ops.NATIVE_DEVICES)"
    )
    shape, modules = call(installed / "python", "-c", program, cwd=tmp_path, env=environment).splitlines()
    assert shape == "(8192, 6)"
    *files, device = modules.split()
    assert device == "cpu" and all(file.startswith(str(installed.parent)) for file in files)


def test_the_shipped_model_answers_in_an_empty_folder(installed, tmp_path):
    if not (assets.home() / "llm" / "smollm2-135m-instruct").is_dir():
        pytest.skip(f"no embedded model in {assets.home()}: run `pointalign assets`")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["POINTALIGN_HOME"] = str(assets.home())
    lamp = ROOT / "examples" / "objects" / "desk_lamp.glb"
    question = ("--question", "What is this?")
    printed = call(installed / "pointalign", "chat", lamp, *question, cwd=tmp_path, env=environment)
    assert "> What is this?\n" in printed and "lamp" in printed.lower()
