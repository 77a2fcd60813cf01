"""Everything that needs a GPU, in stages by value, each within its own time limit and packed as soon as it ends.

Beforehand, on a machine without a GPU (about 3 GB of wheels):

    make gpu-rehearsal

runs every stage in small on the CPU under the versions of constraints-gpu.txt and fills the git-ignored folder
gpu_wheels/, which travels along with the working tree: wheels that the box may lack, the native library built for
sm_90, the cache of Triton's kernels compiled for sm_90 (it holds absolute paths: unpack it where the command says).

On the box (Linux x86-64, Python 3.12, torch 2.11 with CUDA 13, transformers 5.17; no network), in the root of the
working tree; OUT is a folder for the single file to bring back, COMMIT the output of `git rev-parse --short=12 HEAD`:

    export POINTALIGN_COMMIT=COMMIT PYTHONPATH=/tmp/pointalign-site TRITON_CACHE_DIR=/tmp/pointalign-triton
    python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target $PYTHONPATH gpu_wheels/*.whl
    mkdir -p $TRITON_CACHE_DIR && tar -xzf gpu_wheels/triton.tgz -C $TRITON_CACHE_DIR
    cp gpu_wheels/_native.abi3.so kernels/pointalign_kernels/ ||
      POINTALIGN_BUILD=cuda TORCH_CUDA_ARCH_LIST=9.0 python3 setup.py -q build_ext --inplace
    python3 benchmarks/gpu_suite.py --minutes 9 --output gpu_wheels/results --archive $OUT/gpu_results.tgz

Back home, rows of all stages become the files and tables of benchmarks/results/:

    tar -xzf gpu_results.tgz -C gpu_wheels && python benchmarks/gpu_suite.py --collect gpu_wheels/results && make report

A next call carries gpu_wheels/results along and goes on with what is not finished; `--again STAGE` repeats a stage. A
stage is skipped where the time left is shorter than it is expected to take, or where a package, program or asset is
missing. The last two stages run the study of a language model, over many calls, where `pointalign assets` has filled
the box's cache. Its finished runs are in study_runs and study-full_runs of the output folder. Copy a complete study by
hand:

    cp -r gpu_wheels/results/study_runs benchmarks/results/ablation_language_model
    cp -r gpu_wheels/results/study-full_runs benchmarks/results/ablation_language_model_full
"""

import argparse
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
STATE = "gpu_suite.json"
STOPPED = 124  # exit status of a command that ran into its limit, as of timeout(1)
PACKING_SECONDS = 5
REHEARSAL_SECONDS = 570  # limit of a stage on a CPU
TAIL_LINES, TAIL_WIDTH = 30, 300
SUMMARY_OF_TESTS = re.compile(r"\d+ (passed|skipped|failed|errors?|deselected)\b.* in [\d.]+s|no tests ran")
# Each tensor gets an allocation of its own: in the allocator's pool, a read past the end would stay unseen.
SANITIZER = "env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1"


class Stage(NamedTuple):
    """A step of the suite.

    Attributes:
        expected_s: seconds on an H100; with less time left the stage is skipped.
        limit_s: seconds after which it is stopped.
        commands: run in order, also after one failed; see `substitutions` for what stands in braces.
        needs: importable modules, without which the stage is skipped.
        programs: programs on PATH, likewise; not asked for in a rehearsal.
        assets: folders of the embedded assets, likewise; a rehearsal leaves such a stage out.
    """

    name: str
    expected_s: int
    limit_s: int
    commands: tuple[str, ...]
    needs: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()
    assets: tuple[str, ...] = ()


STEP = "benchmarks/test_train_step.py"
BENCHMARK = "--benchmark-only --results {results} {small}"
# small cases: the sanitizer is slow
SANITIZED = (
    "tests/test_alignment_kernels.py -k several_layers",
    "tests/test_point_ops.py -k '{device} and (lengths or batches or bad_input or every_sample)'",
)
GPU_TESTS = (
    "tests/test_alignment_kernels.py tests/test_lean_cuda.py tests/test_point_ops.py tests/test_lora_dropout.py "
    "tests/test_counter_dropout.py tests/test_folded_pointnet.py tests/test_graphs.py"
)
# liger-kernel, nf4, varlen attention and the memory cap are tests/test_lean_cuda.py
SMOKE = (
    "lean_cuda or lora_dropout or several_layers or autocast or cuda_graph or every_output or test_batches "
    "or test_lengths"
)


