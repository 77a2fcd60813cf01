"""`python -m experiments.fading`: does what captions never mention fade in a decoder, and does alignment keep it?

First the gate: a small point branch is trained until its tokens hold set B; if they do not, the study cannot test
anything and says so. Then the grid of arms and seeds that `experiments/fading/grid.py` fixes in advance. Finished cells
are files and not repeated: the same command continues where it was stopped, and the same command in several processes
shares the cells among them.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.fading import conclusion, figure, gate
from experiments.fading.cell import run_cell
from experiments.fading.grid import FIRST, LONGER, STUDIES, Study
from experiments.fading.summary import Cells, cell_file, read_cells, summarise, words_right
from pointalign import storage
from pointalign.allocator import keep_freed_memory
from pointalign.evaluation.results import versions

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
GATE_SIZES = (25_600, 4096, 15)
SEEDS = 5
EXPECTED = 45  # seconds of a cell on a CPU core, until the first one is measured
CANNOT_TEST = 3  # exit status


def run(study: Study, folder: Path, gate_folder: Path, seeds: int, gate_sizes: tuple[int, int, int]) -> int:
    """The gate, the missing cells, the report. Returns an exit status.

    Args:
        folder: of the cells.
        gate_folder: of the gate and its tokens, which the studies share.
    """
    sizes, cells = study.sizes, study.plan(seeds)
    with storage.lock(gate_folder / "gate.lock"):
        point_model, train, held_out, passed = gate.prepare(gate_folder, *gate_sizes)
        check_definition(folder, {"sizes": asdict(sizes), "gate": passed["sizes"]})
    print("gate, read from the Q-Former tokens of held-out things:")
    print("  " + ", ".join(f"{name} {value:.3f}" for name, value in passed["read"].items()))
    if problems := gate.failures(passed["read"]):
        print(f"cannot test: the tokens do not hold {'; '.join(problems)}")
        return CANNOT_TEST
    missing = [(arm, seed) for arm, seed in cells if not cell_file(folder, arm, seed).exists()]
    print(f"{len(missing)} of {len(cells)} cells to run", flush=True)
    environment = versions()  # of the code that runs, whatever is committed since
    times: list[float] = []
    for number, (arm, seed) in enumerate(missing):
        path = cell_file(folder, arm, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        with storage.lock(path.with_suffix(".lock"), wait=False) as locked:
            if not locked or path.exists():  # another process makes this cell, or has made it
                continue
            began = time.monotonic()
            result = run_cell(point_model, arm, seed, train, held_out, sizes)
            times.append(time.monotonic() - began)
            result |= {"seconds": times[-1], "versions": environment}
            storage.write_json(path, result)
        left = (len(missing) - number - 1) * float(np.mean(times)) / 60
        print(f"{number + 1}/{len(missing)} {arm}, seed {seed}: few-shot {100 * words_right(result).mean():.1f} %, "
              f"{times[-1]:.0f} s, about {left:.0f} min left", flush=True)  # fmt: skip
    return report(study, folder, gate_folder, seeds)


def check_definition(folder: Path, definition: dict[str, Any]) -> None:
    """Refuse to mix cells of different sizes in a folder. Raises: ValueError: the folder holds others."""
    definition = json.loads(json.dumps(definition))
    path = folder / "definition.json"
    if path.exists() and (known := storage.read_json(path)) != definition:
        changed = [key for key in definition if known.get(key) != definition[key]]
        raise ValueError(
            f"{folder} holds cells of another study ({', '.join(changed)} differ): choose another --output"
        )
    storage.write_json(path, definition)


def report(study: Study, folder: Path, gate_folder: Path, seeds: int) -> int:
    """Write `<folder>.json` and `<folder>.png` from the finished cells."""
    cells = read_cells(folder, seeds)
    content = {"answer": "", **summarise(cells)}
    content |= {
        "gate": storage.read_json(gate_folder / gate.GATE_FILE),
        "definition": storage.read_json(folder / "definition.json"),
        "versions": merged_versions(cells),
        "missing": [f"{arm}, seed {seed}" for arm, seed in study.plan(seeds) if seed not in cells.get(arm, {})],
    }
    content["answer"] = conclusion.verdict(content)
    result = folder.with_suffix(".json")
    storage.write_json(result, content)
    figure.draw(content, folder.with_suffix(".png"))
    print("\n\n".join(["", *conclusion.paragraphs(content)]))
    print(f"\nwritten: {result}, {folder.with_suffix('.png')}; {len(content['missing'])} cells are missing")
    return 0


def merged_versions(cells: dict[str, Cells]) -> dict[str, str]:
    """Software, device and date of the cells, with every value that occurs."""
    each = [cell["versions"] for results in cells.values() for cell in results.values()]
    return {key: ", ".join(sorted({str(versions[key]) for versions in each})) for key in each[0]}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.fading", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=SEEDS, help="paired seeds of every arm (default: %(default)s)")
    parser.add_argument(
        "--study", choices=STUDIES, default=LONGER, help="see experiments/fading/grid.py (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="folder of cells and gate (default: benchmarks/results/<study>)")
    parser.add_argument("--report", action="store_true", help="only write the result of the finished cells")
    options = parser.parse_args(arguments)
    keep_freed_memory()
    torch.set_num_threads(1)  # a cell is too small for more; several processes share the grid instead
    study = STUDIES[options.study]
    folder, gate_folder = options.output or RESULTS / options.study, options.output or RESULTS / FIRST
    cells = len(study.plan(options.seeds))
    minutes = cells * EXPECTED / 60
    print(f"{cells} cells in {len(study.tiers)} tiers, about {minutes:.0f} minutes on a core if none is done")
    try:
        if options.report:
            return report(study, folder, gate_folder, options.seeds)
        return run(study, folder, gate_folder, options.seeds, GATE_SIZES)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command continues where it stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
