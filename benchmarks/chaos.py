"""Kill training runs again and again, some while they save, and compare how they end with runs that nothing ended.

    python benchmarks/chaos.py [--kills 50] [--while_saving 10]      writes benchmarks/results/chaos.json

A killed run is started again with the same command and `--training.resume_from_checkpoint auto`, until it ends. Every
run has its own seed; the learning rate is constant. SIGKILL leaves a process no time for anything.
"""

import argparse
import json
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import tiny_run
import torch
from safetensors.torch import load_file

from pointalign import run_checkpoints, storage
from pointalign.trainer import PointAlignTrainer

RESULTS = Path(__file__).parent / "results" / "chaos.json"
STEPS = 40
SAVE_STEPS = 3
KILLS_OF_A_RUN = 10


def tell_steps(pipe: int) -> None:
    """Write a byte into a pipe at every step of this process."""
    compute = PointAlignTrainer.training_step

    def training_step(self, *arguments, **options):
        os.write(pipe, b".")
        return compute(self, *arguments, **options)

    PointAlignTrainer.training_step = training_step  # type: ignore[method-assign]


def start_and_kill(arguments: list[str], folder: Path, log: Path, draw: random.Random, saving: bool) -> str:
    """Start a run and kill it after some steps, or in the middle of a checkpoint; returns how it ended."""
    reading, writing = os.pipe()
    child = tiny_run.run(arguments, log, lambda: tell_steps(writing))
    os.close(writing)
    unfinished = folder / run_checkpoints.UNFINISHED
    steps, wanted = 0, draw.randrange(1, 2 * SAVE_STEPS)
    while steps < wanted and os.read(reading, 1):
        steps += 1
    if steps == wanted and saving:
        os.set_blocking(reading, False)
        while not unfinished.exists() and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.0005)
    time.sleep(draw.uniform(0, 0.004 if saving else 0.1))
    os.kill(child, signal.SIGKILL)
    status = tiny_run.finish(child)
    os.close(reading)
    if status == -signal.SIGKILL:
        return "killed while saving" if unfinished.exists() else "killed"
    return "ended" if status == 0 else f"failed with status {status}"


def chaos(kills: int, while_saving: int, seed: int = 0) -> dict:
    """Runs and kills until there are as many as asked for."""
    draw = random.Random(seed)
    counts = {"killed": 0, "killed while saving": 0, "ended": 0}
    runs = []
    with tempfile.TemporaryDirectory() as place:
        arguments = tiny_run.prepare(Path(place))
        arguments += ["--training.max_steps", str(STEPS), "--training.save_steps", str(SAVE_STEPS)]
        while counts["killed"] + counts["killed while saving"] < kills or counts["killed while saving"] < while_saving:
            number, log = len(runs), Path(place) / "log.txt"
            whole, folder = Path(place) / f"whole-{number}", Path(place) / f"killed-{number}"
            own = [*arguments, "--training.seed", str(number)]
            if tiny_run.finish(tiny_run.run([*own, "--training.output_dir", str(whole)], log)):
                raise RuntimeError(f"a run that nothing ended failed: {log.read_text()[-2000:]}")
            again = [*own, "--training.output_dir", str(folder), "--training.resume_from_checkpoint", "auto"]
            of_this_run = 0
            while of_this_run < KILLS_OF_A_RUN:
                outcome = start_and_kill(again, folder, log, draw, saving=of_this_run % 3 == 2)
                if outcome not in counts:
                    raise RuntimeError(f"{outcome}: {log.read_text()[-2000:]}")
                counts[outcome] += 1
                of_this_run += 1
                if outcome == "ended":
                    break
            if not (folder / "stage.safetensors").exists() and tiny_run.finish(tiny_run.run(again, log)):
                raise RuntimeError(f"a killed run could not go on: {log.read_text()[-2000:]}")
            last = f"checkpoint-{STEPS}"
            whole_state, state = (tiny_run.weights(run / last) for run in (whole, folder))
            stages = [load_file(run / "stage.safetensors") for run in (whole, folder)]
            different = [name for name in whole_state | state if whole_state.get(name) != state.get(name)]
            different += [name for name in stages[0] if not torch.equal(stages[0][name], stages[1][name])]
            runs.append({"kills": of_this_run, "bit_equal": not different})
            print(f"run {number}: {of_this_run} kills, different: {different or 'nothing'}; {counts}", flush=True)
    return {"steps": STEPS, "save_steps": SAVE_STEPS, "outcomes": counts, "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--while_saving", type=int, default=10)
    options = parser.parse_args()
    result = chaos(options.kills, options.while_saving)
    result["provenance"] = storage.provenance(torch.device("cpu"))
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    if not all(run["bit_equal"] for run in result["runs"]):
        raise SystemExit("a killed run did not end as the one that nothing ended")


if __name__ == "__main__":
    main()
