"""`pointalign check`: clouds, and the annotations that refer to them, before training.

pointalign check ANNOTATIONS --clouds FOLDER     every cloud that an annotation file refers to
pointalign check FILE_OR_FOLDER [...]            cloud and mesh files by themselves, with a summary

With `--json FILE` every cloud is read in full, and the summary is written too.
"""

import argparse
import json
import sys
from pathlib import Path

from pointalign import command_line


def main(arguments: list[str] | None = None) -> int:
    parser = command_line.Parser("check", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="an annotation file (with --clouds), or cloud files and folders"
    )
    what = parser.add_argument_group("What is checked")
    what.add_argument(
        "--clouds", nargs="+", metavar="DIR", help="folders with {object_id}_8192.npy or other files per object"
    )
    what.add_argument("--types", nargs="+", metavar="TYPE", help="conversation types to keep (default: all)")
    what.add_argument(
        "--num_groups", type=int, default=512, metavar="N",
        help="least number of points: 512 for the published point encoder, 64 for the shipped one (default: 512)",
    )  # fmt: skip
    what.add_argument("--json", type=Path, metavar="FILE", help="write counts, ranges, duplicates and bad files")
    reading = parser.add_argument_group("How files are read, as --data.* of a training")
    reading.add_argument(
        "--up_axis", default="y", metavar="AXIS", help="vertical axis of the clouds: x y z -x -y -z (default: y)"
    )
    reading.add_argument(
        "--missing_color", default="black", metavar="COLOUR",
        help="of points without a colour: black, grey or white (default: black)",
    )  # fmt: skip
    reading.add_argument(
        "--max_nonfinite", type=float, default=0.05, metavar="X",
        help="share of NaN points that is left out, from 0 to below 1 (default: 0.05)",
    )  # fmt: skip
    reading.add_argument(
        "--parts", default="points", metavar="PARTS",
        help="of files with points and surfaces: points, mesh or all (default: points)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.clouds is None and Path(options.paths[0]).suffix.lower() in (".json", ".jsonl"):
        parser.error("an annotation file needs --clouds, the folder of its clouds")
    if options.clouds is not None and len(options.paths) > 1:
        parser.error("--clouds goes with one annotation file")
    return command_line.run(lambda: check(options))


def check(options: argparse.Namespace) -> int:
    """Returns the exit status: 1 where a file or an annotation cannot be used."""
    from pointalign.data import check as checks
    from pointalign.data.dataset import ConversationDataset
    from pointalign.data.point_cloud import Reading
    from pointalign.data.reading_pool import Job, read_all
    from pointalign.data.survey import Survey

    def report(survey: Survey) -> int:
        print(f"\n{survey.table()}")
        if options.json is not None:
            options.json.write_text(json.dumps(survey.summary(), indent=1) + "\n", encoding="utf-8")
            print(f"written: {options.json}")
        return int(not survey.usable)

    further = {name: getattr(options, name) for name in ("missing_color", "max_nonfinite", "parts")}
    if options.clouds is None:
        files = [Path(path) for path in options.paths]
        return report(checks.check_files(files, Reading(options.up_axis, **further), options.num_groups))
    dataset = ConversationDataset(options.paths[0], options.clouds, options.types, options.up_axis, **further)
    if options.json is not None:
        objects = sorted({name for ids in dataset.conversations.object_ids for name in ids})
        jobs = [Job(name, dataset.clouds, details=True) for name in objects]
        return report(Survey(read_all(jobs, dataset.reading), options.num_groups))
    print(f"{len(dataset)} conversations; {checks.check(dataset, options.num_groups)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
