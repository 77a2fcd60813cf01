"""`pointalign compare OURS THEIRS`: paired differences of two evaluations; also `pointalign evaluate compare`."""

import sys

from pointalign import evaluate


def main(arguments: list[str] | None = None) -> int:
    return evaluate.main(["compare", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
