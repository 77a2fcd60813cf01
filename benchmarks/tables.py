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
