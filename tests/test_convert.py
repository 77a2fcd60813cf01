"""Miniature files in the published formats, converted, and compared with the formulas on their raw tensors."""

import json
import pickle
from itertools import combinations

import made_published as made
import pytest
import torch
from safetensors.torch import load_file

from pointalign.convert.__main__ import main
from pointalign.models import PointAlignForConditionalGeneration, PointAlignProcessor

SIZES = ["--head-size", "4", "--num-groups", "8", "--group-size", "4"]
TOLERANCE = 1e-5


def half(tensors):
    return {name: one.half() if one.is_floating_point() else one for name, one in tensors.items()}


@pytest.fixture(scope="session")
def raw():
    torch.manual_seed(0)
    encoder = half(made.encoder())
    return {
        "llm": made.phi(fused=False),
        "blip2": made.blip2(),
        "encoder": encoder,
        "stage": made.stage(),
        "experts": made.stage4(),
        "projector": made.projector(),
    }


@pytest.fixture(scope="session")
def files(raw, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    made.save_llm(folder / "phi", raw["llm"])
    fused = {n: one for n, one in raw["llm"].items() if not any(f".{x}_proj." in n for x in "qkv")}
    for i in range(made.LLM["layers"]):
        for kind in ("weight", "bias"):
            parts = [raw["llm"][f"model.layers.{i}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
            rows = [one[h * 20 + d] for h in range(2) for one in parts for d in range(20)]
            fused[f"model.layers.{i}.self_attn.query_key_value.{kind}"] = torch.stack(rows)
    made.save_llm(folder / "phi-fused", fused)
    made.save_container(folder / "blip2.pth", raw["blip2"])
    made.save_container(folder / "point_model.pth", raw["encoder"], "base_model")
    made.save_container(folder / "pointllm.pt", raw["encoder"] | {}, "state_dict", prefix="module.point_encoder.")
    made.save_container(folder / "stage3.pth", made.with_encoder_aliases(dict(raw["stage"]), raw["encoder"]))
    made.save_container(folder / "stage4.pth", made.with_encoder_aliases(dict(raw["experts"]), raw["encoder"]))
    made.save_container(folder / "experts.pth", raw["experts"])
    made.save_container(folder / "pointalign.pth", raw["stage"] | raw["projector"])
    return folder


def arguments(files, output, *checkpoints, llm="phi", encoder="point_model.pth"):
    given = ["--llm", files / llm, "--qformer", files / "blip2.pth", "--point-encoder", files / encoder]
    for one in checkpoints:
        given += ["--checkpoint", one if not isinstance(one, str) else files / one]
    return [str(one) for one in [*given, "--output", output, *SIZES]]


@pytest.fixture(scope="session")
def converted(files):
    assert main(arguments(files, files / "converted", "stage3.pth")) == 0
    return files / "converted"


def features(raw, queries, cloud):
    stage, encoder = raw["stage"], {name: one.float() for name, one in raw["encoder"].items()}
    tokens = made.encode(encoder, cloud)
    wide = torch.nn.functional.gelu(made.lin(stage, "point_2_Qformer_proj.0", tokens))
    return tokens, made.query(raw["blip2"], stage, queries, made.lin(stage, "point_2_Qformer_proj.2", wide))


@torch.no_grad()
def check_numbers(folder, raw, weights=None):
    model = PointAlignForConditionalGeneration.from_pretrained(folder)
    assert not model.training
    assert not any(module.training for module in model.modules())  # no dropout, adapters' included
    cloud = torch.rand(64, 6, generator=torch.Generator().manual_seed(3))
    tokens, queries = features(raw, raw["stage"]["query_tokens"][0], cloud)
    projected = made.lin(raw["stage"], "llama_proj2", made.lin(raw["stage"], "llama_proj", queries))
    found = model.encode_point_clouds(cloud[None])
    torch.testing.assert_close(found.encoder[0], tokens, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(found.qformer[0], queries, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(found.projected[0], projected, atol=TOLERANCE, rtol=TOLERANCE)
    ids, mask = torch.arange(9)[None], torch.zeros(1, 9, dtype=torch.bool)
    mask[0, 2:5] = True
    embeds = raw["llm"]["model.embed_tokens.weight"][ids[0]].clone()
    embeds[2:5] = projected
    llm, stage = ({name: one.double() for name, one in raw[part].items()} for part in ("llm", "stage"))
    wanted = made.read(llm, stage, embeds.double()).float()
    scores = model(inputs_embeds=embeds[None]).logits[0]
    torch.testing.assert_close(scores, wanted, atol=TOLERANCE, rtol=TOLERANCE)
    scores = model(input_ids=ids, point_mask=mask, point_values=cloud[None]).logits[0]  # all parts' rounding together
    torch.testing.assert_close(scores, wanted, atol=1e-4, rtol=1e-4)


def test_every_part_computes_what_the_formulas_say(converted, raw):
    check_numbers(converted, raw)


def test_both_formats_of_phi_both_encoder_files_and_merging_agree(files, tmp_path, raw):
    checkpoint = "pointalign.pth"
    given = arguments(files, tmp_path / "out", checkpoint, llm="phi-fused", encoder="pointllm.pt")
    assert main([*given, "--merge-adapters"]) == 0
    check_numbers(tmp_path / "out", raw)
    assert not (tmp_path / "out" / "adapters.safetensors").exists()
    kept_apart = load_file(tmp_path / "out" / "alignment_projector.safetensors")
    assert set(kept_apart) == {f"projector.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}


@pytest.mark.parametrize("dims", [4, 10])
def test_an_encoder_of_other_output_width(dims, files, tmp_path, raw):
    """`encoder_dims` of the published code widens or narrows the mini-PointNet's output alone."""
    torch.manual_seed(1)
    encoder = half(made.encoder(dims))
    path = made.save_container(tmp_path / "point_model.pth", encoder, "base_model")
    assert main(arguments(files, tmp_path / "out", "pointalign.pth", encoder=path)) == 0
    check_numbers(tmp_path / "out", raw | {"encoder": encoder})
    config = json.loads((tmp_path / "out" / "config.json").read_text())["point_config"]
    assert (config["group_dim"], config["pointnet_width"]) == (dims, made.ENC["group"])


def test_query_experts_of_stage_4(files, tmp_path, raw):
    assert main(arguments(files, tmp_path / "out", "stage3.pth", "stage4.pth")) == 0
    model = PointAlignForConditionalGeneration.from_pretrained(tmp_path / "out")
    cloud = torch.rand(64, 6, generator=torch.Generator().manual_seed(4))
    tokens, _ = features(raw, raw["experts"]["query_expert_dict.0"][0], cloud)
    router = torch.cat([tokens[0], tokens[1:].amax(0)])
    router = made.lin(raw["experts"], "query_router.0", router)
    weights = made.lin(raw["experts"], "query_router.2", torch.nn.functional.gelu(router)).softmax(-1)
    best = weights.topk(2).indices.tolist()
    assert best != [0, 1]
    wanted = sum(weights[i] * features(raw, raw["experts"][f"query_expert_dict.{i}"][0], cloud)[1] for i in best)
    with torch.no_grad():
        found = model.get_qformer_features(cloud[None])[0]
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=TOLERANCE)


def test_saving_and_loading_a_converted_model_changes_nothing(converted, tmp_path):
    first = PointAlignForConditionalGeneration.from_pretrained(converted)
    first.save_pretrained(tmp_path)
    second = PointAlignForConditionalGeneration.from_pretrained(tmp_path)
    assert first.state_dict().keys() == second.state_dict().keys()
    for (name, one), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_the_report_accounts_for_every_tensor(converted, files):
    report = json.loads((converted / "conversion.json").read_text())
    told = {(one["file"], one["tensor"]): one for one in report["tensors"]}
    for name in ("blip2.pth", "point_model.pth", "stage3.pth"):
        content = torch.load(files / name, weights_only=True)
        assert {tensor for file, tensor in told if file == name} == set(content.get("model", content.get("base_model")))
    assert told["blip2.pth", "t5_proj.weight"]["status"] == "ignored" and told["blip2.pth", "t5_proj.weight"]["detail"]
    assert told["stage3.pth", "pc_encoder.encoder.first_conv.1.running_mean"]["status"] == "alias"
    hashes = [digest for source in report["sources"] for digest in source["sha256"].values()]
    readme = (converted / "README.md").read_text()
    assert len(hashes) == 5 and all(digest in readme for digest in hashes) and "CC-BY-NC-SA-4.0" in readme


def test_the_fingerprint_tells_changed_weights(converted, tmp_path, capsys):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(converted, copy)
    assert main(["--check", str(copy)]) == 0
    path = copy / "model-00001-of-00001.safetensors"
    state = load_file(path)
    weight = state["model.language_model.model.layers.0.self_attn.query_key_value.weight"]
    state["model.language_model.model.layers.0.self_attn.query_key_value.weight"] = weight.roll(1, 0)
    from safetensors.torch import save_file

    save_file(state, path, metadata={"format": "pt"})
    assert main(["--check", str(copy)]) == 1 and "differ" in capsys.readouterr().err
    state["model.modality_projector.1.weight"][0, 0] = torch.nan
    save_file(state, path, metadata={"format": "pt"})
    assert main(["--check", str(copy)]) == 1 and "self-test failed at" in capsys.readouterr().err


def test_each_option_alone(files, tmp_path, raw, capsys):
    one = ["--point-encoder", str(files / "point_model.pth"), "--output", str(tmp_path / "a"), *SIZES]
    assert main(one) == 0
    assert main(["--qformer", str(files / "blip2.pth"), "--output", str(tmp_path / "b"), *SIZES]) == 0
    assert main(["--checkpoint", str(files / "stage3.pth"), "--output", str(tmp_path / "c"), *SIZES]) == 0
    assert main(arguments(files, tmp_path / "d")) == 0
    printed = capsys.readouterr().out
    assert "drawn at random" in printed and "files with y up, such as .glb, with up_axis -z" in printed
    readme = (tmp_path / "d" / "README.md").read_text()
    assert "model.point_mlp" in readme
    # what was converted in parts gives the same model as all at once
    parts = [
        "--checkpoint",
        *[str(tmp_path / "a" / "parts.safetensors")],
        "--checkpoint",
        str(tmp_path / "b/parts.safetensors"),
    ]
    parts += ["--checkpoint", str(tmp_path / "c" / "parts.safetensors")]
    assert main(["--llm", str(files / "phi"), *parts, "--output", str(tmp_path / "e"), *SIZES]) == 0
    check_numbers(tmp_path / "e", raw)


def test_every_set_of_options_converts_or_says_which_is_missing(files, tmp_path, capsys, monkeypatch):
    from pointalign.convert import write

    monkeypatch.setattr(write, "write", lambda *_: None)  # absent parts have the published sizes
    monkeypatch.setattr(write, "self_test", lambda _: {})
    given = {"--llm": "phi", "--qformer": "blip2.pth", "--point-encoder": "point_model.pth"}
    given = [(flag, files / name) for flag, name in given.items()]
    given += [("--checkpoint", files / "stage3.pth"), ("--checkpoint", files / "experts.pth")]
    for count in range(1, 6):
        for chosen in combinations(given, count):
            flags = [str(one) for pair in chosen for one in pair]
            status, error = main([*flags, "--output", str(tmp_path / "out"), *SIZES]), capsys.readouterr().err
            names = [path.name for _, path in chosen]
            if "phi" in names and "stage3.pth" in names and "blip2.pth" not in names:  # adapters of an absent Q-Former
                assert status == 1 and ": --qformer gives it" in error, names
            else:
                assert status == 0, (names, error)


class Hostile:
    def __reduce__(self):
        return print, ("executed",)


def refused(files, tmp_path, capsys, *checkpoints, **given):
    status = main(arguments(files, tmp_path / "out", *checkpoints, **given))
    assert status == 1 and not (tmp_path / "out").exists()
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    [
        "llama_model.base_model.model.model.layers.1.post_layernorm.weight",
        "llama_model.base_model.model.model.layers.2.self_attn.k_layernorm.weight",
        "llama_model.base_model.model.model.final_layernorm.weight",
        "Qformer.bert.encoder.layer.2.crossattention.output.LayerNorm.weight",
        "Qformer.bert.encoder.layer.3.attention.self.value.lora_B.default.weight",
        "llama_proj2.bias",
        "point_2_Qformer_proj.0.weight",
    ],
)
def test_a_tensor_that_a_checkpoint_lacks_is_named(files, tmp_path, capsys, raw, name):
    path = made.save_container(tmp_path / "s.pth", {n: one for n, one in raw["stage"].items() if n != name})
    error = refused(files, tmp_path, capsys, path)
    assert "is missing" in error
    from pointalign.convert.files import translate

    assert translate("checkpoint", name)[0] in error


def test_what_cannot_be_explained_or_does_not_fit_is_refused(files, tmp_path, capsys, raw):
    path = made.save_container(tmp_path / "s.pth", raw["stage"] | {"mystery.weight": torch.ones(1)})
    assert "nothing explains the tensor 'mystery.weight'" in refused(files, tmp_path, capsys, path)
    path = made.save_container(tmp_path / "s.pth", raw["stage"] | {"llama_proj.weight": torch.ones(28, 15)})
    assert "llama_proj.weight has shape [28, 15]" in refused(files, tmp_path, capsys, path)
    other = half(raw["encoder"]) | {}
    different = {f"pc_encoder.{n}": one + 1 for n, one in other.items() if ".1.running" in n}
    path = made.save_container(tmp_path / "s.pth", made.with_encoder_aliases(dict(raw["stage"]), other) | different)
    assert "two names of one tensor but differ" in refused(files, tmp_path, capsys, path)
    (tmp_path / "s.pth").write_bytes((files / "stage3.pth").read_bytes()[:20000])
    assert "truncated" in refused(files, tmp_path, capsys, tmp_path / "s.pth")
    torch.save([1, 2], tmp_path / "s.pth")
    assert "expected a file of torch.save with the key 'model'" in refused(files, tmp_path, capsys, tmp_path / "s.pth")
    with (tmp_path / "s.pth").open("wb") as file:
        pickle.dump({"model": {"query_tokens": Hostile()}}, file)
    error = refused(files, tmp_path, capsys, tmp_path / "s.pth")
    assert "refused" in error and "executed" not in capsys.readouterr().out


def test_a_language_model_in_pieces_is_refused(files, tmp_path, capsys, raw):
    mixed = dict(raw["llm"])
    del mixed["model.layers.1.self_attn.v_proj.weight"]
    made.save_llm(tmp_path / "mixed", mixed)
    assert "'model.layers.1.self_attn.v_proj.weight' is missing" in refused(
        files, tmp_path, capsys, "stage3.pth", llm=tmp_path / "mixed"
    )
    made.save_llm(tmp_path / "heads", raw["llm"], num_attention_heads=4)
    error = refused(files, tmp_path, capsys, "stage3.pth", llm=tmp_path / "heads")
    assert "q_layernorm.weight has shape [20], expected [10]" in error
    made.save_llm(tmp_path / "odd", raw["llm"], num_attention_heads=3)
    error = refused(files, tmp_path, capsys, "stage3.pth", llm=tmp_path / "odd")
    assert "self_attn.q_proj" in error and "expected a multiple of 3" in error
    made.save_llm(tmp_path / "cut", raw["llm"])
    shard = tmp_path / "cut" / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert f"{shard}: truncated" in refused(files, tmp_path, capsys, "stage3.pth", llm=tmp_path / "cut")


def test_a_half_loaded_model_is_an_error(converted, tmp_path):
    import shutil

    from safetensors.torch import save_file

    shutil.copytree(converted, tmp_path / "copy")
    path = tmp_path / "copy" / "model-00001-of-00001.safetensors"
    state = load_file(path)
    name = "model.language_model.model.layers.0.self_attn.post_layernorm.weight"
    del state[name]
    save_file(state, path, metadata={"format": "pt"})
    index = tmp_path / "copy" / "model.safetensors.index.json"
    stored = json.loads(index.read_text())
    del stored["weight_map"][name]
    index.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        PointAlignForConditionalGeneration.from_pretrained(tmp_path / "copy")
    shutil.copytree(converted, tmp_path / "bare")
    (tmp_path / "bare" / "adapters.safetensors").unlink()
    with pytest.raises(OSError, match="adapters"):
        PointAlignForConditionalGeneration.from_pretrained(tmp_path / "bare")


def test_the_tokenizer_comes_along_with_the_published_layout(files, tmp_path, tokenizer):
    plain = type(tokenizer)(tokenizer_object=tokenizer._tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    plain.add_tokens(["###", " ###"])
    llm = tmp_path / "phi"
    made.save_llm(llm, made.phi(fused=False), vocab_size=64)
    plain.save_pretrained(llm)
    assert main(["--llm", str(llm), "--output", str(tmp_path / "out"), *SIZES]) == 0
    processor = PointAlignProcessor.from_pretrained(tmp_path / "out")
    talk = [
        {
            "role": "user",
            "content": [{"type": "point", "point": torch.rand(64, 6).numpy()}, {"type": "text", "text": "What is it?"}],
        },
        {"role": "assistant", "content": "A cup."},
        {"role": "user", "content": "Red?"},
        {"role": "assistant", "content": "Yes."},
    ]
    text = processor.apply_chat_template(talk)
    assert text == (
        "<|endoftext|>[INST] <PC><point></PC> What is it?  [/INST]A cup.###<|endoftext|>[INST] Red?  [/INST]Yes.###"
    )
    batch = processor.apply_chat_template(talk, tokenize=True, return_labels=True)
    answers = batch["input_ids"][0][batch["labels"][0] != -100]
    assert processor.tokenizer.decode(answers) == "A cup.###Yes.###"
    ends = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert set(ends) == {plain.eos_token_id, *plain.convert_tokens_to_ids(["###", " ###"])}
    prompt = processor.apply_chat_template(talk[:1], tokenize=True, add_generation_prompt=True)
    generated = torch.cat([prompt["input_ids"], plain("A cup.### junk", return_tensors="pt")["input_ids"]], 1)
    assert processor.answers(generated, prompt["input_ids"].shape[1]) == ["A cup."]
