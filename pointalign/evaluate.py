"""Ask a model held-out questions: metrics with intervals, and a report.

pointalign evaluate                                  the newest demo model, or the shipped one
pointalign evaluate MODEL --data mine.json --clouds scans/         the questions of your own file
pointalign evaluate MODEL --task captioning --data val_200_GT.json --clouds 8192_npy

Subcommands, each with --help:
  compare OURS/evaluation.json THEIRS/evaluation.json          paired differences of two evaluations
  judge ANSWERS.json --judge.model M --judge.base_url URL      judge a file of answers
  probe [MODEL]                                                what can be read about a cloud from each layer
  report FOLDER                                                write the HTML report again, from the files
"""

import os
import sys
from pathlib import Path
from typing import Any

from pointalign import command_line
from pointalign.command_line import Command, Parser, options_of

ROOM = command_line.PACKAGE / "evaluation"
STOPPED = "stopped; the same command continues where it stopped"


def main(arguments: list[str] | None = None) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in COMMANDS:
        command, arguments = COMMANDS[arguments[0]], arguments[1:]
    else:
        command = evaluate
    return command_line.run(lambda: command(arguments), STOPPED)


def evaluate(arguments: list[str]) -> None:
    usage = "[MODEL] [--task T [T ...]] [--data D --clouds C] [--generation.* ...] [--judge.* ...]"
    line = Command(
        "evaluate",
        usage,
        f"{__doc__}\nMODEL is a model's folder, a run's folder, a stage file, or the name of a shipped checkpoint.",
        [
            ("What is asked", options_of(ROOM / "results.py", "EvaluationOptions")),
            ("How answers are generated", options_of(ROOM / "answering.py", "Generation", "generation")),
            ("Who judges; nobody without --judge.model", _judge_options()),
        ],
    )
    given = line.prepare(arguments)
    parser = _parser(line)
    from pointalign import build
    from pointalign.evaluation import metrics, results
    from pointalign.evaluation.answering import Generation
    from pointalign.evaluation.judge import JudgeOptions
    from pointalign.evaluation.judge_files import judge_tasks
    from pointalign.evaluation.report import write_report

    parser.add_argument("model", nargs="?", default=None)
    parser.add_class_arguments(results.EvaluationOptions)
    parser.add_class_arguments(Generation, "generation")
    parser.add_class_arguments(JudgeOptions, "judge")
    built = parser.instantiate(parser.parse_args(given))
    options = _dataclass(results.EvaluationOptions, built)
    if built.judge.base_url is not None:
        metrics.require_packages([], judge=True)
    result = results.evaluate(built.model or build.default_model(), options, built.generation)
    print(results.table(result))
    folder = Path(options.output)
    if built.judge.model is not None:
        print(judge_tasks(folder, result, built.judge))
    print(f"\nwritten: {folder / 'evaluation.json'}, {write_report(folder)}")


def compare(arguments: list[str]) -> None:
    parser = Parser("compare", description="Paired differences of two evaluations of the same questions.")
    parser.add_argument("ours", metavar="OURS/evaluation.json")
    parser.add_argument("theirs", metavar="THEIRS/evaluation.json", help="is subtracted")
    parser.add_argument("--output", metavar="FILE", help="write the rows as JSON")
    built = parser.parse_args(arguments)
    from pointalign import storage
    from pointalign.evaluation import results

    rows = results.compare(Path(built.ours), Path(built.theirs))
    print(results.comparison_table(rows))
    if built.output:
        storage.write_json(Path(built.output), rows)


def judge(arguments: list[str]) -> None:
    kind = command_line.Option(
        "kind", "str", "caption", "object (same object?), class (ModelNet40) or caption (0 to 100)"
    )
    line = Command(
        "evaluate judge",
        "ANSWERS.json [--kind object|class|caption] --judge.model M [--judge.base_url URL]",
        "Judge a file of answers in PointLLM's format, of this program or another.",
        [("What is judged", [kind]), ("Who judges", _judge_options())],
    )
    given = line.prepare(arguments)
    parser = _parser(line)
    from pointalign.evaluation.judge import JudgeOptions
    from pointalign.evaluation.judge_files import judge_file

    parser.add_argument("answers", type=str)
    parser.add_argument("--kind", type=str, default=kind.default)
    parser.add_class_arguments(JudgeOptions, "judge")
    built = parser.instantiate(parser.parse_args(given))
    print(judge_file(Path(built.answers), built.kind, built.judge))


def probe(arguments: list[str]) -> None:
    line = Command(
        "probe",
        "[MODEL] [--output FOLDER]",
        "What linear probes read about a cloud from each layer of the language model, and how similar its point\n"
        "tokens are to the Q-Former's. Asks about the embedded objects.",
        [("Options", options_of(ROOM / "probe.py", "ProbeOptions"))],
    )
    given = line.prepare(arguments)
    parser = _parser(line)
    from pointalign.evaluation.probe import ProbeOptions, probe_model

    parser.add_argument("model", nargs="?", default=None)
    parser.add_class_arguments(ProbeOptions)
    built = parser.parse_args(given)
    print(probe_model(built.model, _dataclass(ProbeOptions, built)))


def report(arguments: list[str]) -> None:
    parser = Parser("evaluate report", description="Write the HTML report of an evaluation again, from its files.")
    parser.add_argument("folder", metavar="FOLDER")
    folder = Path(parser.parse_args(arguments).folder)
    from pointalign.evaluation.report import write_report

    print(write_report(folder))


def _judge_options() -> list[command_line.Option]:
    return options_of(ROOM / "judge.py", "JudgeOptions", "judge")


def _parser(line: Command) -> Any:
    """The parser of values; imports nothing heavy itself, the classes of options do."""
    from jsonargparse import ArgumentParser

    from pointalign.allocator import keep_freed_memory

    keep_freed_memory()
    return ArgumentParser(prog=f"pointalign {line.name}", usage=f"pointalign {line.name} --help", allow_abbrev=False)


def _dataclass(cls: type, values: Any) -> Any:
    return cls(**{name: values[name] for name in cls.__dataclass_fields__})  # type: ignore[attr-defined]


COMMANDS = {"compare": compare, "judge": judge, "probe": probe, "report": report}

if __name__ == "__main__":
    sys.exit(main())
