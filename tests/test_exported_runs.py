"""What a run exports beside the model: an adapter for PEFT, a card, and a folder that names the package it needs."""

import json
import os
import shutil

import pytest
import torch
from conftest import CLOUDS, tiny_text_config
from made_programs import run_program
from transformers import AutoModelForCausalLM

from pointalign import build, model_card, stage_file
from pointalign.model_options import DataOptions, ModelOptions

DESCRIBED = {
    "data": {"annotations": "private/folder/mine.json", "up_axis": "z"},
    "alignment": {"weight": 0.1, "target": "qformer"},
    "training": {"learning_rate": 5e-4, "per_device_train_batch_size": 4},
    "versions": {"python": "3.11"},
    "data_sha256": "abc",
    "commit": "def",
    "device": "CPU",
    "steps": 60,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer):
    """A run's folder: a tiny language model, its adapter with random values, and the exported model."""
    folder = tmp_path_factory.mktemp("with a space")
    llm = folder / "llm"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_text_config("llama")).save_pretrained(llm)
    tokenizer.save_pretrained(llm)
    options = ModelOptions(llm=str(llm), dtype="float32", lora_rank=4, lora_alpha=8, lora_dropout=0.0)
    model, processor = build.build_model(options, DataOptions(num_points=256, up_axis="z"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn_like(parameter) / 10)
    assert model_card.write_adapter(model, folder / "adapter", str(llm))
    build.export(model, processor, folder / "model")
    model_card.write(folder, DESCRIBED | {"model": {**options.__dict__, "checkpoint": "furniture"}}, shipped=True)
    return folder


def test_peft_loads_the_adapter_on_the_language_model(run):
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(run / "llm", dtype=torch.float32, trust_remote_code=False)
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        before = base(ids).logits
        adapted = PeftModel.from_pretrained(base, run / "adapter").eval()(ids).logits
        merged = build.load(run / "model")[0].cpu().model.language_model.float()(ids).logits
    torch.testing.assert_close(adapted, merged, atol=1e-4, rtol=1e-3)
    assert (adapted - before).abs().max() > 0.01
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"


def test_the_card_says_where_the_model_comes_from_and_what_it_is_for(run):
    for folder in ("model", "adapter"):
        card = (run / folder / "README.md").read_text()
        assert card.startswith("---\nlibrary_name: pointalign\n")
        for section in ("Training", "Training data", "Intended use and limits", "Results", "Licences"):
            assert f"\n## {section}\n" in card, section
        assert "`mine.json`" in card and "private" not in card and str(run) not in card, "no path of a user"
        assert "| vertical axis of the files | z |" in card and "CC-BY-SA" in card and "Not evaluated" in card
    (run / "accuracy.json").write_text(
        json.dumps(
            {
                "accuracy": {"model": {"noun in training": {"mean": 0.431, "low": 0.261, "high": 0.576}}},
                "objects": [1, 2],
            }
        )
    )
    model_card.write(run, DESCRIBED | {"model": {**ModelOptions().__dict__}}, shipped=False)
    (run / "accuracy.json").unlink()
    card = (run / "model" / "README.md").read_text()
    assert "| model | 43.1 | 26.1 to 57.6 |" in card and "Of 2 objects" in card and "CC-BY-SA" not in card


WITHOUT_THE_PACKAGE = """
import sys
sys.modules["pointalign"] = None  # as if it were not installed
from transformers import AutoModelForMultimodalLM, AutoProcessor
for auto in (AutoModelForMultimodalLM, AutoProcessor):
    for trust in (None, True):
        try:
            print(type(auto.from_pretrained(sys.argv[1], trust_remote_code=trust)))
        except (ValueError, ImportError) as error:
            print("refused:", str(error).partition(chr(10))[0], flush=True)
del sys.modules["pointalign"]
print(type(AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)).__name__)
import pointalign
print(type(AutoProcessor.from_pretrained(sys.argv[1])).__name__)
print(type(AutoModelForMultimodalLM.from_pretrained(sys.argv[1])).__name__)
"""


def test_without_the_package_the_folder_is_refused_by_name(run, tmp_path):
    """No plain tokenizer in the processor's place, no advice to upgrade transformers."""
    done = run_program(WITHOUT_THE_PACKAGE, str(run / "model"), HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    lines = [line.rpartition("[y/N] ")[2] for line in done.stdout.splitlines()]
    refused = [line for line in lines if line.startswith("refused: ")]
    assert len(refused) == 4, done.stdout
    for untrusted, trusted in (refused[:2], refused[2:]):
        assert "contains custom code" in untrusted and str(run / "model") in untrusted
        assert "pointalign" in trusted and "upgrade" not in trusted
    assert lines[-3:] == ["PointAlignProcessor", "PointAlignProcessor", "PointAlignForConditionalGeneration"]
    source = (run / "model" / "needs_pointalign.py").read_text()
    assert "import pointalign" in source and len(source.splitlines()) < 40


def test_a_model_that_was_exported_before_still_loads(run, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(run / "model", folder)
    (folder / "needs_pointalign.py").unlink()
    model, processor, _ = build.load(folder)
    assert processor.feature_extractor.up_axis == "z" and (CLOUDS / "annotations.json").exists()
    assert stage_file.STAGE_FILE not in os.listdir(folder) and model.config.model_type == "pointalign"
