"""The published stages in miniature, by flags alone: files converted, every recipe in turn, a model that answers."""

import json

import made_published as made
import pytest
import torch
from conftest import CLOUDS, user
from safetensors.torch import load_file

from pointalign import build, evaluate, train
from pointalign.build import load
from pointalign.convert import __main__ as convert
from pointalign.data.dataset import make_datasets
from pointalign.efficient import quantization
from pointalign.model_options import DataOptions
from pointalign.options import parse

VOCABULARY = 264
DATA = ["--data.annotations", str(CLOUDS / "annotations.json"), "--data.clouds", str(CLOUDS), "--data.num_points", "64"]
SHORT = [
    "--training.max_steps=3", "--training.warmup_steps=0", "--training.learning_rate=1e-2", "--training.use_cpu=true",
    "--training.minimum_learning_rate=1e-3", "--training.logging_steps=1", "--training.report_to=none",
    "--training.disable_tqdm=true", "--training.save_strategy=no", "--model.dtype=float32",
]  # fmt: skip
MIXTURE = "[{types: [detailed_description], batch_size: 2}, {types: [single_round], batch_size: 2}]"
# recipe: what differs between its stage file and the one before, by the first words of the names
LLM_TRAINED = ("model.language_model.",)
BRIDGE = ("model.point_mlp.", "model.query_tokens", "model.qformer.", "model.modality_projector.", *LLM_TRAINED)
STAGES = {
    "stage1_mlp": ("model.point_mlp.",),
    "stage2_bridge": BRIDGE,
    "stage3_instruct": BRIDGE,
    "stage4_experts": ("model.query_experts.",),
    "align": LLM_TRAINED,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory, tokenizer):
    """Phi-2 with a tokenizer, BLIP-2, the point encoder, and the image-language model that stage 1 starts from."""
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    words = {"model.embed_tokens.weight": made.rand(VOCABULARY, made.LLM["width"], scale=1)}
    words |= made.linear(VOCABULARY, made.LLM["width"], name="lm_head")
    made.save_llm(folder / "phi", made.phi(fused=False) | words, vocab_size=VOCABULARY, max_position_embeddings=2048)
    plain = type(tokenizer)(tokenizer_object=tokenizer._tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    plain.save_pretrained(folder / "phi")
    made.save_container(folder / "blip2.pth", made.blip2())
    made.save_container(folder / "point_model.pth", made.encoder(), "base_model")
    image_language = {name: one for name, one in made.stage().items() if name.startswith("llama_")}
    made.save_container(folder / "tinygptv.pth", image_language | {"visual_encoder.cls_token": torch.zeros(1, 1, 4)})
    made.save_container(folder / "stage3.pth", made.stage())
    for checkpoint, output in (("tinygptv.pth", "converted"), ("stage3.pth", "converted-stage3")):
        arguments = ["--llm", "phi", "--qformer", "blip2.pth", "--point-encoder", "point_model.pth"]
        arguments += ["--checkpoint", checkpoint, "--output", output]
        paths = [one if one.startswith("--") else str(folder / one) for one in arguments]
        assert convert.main([*paths, "--head-size", "4", "--num-groups", "8", "--group-size", "4"]) == 0
    return folder


def run(recipe, llm, output, *flags):
    arguments = [recipe, "--model.llm", str(llm), "--training.output_dir", str(output), *DATA, *SHORT, *flags]
    assert train.main(arguments) == 0
    return load_file(output / "stage.safetensors")


def test_every_stage_starts_from_the_one_before(files, tmp_path, clouds):
    before, previous = None, []
    for recipe, trained in STAGES.items():
        flags = [] if recipe in ("stage1_mlp", "stage2_bridge") else ["--data.mixture", MIXTURE]
        flags += ["--model.query_routing", "soft"] if recipe == "stage4_experts" else []
        flags += ["--alignment.layer", "[2]"] if recipe == "align" else []
        state = run(recipe, files / "converted", tmp_path / recipe, *previous, *flags)
        previous = ["--model.checkpoint", str(tmp_path / recipe)]
        if before is not None:
            changed = {name for name in state if name not in before or not torch.equal(state[name], before[name])}
            assert all(name.startswith(trained) for name in changed), recipe
            assert all(any(name.startswith(part) for name in changed) for part in trained), recipe
        before = state
    assert json.loads((tmp_path / "align" / "stage.json").read_text())["last_log"]["alignment_loss"] > 0
    model, processor, _ = load(tmp_path / "align" / "stage.safetensors")
    assert model.config.query_routing == "soft" and model.config.num_query_experts == 8
    exported, _, _ = load(tmp_path / "align" / "model")
    batch = processor.apply_chat_template([user("What is this?", clouds[0])], tokenize=True)
    with torch.no_grad():
        scores = [one.to("cpu")(**batch).logits for one in (model, exported)]
    assert (scores[0] - scores[1]).abs().mean() < 0.02 * scores[1].std()  # a stage file rounds to bfloat16


@pytest.mark.usefixtures("random_point_branch")
def test_a_converted_folder_and_a_run_are_evaluated(files, tmp_path):
    run("align", files / "converted", tmp_path / "run", "--alignment.layer=[2]", "--data.mixture", MIXTURE)
    for model in (files / "converted", tmp_path / "run" / "stage.safetensors"):
        output = tmp_path / model.name
        asked = ["--task", "classification", "--prompts", "0", "--inputs", "true", "--limit", "2"]
        asked += ["--data", str(CLOUDS / "annotations.json"), "--clouds", str(CLOUDS), "--sentence_models", "none"]
        asked += ["--generation.max_new_tokens", "4", "--output", str(output)]
        assert evaluate.main([str(model), *asked]) == 0
        assert len(json.loads((output / "classification-prompt0.json").read_text())["results"]) == 2


@pytest.mark.usefixtures("random_point_branch")
@pytest.mark.parametrize("routing", ["sparse", "soft", "constant"])
def test_query_experts_train_under_every_routing(routing, files, tmp_path):
    flags = ["--data.mixture", MIXTURE, "--model.query_routing", routing, "--training.weight_decay=0"]
    start, _ = build.build_model(parse(["stage2_bridge", "--model.llm", str(files / "converted")]).model, DataOptions())
    queries = start.model.query_tokens.detach()[0].bfloat16()
    state = run("stage4_experts", files / "converted", tmp_path / "run", *flags)
    moved = [not torch.equal(one, queries) for one in state["model.query_experts.queries"]]
    assert all(moved) if routing != "sparse" else 0 < sum(moved) < 8
    trained = load(tmp_path / "run" / "model")[0].model.query_experts
    assert (trained.routing, trained.top_k) == (routing, 2)


def test_newer_annotations_load_by_flags(files, tmp_path, capsys):
    """Of PointLLM-V2 and PointLLM-R: the schema of PointLLM with types and fields of their own, and long reasoning."""
    objects = sorted({one["object_id"] for one in json.loads((CLOUDS / "annotations.json").read_text())})
    reasoning = "<think>\nStep 1: four legs, a flat top.\n\nStep 2: no back, so no chair.\n</think>\nA stool."

    def entry(object_id, text, **more):
        turns = [{"from": "human", "value": "<point>\nWhat is this?"}, {"from": "gpt", "value": text}]
        return {"object_id": object_id, "conversations": turns} | more

    second = [entry(one, "A stool.", conversation_type="part_description", source="made") for one in objects]
    second += [entry("6760e543e1d645d5aaacd3803bcae524", "Bad colours.", conversation_type="part_description")]
    (tmp_path / "v2.json").write_text(json.dumps(second))
    (tmp_path / "reasons.json").write_text(json.dumps([entry(one, reasoning, answer="A stool.") for one in objects]))
    newer = ["--data.annotations", str(tmp_path / "v2.json"), "--data.clouds", str(CLOUDS)]
    mixture = f"[{{batch_size: 2}}, {{annotations: {tmp_path / 'reasons.json'}, batch_size: 2}}]"
    flags = [*newer, "--data.mixture", mixture]
    run("stage3_instruct", files / "converted", tmp_path / "run", *flags)
    assert capsys.readouterr().out.count(f"{len(objects)} objects checked") == 2
    options = parse(["stage3_instruct", "--model.llm", str(files / "converted"), *flags])
    _, processor = build.build_model(options.model, options.data)
    _, reasons = make_datasets(options)
    batch = processor.apply_chat_template(reasons[0]["messages"], tokenize=True, return_labels=True)
    supervised = batch["input_ids"][batch["labels"] != -100]
    assert processor.tokenizer.decode(supervised) == f"{reasoning}###"
    run("stage1_mlp", files / "converted", tmp_path / "all", *newer, "--data.types=null")
    output = ["--training.output_dir", str(tmp_path / "none")]
    assert train.main(["stage1_mlp", "--model.llm", str(files / "converted"), *newer, *SHORT, *output]) == 1
    assert "no conversation of simple_description; the file holds part_description" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["align", "align_24gb"])
