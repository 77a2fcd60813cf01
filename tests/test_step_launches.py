"""benchmarks/step_launches.py: the launches of a decoder layer's training step stay within a written budget."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import step_launches

LAYER, STEP = 111, 3720  # launches of row "e: everything", of a layer and of Phi-2's 32; see docs/performance.md


def test_a_layer_stays_within_its_launches(tmp_path, monkeypatch):
    output = tmp_path / "launches.json"
    monkeypatch.setattr(sys, "argv", ["step_launches.py", "--output", str(output)])
    step_launches.main()
    rows = {row["name"].partition(":")[0]: row for row in json.loads(output.read_text())["rows"]}
    assert rows["e"]["layer"] <= LAYER and rows["e"]["step"] <= STEP
    assert rows["e"]["layer"] < rows["d10"]["layer"] < rows["b3"]["layer"]  # what the parts are for
    assert rows["e"]["operators"].get("_to_copy", 0) <= 4  # adapters are not cast one by one
