"""Put together, handed on, refused where it does not fit, merged and exported."""

import json
import os
import re
import shutil
from dataclasses import asdict

import pytest
import torch
from conftest import user
from made_templates import LAYOUTS
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer

from pointalign import build, stage_file, storage
from pointalign.model_options import PARTS, DataOptions, ModelOptions


def options(folder, **changes) -> ModelOptions:
    return ModelOptions(**{"llm": str(folder), "dtype": "float32", "lora_rank": 4} | changes)


def make_model(folder, **changes):
    return build.build_model(options(folder, **changes), DataOptions(num_points=256))


def shaken(model, seed: int = 0):
    """Adapters and point branch away from their first values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, one in model.named_parameters():
            if ".lora_" in name or ".language_model." not in name:
                one.add_(torch.randn(one.shape, generator=generator) / 10)
    return model.eval()


def logits(model, processor, clouds):
    batch = processor.apply_chat_template([user("What?", clouds[0])], tokenize=True, add_generation_prompt=True)
    with torch.no_grad():
        return model(**batch).logits


def test_the_seed_fixes_a_new_point_branch(lively_llm):
    one, same, other = (make_model(lively_llm, seed=seed)[0].state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["model.query_tokens"], other["model.query_tokens"])


def test_the_processor_fits_the_model(lively_llm):
    model, processor = make_model(lively_llm)
    assert processor.num_query_tokens == model.config.num_query_tokens == 32
    assert processor.feature_extractor.min_points == 64 and processor.feature_extractor.num_points == 256
    _, other = build.build_model(options(lively_llm), DataOptions(up_axis="z"))
    assert (other.feature_extractor.up_axis, other.feature_extractor.num_points) == ("z", 1024)  # the mini encoder's


QFORMER_ADAPTED = (".lora_", "attention.output.LayerNorm.weight", "output_query.LayerNorm.weight")


@pytest.mark.parametrize("part", [one for one in PARTS if one != "llm_norms"])  # those are the published Phi's
def test_exactly_the_named_part_trains(part, lively_llm):
    extras = {"query_experts": {"query_experts": 3}, "qformer_lora": {"qformer_lora_rank": 2}}
    model, _ = make_model(lively_llm, train=[part], **extras.get(part, {}))
    trained = {name for name, one in model.named_parameters() if one.requires_grad}
    names = {name for name, _ in model.named_parameters()}
    if part == "lora":
        expected = {name for name in names if ".lora_" in name}
    elif part == "qformer_lora":
        expected = {n for n in names if n.startswith("model.qformer.") and any(one in n for one in QFORMER_ADAPTED)}
    else:
        prefixes = {"qformer": ("model.qformer.", "model.query_tokens"), "query_tokens": ("model.query_tokens",)}
        expected = {name for name in names if name.startswith(prefixes.get(part, (f"model.{part}.",)))}
    assert trained == expected != set()


def test_a_later_stage_adds_experts_and_hands_them_on(lively_llm, tmp_path):
    first, _ = make_model(lively_llm)
    stage_file.save_stage(first, tmp_path / "a.safetensors", {})
    second, _ = make_model(
        lively_llm, checkpoint=str(tmp_path / "a.safetensors"), query_experts=3, train=["query_experts"]
    )
    queries = first.model.query_tokens.to(torch.bfloat16).float()
    assert torch.equal(second.model.query_experts.queries, queries.expand(3, -1, -1))
    shaken(second)
    stage_file.save_stage(second, tmp_path / "b.safetensors", {})
    third, _ = make_model(lively_llm, checkpoint=str(tmp_path / "b.safetensors"), seed=5)
    expected = second.model.query_experts.queries.to(torch.bfloat16).float()
    assert torch.equal(third.model.query_experts.queries, expected)


def test_experts_stay_routed_as_they_were_trained(lively_llm, tmp_path, clouds):
    """How they are routed is in no tensor, and `sparse` after `soft` would be another model."""
    start = tmp_path / "start.safetensors"
    stage_file.save_stage(make_model(lively_llm)[0], start, {})
    soft, processor = make_model(lively_llm, checkpoint=str(start), query_experts=3, query_routing="soft")
    shaken(soft)
    with torch.no_grad():
        for one in stage_file.stage_state(soft).values():
            if one.ndim > 1:
                one.copy_(one.to(torch.bfloat16))
    path = tmp_path / "soft.safetensors"
    stage_file.save_stage(soft, path, {})
    later, _ = make_model(lively_llm, checkpoint=str(path))
    assert later.config.query_routing == "soft"
    assert torch.equal(logits(later.eval(), processor, clouds), logits(soft, processor, clouds))
    other, _ = make_model(lively_llm, checkpoint=str(path), query_routing="constant")
    assert not torch.allclose(logits(other.eval(), processor, clouds), logits(soft, processor, clouds))
    with pytest.raises(ValueError, match="this model already has 3"):
        make_model(lively_llm, checkpoint=str(path), query_experts=8)
    with pytest.raises(ValueError, match="this model has no query experts"):
        make_model(lively_llm, query_routing="soft")
    with pytest.raises(ValueError, match="expected sparse, soft or constant"):
        options(lively_llm, query_routing="dense")


def test_a_converted_folder_goes_on_training(tmp_path, tokenizer):
    """From published files through a stage to a folder that answers: flags only."""
    import made_published as made

    from pointalign.convert.__main__ import main

    torch.manual_seed(0)
    llm = made.save_llm(tmp_path / "phi", made.phi(fused=False), vocab_size=made.LLM["vocab"])
    files = {"--qformer": made.blip2(), "--checkpoint": made.stage()}
    arguments = ["--llm", str(llm), "--head-size", "4", "--num-groups", "8", "--group-size", "4"]
    for flag, tensors in files.items():
        arguments += [flag, str(made.save_container(tmp_path / f"{flag}.pth", tensors))]
    arguments += ["--point-encoder", str(made.save_container(tmp_path / "p.pth", made.encoder(), "base_model"))]
    assert main([*arguments, "--output", str(tmp_path / "converted")]) == 0
    tokenizer.save_pretrained(tmp_path / "converted")
    options = {"train": ["lora", "llm_norms", "qformer_lora"], "dtype": "bfloat16"}
    model, _ = make_model(tmp_path / "converted", **options)
    attention = model.model.language_model.model.layers[0].self_attn
    assert attention.query_key_value.lora_A.default.weight.shape == (made.RANK, 40)  # one for q, k and v
    trained = [one for one in model.parameters() if one.requires_grad]
    assert {one.dtype for one in trained} == {
        torch.float32
    } and attention.dense.base_layer.weight.dtype == torch.bfloat16
    stored = {name: one.detach().clone() for name, one in model.named_parameters() if "k_layernorm.weight" in name}
    shaken(model)
    with torch.no_grad():
        for name in stored:
            model.get_parameter(name).add_(1e-4)  # less than bfloat16 tells apart
    stage_file.save_stage(model, tmp_path / "stage.safetensors", {})
    again, processor = make_model(tmp_path / "converted", checkpoint=str(tmp_path / "stage.safetensors"), **options)
    for name, one in again.named_parameters():
        if name in stored:  # trained norms are handed on, unrounded
            assert torch.equal(one, model.get_parameter(name)) and not torch.equal(one, stored[name])
    build.export(again, processor, tmp_path / "model")
    assert not (tmp_path / "model" / "adapters.safetensors").exists()
    assert build.load(tmp_path / "model")[0].config.adapters is None


def test_a_missing_language_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.llm=.*config.json is missing"):
        make_model(tmp_path)


def test_dtypes():
    assert build.resolve_dtype("float32") == torch.float32 and build.resolve_dtype("bfloat16") == torch.bfloat16
    assert build.resolve_dtype("auto") in (torch.float32, torch.bfloat16)


def test_a_stage_hands_on_everything_but_the_language_model(lively_llm, tmp_path, clouds):
    model, processor = make_model(lively_llm)
    shaken(model)
    path = tmp_path / "run" / stage_file.STAGE_FILE
    stage_file.save_stage(model, path, {"seed": 0})
    assert json.loads(path.with_suffix(".json").read_text()) == {"seed": 0}
    state = load_file(path)
    assert all(one.dtype == torch.bfloat16 for one in state.values() if one.ndim > 1)
    assert {name for name in model.state_dict() if ".language_model." not in name or ".lora_" in name} == set(state)
    for checkpoint in (path, path.parent):
        loaded, _ = make_model(lively_llm, checkpoint=str(checkpoint), seed=7)
        for name, one in loaded.state_dict().items():
            expected = model.state_dict()[name]
            rounded = name in state and expected.ndim > 1
            assert torch.equal(one, expected.to(torch.bfloat16).to(one.dtype) if rounded else expected), name
    with torch.no_grad():
        for one in stage_file.stage_state(model).values():
            if one.ndim > 1:
                one.copy_(one.to(torch.bfloat16))
    assert torch.equal(logits(loaded.eval(), processor, clouds), logits(model, processor, clouds))


@pytest.mark.parametrize(("name", "has_adapters"), [("furniture-stage1", False), ("furniture", True)])
def test_the_shipped_stages(name, has_adapters):
    """The alignment stage adds its adapters to `furniture-stage1`; `furniture` has them."""
    path = stage_file.find_stage(name)
    with safe_open(path, framework="pt") as file:
        assert "language_model_weights" in file.metadata()
        assert any(".lora_" in key for key in file.keys()) is has_adapters
    assert ("language_model" in stage_file.adapted_parts(path)) is has_adapters
    model_options, _ = stage_file.trained_options(path)
    assert model_options.llm == "smollm2" and (model_options.lora_rank > 0) is has_adapters


def test_the_newest_run_answers_where_no_model_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert build.default_model() == "furniture"
    for number, name in enumerate(("demo-2", "demo", "demo-3")):  # the newest is not the last by name
        model = tmp_path / "runs" / name / "model"
        model.mkdir(parents=True)
        if name != "demo-3":  # a run that has not finished
            (model / "config.json").write_text("{}")
        os.utime(model, (number, number))
    capsys.readouterr()
    assert build.default_model() == "runs/demo/model"
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "model: runs/demo/model, which `make train` made; name another to take its place\n"
    os.utime(tmp_path / "runs" / "demo-2" / "model", (9, 9))
    assert build.default_model() == "runs/demo-2/model"


def test_load_without_a_name_takes_the_newest_run(lively_llm, tmp_path, monkeypatch, clouds):
    monkeypatch.chdir(tmp_path)
    model, processor = make_model(lively_llm)
    build.export(shaken(model), processor, tmp_path / "runs" / "demo" / "model")
    loaded, again, _ = build.load(device="cpu")
    expected = build.load("runs/demo/model", device="cpu")[0]
    assert torch.equal(logits(loaded, again, clouds), logits(expected, processor, clouds))


def test_a_stage_is_asked_and_trained_on_with_the_system_turn_of_its_training(lively_llm, tmp_path):
    llm = shutil.copytree(lively_llm, tmp_path / "llm")
    tokenizer = AutoTokenizer.from_pretrained(llm)
    tokenizer.chat_template = LAYOUTS["smollm2"][0]  # writes a system turn by itself
    tokenizer.save_pretrained(llm)
    trained = options(llm, system_text=False)
    model, processor = build.build_model(trained, DataOptions(num_points=256))
    assert processor.chat_template != tokenizer.chat_template
    path = tmp_path / "run" / stage_file.STAGE_FILE
    stage_file.save_stage(model, path, {"model": asdict(trained), "data": {}})
    assert build.load(path)[1].chat_template == processor.chat_template
    assert make_model(llm, checkpoint=str(path))[1].chat_template == processor.chat_template
    assert make_model(llm, checkpoint=str(path), system_text=True)[1].chat_template == tokenizer.chat_template
    assert make_model(llm)[1].chat_template == tokenizer.chat_template
    described = json.loads(path.with_suffix(".json").read_text())
    described["model"]["system_text"] = "no"
    path.with_suffix(".json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"stage\.json: model\.system_text is 'no', expected true or false"):
        build.load(path)


@pytest.mark.parametrize("changes", [{"lora_rank": 8}, {"lora_targets": ["q_proj"]}])
def test_other_adapters_are_refused(changes, lively_llm, tmp_path):
    model, _ = make_model(lively_llm)
    stage_file.save_stage(model, tmp_path / stage_file.STAGE_FILE, {})
    with pytest.raises(ValueError, match="does not fit this model"):
        make_model(lively_llm, checkpoint=str(tmp_path), **changes)


@pytest.mark.parametrize("part", ["language_model", "qformer"])
def test_another_strength_of_the_adapters_is_refused(part, lively_llm, tmp_path):
    """The tensors are the same for every alpha: only the file's header tells."""
    trained = {"lora_alpha": 8, "qformer_lora_rank": 2}
    model, _ = make_model(lively_llm, **trained)
    model.config.adapters[part] = model.config.adapters[part] | {"lora_alpha": 5}
    stage_file.save_stage(model, tmp_path / stage_file.STAGE_FILE, {})
    with pytest.raises(ValueError, match=f"trained with lora_alpha=5 on the {part}, this model has [84]: "):
        make_model(lively_llm, checkpoint=str(tmp_path), **trained)