def rows(*names: str) -> str:
    return " ".join(f"'{STEP}::test_train_step[{name}]'" for name in names)


def study(name: str, recipe: str) -> Stage:
    """A study of a language model: as many of its runs as fit. Finished runs stay in a folder beside the stage's; the
    next call goes on with the others."""
    command = f"{{python}} -m experiments.ablation {recipe} --output {{results}}_runs"
    return Stage(
        name,
        400,
        530,
        (command,),
        needs=("jsonargparse", "matplotlib", "scipy", "yaml"),
        assets=("furniture", "llm/smollm2-135m-instruct"),
    )


STAGES = (
    Stage("build", 20, 60, ("{python} benchmarks/gpu_check.py --output {results} {rehearse}",)),
    Stage("smoke", 60, 150, (f"{{pytest}} {GPU_TESTS} -k '{SMOKE}'",)),
    Stage("alignment", 110, 240, (f"{{pytest}} benchmarks/test_alignment_loss.py -k 512-2560 {BENCHMARK}",)),
    Stage("points", 50, 150, (f"{{pytest}} benchmarks/test_point_ops.py {BENCHMARK}",)),
    Stage("step", 100, 240, (f"{{pytest}} {rows('e', 'e3', 'f', 'b', 'b3')} {BENCHMARK}",), needs=("bitsandbytes",)),
    Stage("probe", 130, 200, ("{python} benchmarks/gpu_probe.py --output {results} {rehearse}",)),
    Stage(
        "memory",
        130,
        300,
        (
            f"{{pytest}} {STEP}::test_8b_fits_24_gb {STEP}::test_the_papers_batches "
            f"{STEP}::test_cost_is_linear_in_tokens {BENCHMARK}",
        ),
        needs=("bitsandbytes",),
    ),
    Stage("parity", 40, 120, ("{python} benchmarks/parity.py --output {results}",)),
    Stage("encoder", 40, 120, (f"{{pytest}} benchmarks/test_encoder.py {BENCHMARK}",)),
    Stage("sizes", 320, 500, (f"{{pytest}} benchmarks/test_alignment_loss.py -k 'not 512-2560' {BENCHMARK}",)),
    Stage("tests", 240, 500, (f"{{pytest}} -n {{workers}} {GPU_TESTS}",), needs=("xdist",)),
    Stage(
        "sanitizer",
        180,
        500,
        tuple(f"{{{tool}}} {{pytest}} {cases}" for tool in ("memcheck", "racecheck") for cases in SANITIZED),
        programs=("compute-sanitizer",),
    ),
    Stage(
        "parts",
        260,
        500,
        (f"{{pytest}} {rows('a', 'b2', 'e2', *(f'd{number}' for number in range(1, 12)))} {BENCHMARK}",),
        needs=("bitsandbytes",),
    ),
    Stage("compiled", 120, 300, (f"{{pytest}} {rows('c')} {BENCHMARK}",), needs=("bitsandbytes",)),
    study("study", "language_model"),
    study("study-full", "language_model_full"),
)


def substitutions(results: Path, rehearsal: bool) -> dict[str, str]:
    """What stands for the names in braces of a stage's commands."""
    return {
        "python": shlex.quote(sys.executable),
        "pytest": f"{shlex.quote(sys.executable)} -m pytest -q -p no:cacheprovider",
        "results": shlex.quote(str(results)),
        "device": "cpu" if rehearsal else "cuda",
        "small": "--small" if rehearsal else "",
        "rehearse": "--rehearse" if rehearsal else "",
        "memcheck": "" if rehearsal else f"{SANITIZER} --tool memcheck",
        "racecheck": "" if rehearsal else f"{SANITIZER} --tool racecheck",
        "workers": "2" if rehearsal else "4",
    }


