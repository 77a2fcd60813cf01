"""Markdown tables and the line that says where a result comes from, for the sections of benchmarks/report.py."""

from pointalign.evaluation import markdown_table


def table(header: list[str], rows: list[list[str]]) -> str:
    return markdown_table(header, rows) + "\n"


def stamp(provenance: dict) -> str:
    """Device, versions, commit, date; the load of the machine where the file has it."""
    versions = ", ".join(f"{name} {provenance[name]}" for name in ("driver", "torch", "triton") if provenance[name])
    changed = " with uncommitted changes" if provenance["uncommitted_changes"] else ""
    load = "" if provenance.get("load_average") is None else f"; load average {provenance['load_average']:.1f}"
    rehearsal = " A rehearsal at small sizes, not a measurement." if provenance.get("rehearsal") else ""
    device = provenance["device"]
    if not provenance["driver"] and provenance.get("cpu_capability"):
        device += f", {provenance['cpu_capability']}"
    where = f"{device}; {versions}; commit {provenance['commit']}{changed}, {provenance['date']}{load}."
    return where + rehearsal


def stamp_of_run(run: dict, date: str | None) -> str:
    """Device, versions, commit and date of a training run, from the description that it left."""
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    changed = " with uncommitted changes" if run.get("uncommitted_changes") else ""
    return f"{run['device']}; {versions}; commit {run['commit']}{changed}, {date or 'date not recorded'}."


def percent(estimate: dict, sign: str = "") -> str:
    """Mean and interval of a share, in percent."""
    mean, low, high = (f"{100 * estimate[key]:{sign}.1f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def difference(test: dict) -> str:
    """A paired difference of two shares, in points, with its p-value."""
    return f"{percent(test, '+')} points, p = {test['p']:.4f}"
