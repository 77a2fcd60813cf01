"""A stage file that is read to answer: its adapters are folded into the weights, without peft."""

import json
from dataclasses import asdict

import pytest
import torch
from made_programs import run_program
from safetensors import safe_open
from safetensors.torch import load_file
from test_stages import options, shaken

from pointalign import build, stage_file, storage
from pointalign.model_options import DataOptions

LAYER = "model.language_model.model.layers.0.mlp.up_proj."


@pytest.fixture
def adapted_stage(lively_llm, tmp_path):
    """A stage file with adapters on both parts, and the options that it was trained with."""
    trained = options(lively_llm, lora_alpha=3, qformer_lora_rank=2)
    model, _ = build.build_model(trained, DataOptions(num_points=256))
    path = tmp_path / stage_file.STAGE_FILE
    description = {"model": asdict(trained), "data": asdict(DataOptions(num_points=256))}
    stage_file.save_stage(shaken(model), path, description)
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_are_folded_in_as_peft_merges_them(dtype, adapted_stage):
    trained, data = stage_file.trained_options(adapted_stage)
    trained.dtype = dtype
    folded, _ = build.build_model(trained, data, merged=True)
    merged, _ = build.build_model(trained, data)
    unmerged = {name.replace(".base_layer.", "."): tensor.clone() for name, tensor in merged.state_dict().items()}
    build.merge_adapters(merged)
    found, expected = folded.state_dict(), merged.state_dict()
    assert folded.config.adapters is None and found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    changed = [name for name in expected if not torch.equal(expected[name], unmerged[name])]
    assert len(changed) == sum(".lora_A." in name for name in load_file(adapted_stage)) > 28


def test_a_model_is_loaded_to_answer_without_peft_trainer_and_drawing(adapted_stage):
    """Importing peft and the Trainer's options takes seconds, and the point branch comes from the file."""
    code = (
        "import sys, torch\n"
        "from pointalign import build, conversation\n"
        "drawn = []\n"
        "draw = lambda tensor, *_, **__: None if tensor.is_meta else drawn.append(tensor.shape)\n"
        "torch.nn.init.kaiming_uniform_ = torch.nn.init.normal_ = draw\n"
        f"build.load({str(adapted_stage)!r}, device='cpu')\n"
        "heavy = ('peft', 'bitsandbytes', 'transformers.trainer', 'transformers.training_args', 'jsonargparse',\n"
        "         'gradio', 'trimesh', 'matplotlib', 'pointalign.options')\n"
        "print(len(drawn), [name for name in heavy if name in sys.modules])\n"
        "import pointalign.options\n"
        "print('peft' in sys.modules)\n"
    )
    done = run_program(code)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert lines[-2:] == ["0 []", "True"], "the second line shows that this test can fail"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop(LAYER + "lora_A.default.weight"), "missing .*up_proj.lora_A"),
        (lambda state: state.update({LAYER + "lora_C.default.weight": torch.ones(2)}), "unexpected .*lora_C"),
        (lambda state: state.update({LAYER + "lora_B.default.weight": torch.ones(2, 4)}), "another shape .*up_proj"),
        (lambda state: state.pop("model.query_tokens"), "missing model.query_tokens"),
    ],
)
def test_a_stage_that_does_not_fit_is_not_folded_in(change, message, adapted_stage):
    state = load_file(adapted_stage)
    with safe_open(adapted_stage, framework="pt") as file:
        header = file.metadata()
    change(state)
    storage.write_tensors(adapted_stage, state, header)
    with pytest.raises(ValueError, match=f"stage.safetensors.*(\n.*)*{message}"):
        build.load(adapted_stage)


def test_a_stage_of_another_strength_is_not_folded_in(adapted_stage):
    description = json.loads(adapted_stage.with_suffix(".json").read_text())
    description["model"]["lora_alpha"] = 5
    adapted_stage.with_suffix(".json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="trained with lora_alpha=3 on the language_model, this model has 5"):
        build.load(adapted_stage)
