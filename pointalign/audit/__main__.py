"""`pointalign audit [MODEL]`: a grounding certificate: does the model look at the cloud, or guess from the question?

pointalign audit                                     the newest model of make train, else the shipped one
pointalign audit runs/finetune --output runs/audit-finetune
pointalign audit RunsenXu/PointLLM_7B_v1.2 --adapter pointllm
pointalign audit anything --adapter my_model.py      any model, behind three functions

The same questions are asked about the object's cloud, another object's, one of zeros and none; about clouds that are
turned, thinned, noisy and lit otherwise; about clouds of which one factor was edited, so that one answer must flip; and
about noise. A stopped audit goes on with the same command.
"""

import os
import sys
from pathlib import Path

from pointalign import command_line

ROOM = command_line.PACKAGE / "audit"


def main(arguments: list[str] | None = None) -> int:
    options = command_line.options_of(ROOM / "run.py", "AuditOptions")
    parser = command_line.Parser("audit", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("model", nargs="?", help="a run's folder, a model's folder, a stage file, a shipped checkpoint")
    for option in options:
        text = option.text.rstrip(".").replace("%", "%%")
        if option.kind == "bool":
            parser.add_argument(f"--{option.name}", action="store_true", help=text)
        else:
            kind = int if option.kind == "int" else str
            parser.add_argument(
                f"--{option.name}", type=kind, default=kind(option.default), help=f"{text} (default: {option.default})"
            )
    built = parser.parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    values = {option.name: getattr(built, option.name) for option in options}
    return command_line.run(lambda: run(built.model, values), "stopped; the same command goes on")


def run(model: str | None, values: dict) -> None:
    from pointalign.audit.run import REPORT, RESULT, AuditOptions, audit
    from pointalign.audit.summary import summary

    options = AuditOptions(**values)
    result = audit(model, options)
    print(summary(result))
    print(f"\nwritten: {Path(options.output) / RESULT}, {Path(options.output) / REPORT}")


if __name__ == "__main__":
    sys.exit(main())
