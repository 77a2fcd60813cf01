"""Everything that needs a GPU, in one run: build, tests, sanitizer, benchmarks, training, experiments.

    python benchmarks/gpu_suite.py [--stages build,tests,sanitizer,parity,benchmarks,scratch,experiments,folds]
                                   [--output DIR]

Each stage writes DIR/<stage>.log while it runs and its line of DIR/gpu_suite.json when it ends, so a run that is cut
off keeps what it had; a stage that fails does not stop the next. POINTALIGN_COMMIT names the commit where git
is absent.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTEST = f"{sys.executable} -m pytest -q -p no:cacheprovider"
# every tensor an allocation of its own, or reads past its end would land in the allocator's pool
SANITIZER = "env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1"
# small cases: the sanitizer is slow
SANITIZED = (
    "tests/test_alignment_kernels.py -k several_layers",
    "tests/test_point_ops.py -k 'cuda and (lengths or batches or bad_input or every_sample)'",
)

# (stage, commands); {output} is the folder of the results
STAGES: list[tuple[str, list[str]]] = [
    ("build", [f"{sys.executable} -m pip install --no-build-isolation --no-deps --quiet -e ."]),
    ("tests", [f"{PYTEST} -n 8 tests/test_alignment_kernels.py tests/test_lean_cuda.py tests/test_point_ops.py"]),
    (
        "sanitizer",
        [f"{SANITIZER} --tool {tool} {PYTEST} {cases}" for tool in ("memcheck", "racecheck") for cases in SANITIZED],
    ),
    ("parity", [f"{sys.executable} benchmarks/parity.py --output {{output}}"]),
    ("benchmarks", [f"{PYTEST} benchmarks --benchmark-only --results {{output}}"]),
    # needs the embedded assets, see pointalign.assets
    ("scratch", [f"{sys.executable} -m pointalign.train scratch --training.output_dir {{output}}/scratch"]),
    ("experiments", [f"{sys.executable} -m experiments.ablation full --output {{output}}/ablation_full"]),
    ("folds", [f"{sys.executable} -m experiments.folds --seeds 3 --output {{output}}/ablation_folds"]),
]


def run_stage(name: str, commands: list[str], output: Path) -> dict:
    """Runs a stage's commands up to the first that fails."""
    environment = {**os.environ, "POINTALIGN_BUILD": "cuda", "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    started, status = time.monotonic(), 0
    with (output / f"{name}.log").open("w") as log:
        for command in commands:
            log.write(f"$ {command}\n")
            log.flush()
            words = [word.format(output=output) for word in shlex.split(command)]
            try:
                status = subprocess.run(words, cwd=ROOT, env=environment, stdout=log, stderr=log).returncode
            except FileNotFoundError as error:
                log.write(f"{error}\n")
                status = 127
            if status:
                break
    return {"stage": name, "status": status, "seconds": round(time.monotonic() - started, 1)}


def main() -> int:
    names = [name for name, _ in STAGES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default=",".join(names), help="comma-separated, run in the order of the list")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    options = parser.parse_args()
    wanted = options.stages.split(",")
    if unknown := set(wanted) - set(names):
        parser.error(f"unknown stages {sorted(unknown)}: expected some of {', '.join(names)}")
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    finished = []
    for name, commands in STAGES:
        if name in wanted:
            finished.append(run_stage(name, commands, output))
            (output / "gpu_suite.json").write_text(json.dumps(finished, indent=1) + "\n")
            print(
                f"{name}: {'ok' if finished[-1]['status'] == 0 else 'FAILED'} in {finished[-1]['seconds']} s",
                flush=True,
            )
    return int(any(stage["status"] for stage in finished))


if __name__ == "__main__":
    sys.exit(main())
