"""Programs in new interpreters that begin with the slow imports done: forks of a server that did them once."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS = 600  # after which a program is ended
# What a program finds imported: PyTorch and what transformers imports of it; for the interpreter, which a process must
# choose before it imports Triton, all that trains.
PLAIN = ("torch._dynamo", "torch._inductor.compile_fx")
INTERPRETED = (*PLAIN, "triton", "pointalign.trainer")
PYTEST = """
import os, pytest, sys
for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
    del os.environ[name]  # pytest-benchmark does not time where a worker of xdist is named, as this one may be
sys.exit(pytest.main(sys.argv[1:]))
"""
SCRIPT = """
import os, runpy, sys
del sys.argv[0]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SERVER = """
import gc, importlib, json, os, signal, sys, traceback
gc.disable()
for name in sys.argv[1:]:
    importlib.import_module(name)
gc.freeze()  # the programs' collections pass over what is imported
gc.enable()
for line in sys.stdin:
    code, arguments, environment, folder, files, seconds = json.loads(line)
    child = os.fork()
    if not child:
        status = 1
        try:
            signal.alarm(seconds)
            for stream, path in zip((0, 1, 2), (os.devnull, *files)):
                os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), stream)
            os.environ.clear()
            os.environ.update(environment)
            os.chdir(folder)
            sys.argv = ["-c", *arguments]
            exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})
            status = 0
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def _server(interpreted: bool) -> subprocess.Popen:
    """Ends when this process does, which closes its input."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    # A single BLAS thread is several times faster at the small products of the interpreter.
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    modules = INTERPRETED if interpreted else PLAIN
    return subprocess.Popen(
        [sys.executable, "-c", SERVER, *modules],
        env=environment, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def run_program(
    code: str, *arguments: str, interpreted: bool = False, cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `code`, which sees this checkout, with these `sys.argv[1:]`, in an environment with these additions.

    `PYTEST` takes the arguments of pytest, `SCRIPT` the path of a script and its arguments.

    Args:
        interpreted: Triton's kernels run in its interpreter.
    """
    server = _server(interpreted)
    assert server.stdin is not None and server.stdout is not None
    outside = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = outside | environment | ({"TRITON_INTERPRET": "1"} if interpreted else {})
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        request = [code, arguments, environment, str(cwd), [str(path) for path in files], SECONDS]
        print(json.dumps(request), file=server.stdin, flush=True)
        answer = server.stdout.readline()
        assert answer, f"the server of programs ended with status {server.wait()}"
        printed = [path.read_text() for path in files]
    return subprocess.CompletedProcess([code, *arguments], int(answer), *printed)