def test_a_stage_file_alone_answers_as_the_one_in_training(lively_llm, tmp_path, clouds):
    trained = options(lively_llm, lora_alpha=3, lora_targets=["q_proj", "v_proj"], qformer_lora_rank=2)
    data = DataOptions(num_points=256, up_axis="z")
    model, processor = build.build_model(trained, data)
    shaken(model)
    with torch.no_grad():
        for one in stage_file.stage_state(model).values():
            if one.ndim > 1:
                one.copy_(one.to(torch.bfloat16))
    path = tmp_path / "run" / stage_file.STAGE_FILE
    stage_file.save_stage(model, path, {"model": asdict(trained), "data": asdict(data)})
    for name in (path, path.parent):
        loaded, again, _ = build.load(name)
        assert not loaded.training and loaded.config.adapters is None
        assert (again.feature_extractor.num_points, again.feature_extractor.up_axis) == (256, "z")
        found, expected = (logits(one.to("cpu"), processor, clouds) for one in (loaded, model))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    path.with_suffix(".json").unlink()
    with pytest.raises(ValueError, match=r"expected stage\.json beside it"):
        build.load(path)


def test_a_partial_or_truncated_stage_is_refused(lively_llm, tmp_path):
    model, _ = make_model(lively_llm)
    path = tmp_path / stage_file.STAGE_FILE
    stage_file.save_stage(model, path, {})
    whole = load_file(path)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    for lost in (
        "model.query_tokens",
        "model.language_model.model.layers.0.mlp.up_proj.lora_A.default.weight",
        ".lora_",
    ):
        kept = {name: one for name, one in whole.items() if lost not in name}
        storage.write_tensors(path, kept, header)
        with pytest.raises(ValueError, match=f"missing .*{re.escape(lost)}"):
            make_model(lively_llm, checkpoint=str(path))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        make_model(lively_llm, checkpoint=str(path))


