"""Sections of docs/reliability.md: kills survived, resume equality, executions per reader, memory over time."""

import json
from pathlib import Path

from tables import stamp, table

RESULTS = Path(__file__).parent / "results"


def _read(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def chaos() -> str:
    """How many kills runs survived, and whether they ended as those that nothing ended."""
    content = _read("chaos")
    counts, runs = content["outcomes"], content["runs"]
    equal = sum(run["bit_equal"] for run in runs)
    rows = [
        ["SIGKILLs", str(counts["killed"] + counts["killed while saving"])],
        ["of them while a checkpoint was written", str(counts["killed while saving"])],
        ["runs", str(len(runs))],
        ["runs that ended bit-equal to the uninterrupted run", f"{equal} of {len(runs)}"],
    ]
    note = f"{content['steps']} steps, a checkpoint every {content['save_steps']}. {stamp(content['provenance'])}"
    return f"{note}\n\n{table(['`make chaos`', 'number'], rows)}"


def resume_matrix() -> str:
    """Whether a run that is resumed in the middle equals the uninterrupted one, by sets of options."""
    content = _read("resume_matrix")
    outcomes = [row["outcome"] for row in content["rows"]]
    counts = ", ".join(f"{outcomes.count(name)} {name}" for name in dict.fromkeys(outcomes))
    rows = [
        [row["name"], f"`{row['options']}`" if row["options"] else "", row["outcome"]]
        for row in content["rows"]
    ]  # fmt: skip
    reasons = [f"- {row['name']}: {row['reason']}\n" for row in content["rows"] if row.get("reason")]
    note = f"{len(outcomes)} sets of options: {counts}. {stamp(content['provenance'])}"
    return f"{note}\n\n{table(['`make resume-matrix`', 'options', 'resumed run'], rows)}\n{''.join(reasons)}"


def fuzz() -> str:
    """How many changed files each reader was given, and what it raised that is not documented."""
    content = _read("fuzz")
    rows = [
        [
            row["reader"],
            str(row["executions"]),
            ", ".join(f"{kind}: {number}" for kind, number in row["undocumented"].items()) or "none",
        ]
        for row in content["rows"]
    ]
    total = sum(row["executions"] for row in content["rows"])
    note = f"{total} executions, seed {content['seed']}. {stamp(content['provenance'])}"
    return f"{note}\n\n{table(['`make fuzz`', 'executions', 'undocumented errors'], rows)}"


def long_run() -> str:
    """Memory of the process at the start, the middle and the end of a long run."""
    content = _read("long_run")
    rows = content["rows"]
    chosen = [rows[len(rows) * part // 10] for part in range(1, 10, 2)] + rows[-1:]
    lines = [[str(row["step"]), f"{row['resident_mb']:.0f}", str(row["log_entries"])] for row in chosen]
    note = (
        f"{content['steps']} steps of a tiny model in float32, texts of another length at every step; "
        f"`trainer_state.json` has {content['trainer_state_bytes'] / 1e6:.2f} MB at the end. "
        f"{stamp(content['provenance'])}"
    )
    picture = "![Memory of the process over a long run](../benchmarks/results/long_run.png)\n"
    return f"{note}\n\n{table(['step, `make long-run`', 'memory, MB', 'logs held'], lines)}\n{picture}"
