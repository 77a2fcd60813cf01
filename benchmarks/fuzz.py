"""Change files of every format at random and read them: the reader returns, or raises its documented error.

    python benchmarks/fuzz.py [--executions 5000] [--seed 0]      writes benchmarks/results/fuzz.json

An input that raises something else is stored in tests/corpus/, which the tests read.
"""

import argparse
import hashlib
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
import fuzz_readers  # noqa: E402  # type: ignore[import]

from pointalign import storage  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "fuzz.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--executions", type=int, default=5000, help="of every reader; slow ones get a share of it")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    rows = []
    for name, reader in fuzz_readers.READERS.items():
        start = time.process_time()
        with tempfile.TemporaryDirectory() as place:
            done, wrong = fuzz_readers.executions(reader, Path(place), asked.executions, asked.seed)
        kinds: dict[str, int] = {}
        for file, data, error in wrong:
            kinds[type(error).__name__] = kinds.get(type(error).__name__, 0) + 1
            stored = fuzz_readers.CORPUS / name / f"{hashlib.sha256(data).hexdigest()[:8]}-{file.name}"
            stored.parent.mkdir(parents=True, exist_ok=True)
            stored.write_bytes(data)
        seconds = round(time.process_time() - start, 1)
        rows.append({"reader": name, "executions": done, "undocumented": kinds, "cpu_seconds": seconds})
        print(rows[-1], flush=True)
    result = {"seed": asked.seed, "rows": rows, "provenance": storage.provenance(torch.device("cpu"))}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