def test_an_unknown_checkpoint_is_named(lively_llm):
    with pytest.raises(FileNotFoundError, match=r"model\.checkpoint='nowhere'"):
        make_model(lively_llm, checkpoint="nowhere")


def test_merged_adapters_answer_alike_and_leave_the_plain_layout(lively_llm, clouds):
    model, processor = make_model(lively_llm)
    shaken(model)
    before = logits(model, processor, clouds)
    with_adapters = {name for name in model.state_dict() if ".lora_" not in name}
    build.merge_adapters(model)
    torch.testing.assert_close(logits(model, processor, clouds), before, atol=1e-4, rtol=1e-4)
    plain = build.PointAlignForConditionalGeneration(model.config)
    assert set(model.state_dict()) == set(plain.state_dict()) == {n.replace(".base_layer", "") for n in with_adapters}
    unmoved, _ = make_model(lively_llm)
    build.merge_adapters(unmoved)
    assert not torch.allclose(logits(unmoved.eval(), processor, clouds), before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_exported_model_answers_as_the_one_in_training(dtype, lively_llm, clouds, tmp_path):
    model, processor = make_model(lively_llm, dtype=dtype)
    shaken(model)
    build.export(model, processor, tmp_path / "model")
    loaded, again, _ = build.load(tmp_path / "model")
    loaded.to("cpu")
    assert not loaded.training
    assert loaded.model.language_model.dtype == getattr(torch, dtype)
    assert loaded.model.point_encoder.dtype == torch.float32
    talk = [user("What is this?", clouds[0], clouds[1])]
    ours, theirs = (p.apply_chat_template(talk, tokenize=True, add_generation_prompt=True) for p in (processor, again))
    first, second = (
        m.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        for m, inputs in ((model, ours), (loaded, theirs))
    )
    assert torch.equal(first, second)
    names = {one.name for one in (tmp_path / "model").iterdir()}
    assert "model.safetensors" in names and not any("alignment" in one or "adapter" in one for one in names)
    assert not any(
        "alignment" in name or "lora" in name for name in load_file(tmp_path / "model" / "model.safetensors")
    )