def missing(stage: Stage, rehearsal: bool) -> list[str]:
    """Modules, programs and assets that the stage needs and this machine lacks."""
    if stage.assets and rehearsal:
        return ["a GPU"]
    # as in pointalign.assets, which cannot be imported before a stage has built the package
    home = Path(os.environ.get("POINTALIGN_HOME") or Path.home() / ".cache/pointalign").expanduser()
    modules = [name for name in stage.needs if importlib.util.find_spec(name) is None]
    programs = [name for name in stage.programs if not rehearsal and shutil.which(name) is None]
    return modules + programs + [name for name in stage.assets if not (home / name / ".complete.json").exists()]


def run_command(words: Sequence[str], log: Any, environment: dict[str, str], seconds: float) -> int:
    """Exit status; STOPPED where the time ran out. No process that the command started is left."""
    try:
        process = subprocess.Popen(
            words, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    except OSError as error:
        log.write(f"{error}\n")
        return 127
    try:
        return process.wait(timeout=max(seconds, 0))
    except subprocess.TimeoutExpired:
        return STOPPED
    finally:
        kill_group(process)


def kill_group(process: subprocess.Popen) -> None:
    """Ends the command's process group: two seconds to clean up, then by force."""
    for number, patience in ((signal.SIGTERM, 2.0), (signal.SIGKILL, 2.0)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        if process.poll() is None:
            try:
                process.wait(patience)
            except subprocess.TimeoutExpired:
                continue


def run_stage(stage: Stage, folder: Path, seconds: float, rehearsal: bool) -> dict[str, Any]:
    """Runs the commands of a stage for at most `seconds` together; its output is in `folder`/log.txt."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    started, statuses, summaries = time.monotonic(), [], []
    values = substitutions(folder, rehearsal)
    for template in stage.commands:
        command = template.format(**values)
        with (folder / "log.txt").open("a") as log:
            log.write(f"$ {command}\n")
            log.flush()
            left = seconds - (time.monotonic() - started)
            statuses.append(run_command(shlex.split(command), log, environment, left))
        output = (folder / "log.txt").read_text(errors="replace").rpartition(f"$ {command}\n")[2]
        lines = [line for line in output.splitlines() if line.strip()] or ["no output"]
        summary = lines[-1]
        if "{pytest}" in template:  # compute-sanitizer prints its summary after pytest's
            summary = next((line for line in reversed(lines) if SUMMARY_OF_TESTS.search(line)), summary)
        summaries.append(summary.strip("= ")[:TAIL_WIDTH])
        if "{pytest}" in template and statuses[-1] in (0, 5):
            statuses[-1] = _status_of_tests(summary, rehearsal)
    failed = next((status for status in statuses if status), 0)
    return {
        "status": {0: "passed", STOPPED: f"stopped after {seconds:.0f} s"}.get(failed, f"failed with status {failed}"),
        "seconds": round(time.monotonic() - started, 1),
        "summary": "; ".join(summaries),
    }


def _status_of_tests(summary: str, rehearsal: bool) -> int:
    """A run of pytest without a failure counts where a test passed; on a CPU also where it skipped what needs a GPU."""
    ran = re.search(r"\d+ passed", summary) or (rehearsal and re.search(r"\d+ skipped", summary))
    return 0 if ran else 5


def pack(folder: Path, archive: Path | None) -> None:
    """Everything in `folder` as one file, replaced at once."""
    if archive is None:
        return
    temporary = archive.with_name(archive.name + ".tmp")
    with tarfile.open(temporary, "w:gz") as file:
        file.add(folder, arcname="results")
    temporary.replace(archive)


def read_state(output: Path, rehearsal: bool) -> dict[str, Any]:
    path = output / STATE
    state = json.loads(path.read_text()) if path.exists() else {"rehearsal": rehearsal, "stages": {}}
    if state["rehearsal"] != rehearsal:
        kinds = {True: "a rehearsal on a CPU", False: "a run on a GPU"}
        raise SystemExit(f"{path} is of {kinds[state['rehearsal']]}, this is {kinds[rehearsal]}: give another --output")
    return state


def run_stages(
    stages: Sequence[Stage], output: Path, archive: Path | None, seconds: float, again: Sequence[str], rehearsal: bool
) -> dict[str, dict[str, Any]]:
    """Runs what fits into `seconds` and is not finished; returns what became of each stage in this call."""
    deadline = time.monotonic() + seconds
    output.mkdir(parents=True, exist_ok=True)
    state, outcomes = read_state(output, rehearsal), {}
    for stage in stages:
        left = deadline - time.monotonic() - PACKING_SECONDS
        earlier = state["stages"].get(stage.name, {"status": None})
        if earlier["status"] == "passed" and stage.name not in again:
            outcome = {"status": "finished earlier"}
        elif lacking := missing(stage, rehearsal):
            outcome = {"status": f"skipped: {', '.join(lacking)} missing"}
        elif not rehearsal and left < stage.expected_s:
            outcome = {"status": f"skipped: takes about {stage.expected_s} s, {max(left, 0):.0f} s are left"}
        else:
            limit = REHEARSAL_SECONDS if rehearsal else stage.limit_s
            try:
                outcome = run_stage(stage, output / stage.name, min(limit, left), rehearsal)
            except BaseException:  # stopped from outside: what there is comes back all the same
                pack(output, archive)
                raise
        if earlier["status"] != "passed" or "seconds" in outcome:  # a pass is not forgotten
            state["stages"][stage.name] = outcome
        outcomes[stage.name] = outcome
        write_json(output / STATE, state)
        pack(output, archive)
        report(stage.name, outcome, output / stage.name / "log.txt")
    return outcomes


def report(name: str, outcome: dict[str, Any], log: Path) -> None:
    took = f" in {outcome['seconds']} s ({outcome['summary']})" if "seconds" in outcome else ""
    print(f"{name}: {outcome['status']}{took}", flush=True)
    if "seconds" in outcome and outcome["status"] != "passed":
        lines = log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        print("\n".join(f"    {line[:TAIL_WIDTH]}" for line in lines), flush=True)


def write_json(path: Path, content: Any) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


def collect(output: Path, target: Path) -> list[Path]:
    """Result files of all stages into `target`; rows that several stages measured for one file are put together.

    Raises:
        SystemExit: rows of one file come from different commits or machines.
    """
    contents: dict[str, dict[str, Any]] = {}
    for name, outcome in (
        json.loads((output / STATE).read_text())["stages"].items() if (output / STATE).exists() else ()
    ):
        if outcome["status"] != "passed":
            print(f"stage {name} {outcome['status']}: its rows may be incomplete")
    for stage in STAGES:
        for path in sorted((output / stage.name).glob("*.json")):
            content = json.loads(path.read_text())
            if path.name not in contents or "rows" not in content:
                contents[path.name] = content
                continue
            first = contents[path.name]
            for field in ("device", "driver", "torch", "commit"):
                if first["provenance"][field] != content["provenance"][field]:
                    raise SystemExit(
                        f"{path}: {field} is {content['provenance'][field]}, of the rows of earlier stages "
                        f"{first['provenance'][field]}: repeat those stages (--again) or remove their folders"
                    )
            first["rows"] += content["rows"]
    for name, content in contents.items():
        write_json(target / name, content)
    return [target / name for name in contents]


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="time for this call")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "gpu_wheels/results", help="a folder for each stage, state"
    )
    parser.add_argument("--archive", type=Path, help="file to pack the output folder into after every stage")
    parser.add_argument("--stages", nargs="+", choices=names, default=names, metavar="STAGE", help=", ".join(names))
    parser.add_argument("--again", nargs="+", choices=names, default=[], metavar="STAGE", help="repeat finished stages")
    parser.add_argument("--rehearse", action="store_true", help="start every command in small on a CPU")
    parser.add_argument("--collect", type=Path, metavar="DIR", help="only copy results into benchmarks/results")
    return parser.parse_args(words)


def main() -> int:
    options = parse()
    if options.collect:
        read_state(options.collect.resolve(), rehearsal=False)  # a rehearsal's figures are no results
        print("\n".join(map(str, collect(options.collect.resolve(), ROOT / "benchmarks/results"))))
        return 0
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    stages = [stage for stage in STAGES if stage.name in options.stages]
    archive = options.archive.resolve() if options.archive else None
    seconds = float("inf") if options.rehearse else 60 * options.minutes
    outcomes = run_stages(stages, options.output.resolve(), archive, seconds, options.again, options.rehearse)
    return int(any("seconds" in outcome and outcome["status"] != "passed" for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
