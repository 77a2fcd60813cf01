"""`--fused` changes how the loss is computed and nothing else: many steps through the real command line, side by side.

The kernels run in Triton's interpreter, in fp32, in a process of their own: TRITON_INTERPRET must be set before Triton
is imported.
"""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
from made_programs import run_program

STEPS = 50 if "POINTALIGN_LONG_TESTS" in os.environ else 20
LEARNING_RATE = 0.05 / STEPS  # as far from the start, however many steps
TOLERANCE = 2e-5 * STEPS  # of every logged loss: each update feeds rounding differences back

SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import conftest, test_train, torch
from transformers import AutoModelForCausalLM
from pointalign import train
from pointalign.models import configuration

torch.set_num_threads(1)
configuration.PRESETS["mini"] = test_train.TINY
folder = {folder!r}
torch.manual_seed(0)
AutoModelForCausalLM.from_config(conftest.tiny_text_config("llama")).save_pretrained(folder + "/llm")
conftest.tokenizer.__wrapped__().save_pretrained(folder + "/llm")
start = str(conftest.first_stage(folder + "/llm", Path(folder) / "start.safetensors"))
common = [
    "--model.llm", folder + "/llm", "--model.checkpoint", start, "--model.train", "[modality_projector,lora]",
    "--model.lora_dropout", "0", "--model.dtype", "float32", "--alignment.weight", "1.0", "--data.evaluate", "none",
    "--data.annotations", {annotations!r}, "--data.clouds", {clouds!r}, "--data.num_points", "128",
    "--data.mixture", "[]", "--data.views", "0",
    "--training.max_steps", "{steps}", "--training.logging_steps", "1", "--training.report_to", "none",
    "--training.per_device_train_batch_size", "2", "--training.learning_rate", "{learning_rate}",
    "--training.use_cpu", "true", "--training.disable_tqdm", "true", "--training.save_strategy", "steps",
    "--training.save_steps", "{steps}",
]
for name, extra in (("plain", []), ("fused", ["--fused"])):
    assert train.main(["demo", *common, "--training.output_dir", folder + "/" + name, *extra]) == 0
"""


def losses(run: Path) -> dict[str, np.ndarray]:
    history = json.loads((run / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]
    return {key: np.array([entry[key] for entry in history if key in entry]) for key in ("ntp_loss", "alignment_loss")}


def test_fused_steps_follow_the_reference(tmp_path):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    clouds = Path(__file__).parent / "clouds"
    script = SCRIPT.format(
        tests=str(Path(__file__).parent),
        folder=str(tmp_path),
        annotations=str(clouds / "annotations.json"),
        clouds=str(clouds),
        steps=STEPS,
        learning_rate=LEARNING_RATE,
    )
    done = run_program(script, interpreted=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "--fused: no fused" not in done.stdout  # it ran the kernels
    plain, fused = losses(tmp_path / "plain"), losses(tmp_path / "fused")
    for key in plain:
        assert len(plain[key]) == STEPS
        np.testing.assert_allclose(fused[key], plain[key], rtol=0, atol=TOLERANCE, err_msg=key)
    assert not np.array_equal(fused["alignment_loss"], plain["alignment_loss"])  # another implementation did run
    assert plain["alignment_loss"][-5:].mean() < plain["alignment_loss"][:5].mean() - 0.1
