"""Memory over a long training run of a tiny model whose batches change their shape at every step.

python benchmarks/long_run.py [--steps 5000]      writes benchmarks/results/long_run.json and long_run.png
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import matplotlib
import tiny_run
import torch

from pointalign import storage
from pointalign.data.collator import ConversationCollator
from pointalign.trainer import PointAlignTrainer

matplotlib.use("Agg")
from matplotlib import pyplot

RESULTS = Path(__file__).parent / "results"
EVERY = 50  # steps between two measurements


def measure(rows: Path) -> None:
    """Note time, memory of the process and size of its state in a file, every `EVERY` steps of this process."""
    compute, collate = PointAlignTrainer.training_step, ConversationCollator.__call__
    began = time.perf_counter()

    def training_step(self, *arguments, **options):
        step = self.state.global_step
        if step % EVERY == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            row = {"step": step, "seconds": round(time.perf_counter() - began, 1)}
            row |= {"resident_mb": pages * os.sysconf("SC_PAGE_SIZE") / 1e6, "log_entries": len(self.state.log_history)}
            with rows.open("a") as file:
                file.write(json.dumps(row) + "\n")
        return compute(self, *arguments, **options)

    drawn = torch.Generator().manual_seed(0)

    def longer(self, samples):
        """Answers of another length each time."""
        words = int(torch.randint(1, 150, (), generator=drawn))
        for sample in samples:
            sample["messages"][-1]["content"] = [{"type": "text", "text": "very " * words + "nice."}]
        return collate(self, samples)

    PointAlignTrainer.training_step = training_step  # type: ignore[method-assign]
    ConversationCollator.__call__ = longer  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as place:
        arguments, folder = tiny_run.prepare(Path(place)), Path(place) / "run"
        arguments += ["--training.max_steps", str(steps), "--training.save_steps", str(max(steps // 5, 1))]
        arguments += ["--training.output_dir", str(folder)]
        log, written = Path(place) / "log.txt", Path(place) / "rows.jsonl"
        if tiny_run.finish(tiny_run.run(arguments, log, lambda: measure(written))):
            raise SystemExit(log.read_text()[-2000:])
        rows = [json.loads(line) for line in written.read_text().splitlines()]
        state = (folder / f"checkpoint-{steps}" / "trainer_state.json").stat().st_size
    result = {"steps": steps, "trainer_state_bytes": state, "rows": rows}
    result["provenance"] = storage.provenance(torch.device("cpu"))
    (RESULTS / "long_run.json").write_text(json.dumps(result, indent=1) + "\n")
    figure, axes = pyplot.subplots(figsize=(6, 3))
    axes.plot([row["step"] for row in rows], [row["resident_mb"] for row in rows])
    axes.set(xlabel="step", ylabel="memory of the process, MB", ylim=(0, None))
    figure.savefig(RESULTS / "long_run.png", dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