def test_the_alignment_stage_in_four_bits(recipe, files, tmp_path, clouds):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    flags = ["--model.quantization=nf4", "--alignment.layer=[2]"]
    if recipe == "align":
        flags += ["--data.mixture", MIXTURE]
    else:  # the converted folder brings point branch and adapters along
        flags += ["--model.checkpoint=null", "--training.memory_limit_gb=null", "--training.dataloader_num_workers=0"]
    options = parse([recipe, "--model.llm", str(files / "converted-stage3"), "--model.dtype=float32", *flags])
    model, processor = build.build_model(options.model, options.data)
    for layer in model.get_decoder().layers:
        for linear in (layer.self_attn.query_key_value, layer.self_attn.dense):
            assert quantization.is_4bit(linear.base_layer) and linear.lora_A.default.weight.dtype == torch.float32
        assert quantization.is_4bit(layer.mlp.fc1) and not quantization.is_4bit(layer.self_attn.q_layernorm)
    assert not any(quantization.is_4bit(one) for part in model.model.point_branch for one in part.modules())
    assert not quantization.is_4bit(model.get_output_embeddings())
    before = {name: one.detach().clone() for name, one in model.state_dict().items() if ".lora_" in name}

    state = run(recipe, files / "converted-stage3", tmp_path / "run", *flags)
    assert all(not torch.equal(state[name], one.bfloat16()) for name, one in before.items() if ".language_" in name)
    log = json.loads((tmp_path / "run" / "stage.json").read_text())["last_log"]
    assert 0 < log["alignment_loss"] < 2 and log["ntp_loss"] > 0
    exported, _, _ = load(tmp_path / "run" / "model")
    batch = processor.apply_chat_template([user("What is this?", clouds[0])], tokenize=True).to(exported.device)
    assert exported.generate(**batch, max_new_tokens=3, min_new_tokens=3).shape[1] == batch["input_ids"].shape[1] + 3
