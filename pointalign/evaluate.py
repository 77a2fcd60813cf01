"""Ask a model held-out questions: metrics with intervals, and a report.

python -m pointalign.evaluate                                  the newest demo model, or the shipped one
python -m pointalign.evaluate MODEL --task captioning --data val_200_GT.json --clouds 8192_npy

Subcommands, each with --help:
  compare OURS/evaluation.json THEIRS/evaluation.json          paired differences of two evaluations
  judge ANSWERS.json --judge.model M --judge.base_url URL      judge a file of answers
  probe [MODEL]                                                what can be read about a cloud from each layer
  report FOLDER                                                write the HTML report again, from the files
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def main(arguments: list[str] | None = None) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from pointalign.allocator import keep_freed_memory

    keep_freed_memory()
    arguments = sys.argv[1:] if arguments is None else arguments
    command = arguments[0] if arguments and arguments[0] in COMMANDS else "evaluate"
    run = COMMANDS.get(command, evaluate)
    try:
        run(arguments[1:] if command != "evaluate" else arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command continues where it stopped", file=sys.stderr)
        return 130
    return 0


def _parser(usage: str, description: str | None = None) -> "ArgumentParser":
    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    class HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
        """Keeps the lines of the description as they are."""

    program = "python -m pointalign.evaluate"
    return ArgumentParser(
        prog=program, usage=f"{program} {usage}", description=description, formatter_class=HelpFormatter
    )


def evaluate(arguments: list[str]) -> None:
    from pointalign import build
    from pointalign.evaluation import results
    from pointalign.evaluation.answering import Generation
    from pointalign.evaluation.judge import JudgeOptions
    from pointalign.evaluation.judge_files import judge_tasks
    from pointalign.evaluation.report import write_report

    parser = _parser("[MODEL] [--task T [T ...]] [--data D] [--generation.*] [--judge.*]", __doc__)
    parser.add_argument("model", nargs="?", default=None, help="a model's folder, a run's folder, or a stage file")
    parser.add_class_arguments(results.EvaluationOptions)
    parser.add_class_arguments(Generation, "generation")
    parser.add_class_arguments(JudgeOptions, "judge")
    built = parser.instantiate(parser.parse_args(_lists(arguments, ("task", "prompts", "inputs", "sentence_models"))))
    options = results.EvaluationOptions(
        **{name: built[name] for name in results.EvaluationOptions.__dataclass_fields__}
    )
    result = results.evaluate(built.model or build.default_model(), options, built.generation)
    print(results.table(result))
    folder = Path(options.output)
    if built.judge.model is not None:
        print(judge_tasks(folder, result, built.judge))
    print(f"\nwritten: {folder / 'evaluation.json'}, {write_report(folder)}")


def compare(arguments: list[str]) -> None:
    from pointalign import storage
    from pointalign.evaluation import results

    parser = _parser("compare OURS/evaluation.json THEIRS/evaluation.json [--output FILE]")
    parser.add_argument("ours", type=str)
    parser.add_argument("theirs", type=str)
    parser.add_argument("--output", type=str, default=None, help="write the rows as JSON")
    built = parser.parse_args(arguments)
    rows = results.compare(Path(built.ours), Path(built.theirs))
    print(results.comparison_table(rows))
    if built.output:
        storage.write_json(Path(built.output), rows)


def judge(arguments: list[str]) -> None:
    from pointalign.evaluation.judge import JudgeOptions
    from pointalign.evaluation.judge_files import judge_file

    parser = _parser("judge ANSWERS.json --kind object|class|caption --judge.*")
    parser.add_argument("answers", type=str, help="a file in PointLLM's format, of this program or another")
    parser.add_argument(
        "--kind", type=str, default="caption", help="object (same object?), class (ModelNet40) or caption (0 to 100)"
    )
    parser.add_class_arguments(JudgeOptions, "judge")
    built = parser.instantiate(parser.parse_args(arguments))
    print(judge_file(Path(built.answers), built.kind, built.judge))


def probe(arguments: list[str]) -> None:
    from pointalign.evaluation.probe import ProbeOptions, probe_model

    parser = _parser("probe [MODEL] [--output FOLDER]")
    parser.add_argument("model", nargs="?", default=None)
    parser.add_class_arguments(ProbeOptions)
    built = parser.parse_args(arguments)
    options = ProbeOptions(**{name: built[name] for name in ProbeOptions.__dataclass_fields__})
    print(probe_model(built.model, options))


def report(arguments: list[str]) -> None:
    from pointalign.evaluation.report import write_report

    parser = _parser("report FOLDER")
    parser.add_argument("folder", type=str)
    print(write_report(Path(parser.parse_args(arguments).folder)))


def _lists(arguments: list[str], names: tuple[str, ...]) -> list[str]:
    """Rewrites `--task a b` as `--task=["a","b"]` for the options `names`, whose values are lists."""
    options: list[tuple[str, list | None]] = []  # argument, and its values if it is one of `names`
    for argument in arguments:
        if argument.startswith("--"):
            options.append((argument, [] if argument[2:] in names else None))
        elif options and (values := options[-1][1]) is not None:
            values.append(int(argument) if argument.isdigit() else argument)
        else:
            options.append((argument, None))
    return [name if values is None else f"{name}={json.dumps(values)}" for name, values in options]


COMMANDS = {"compare": compare, "judge": judge, "probe": probe, "report": report}

if __name__ == "__main__":
    sys.exit(main())
