"""`pointalign probe [MODEL]`: what can be read about a cloud from each layer; also `pointalign evaluate probe`."""

import sys

from pointalign import evaluate


def main(arguments: list[str] | None = None) -> int:
    return evaluate.main(["probe", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
