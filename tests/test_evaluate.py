"""An evaluation end to end with a tiny model and the committed clouds: protocol, resuming, identical results."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLOUDS, NAMES, tiny_model

from pointalign import evaluate
from pointalign.data.dataset import CLASSES, load_modelnet40
from pointalign.evaluation import answering, metrics, report, results
from pointalign.evaluation.answering import Journal
from pointalign.evaluation.tasks import PROMPTS


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def saved(tmp_path_factory, model, processor):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def arguments(saved, out, *more):
    given = ["--data", str(CLOUDS / "annotations.json"), "--clouds", str(CLOUDS), "--sentence_models", "none"]
    return [
        str(saved),
        *given,
        "--generation.batch_size",
        "3",
        "--generation.max_new_tokens",
        "6",
        "--output",
        str(out),
        *more,
    ]


def test_an_evaluation_is_written_resumed_and_identical(saved, tmp_path, monkeypatch, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    sampled = ["--task", "classification", "--prompts", "0", "--protocol", "minigpt3d"]
    assert evaluate.main(arguments(saved, first, *sampled)) == 0
    output = json.loads((first / "classification-prompt0.json").read_text())
    assert output["prompt"] == PROMPTS[0] and [row["object_id"] for row in output["results"]] == sorted(NAMES)
    assert set(output["results"][0]) == {"object_id", "ground_truth", "model_output", "label_name"}

    calls = []
    original = answering.Journal.get

    def dies(self, key, compute):
        calls.append(key)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, key, compute)

    monkeypatch.setattr(answering.Journal, "get", dies)
    assert evaluate.main(arguments(saved, second, *sampled)) == 130
    assert not (second / "evaluation.json").exists()
    journal = (second / "answers.jsonl").read_text()
    (second / "answers.jsonl").write_text(journal + '{"key": "classif')  # and the last line is torn
    monkeypatch.setattr(answering.Journal, "get", original)
    assert evaluate.main(arguments(saved, second, *sampled)) == 0
    assert (second / "answers.jsonl").read_text().startswith(journal)
    for name in ("evaluation.json", "classification-prompt0.json", "report.html"):
        assert (second / name).read_bytes() == (first / name).read_bytes()
    assert evaluate.main(arguments(saved, first, "--task", "classification", "--prompts", "1")) == 1
    assert "holds another evaluation (asked differ)" in capsys.readouterr().err


def test_without_a_name_the_newest_run_is_evaluated(saved, tmp_path, monkeypatch, capsys):
    shutil.copytree(saved, tmp_path / "runs" / "demo" / "model")
    monkeypatch.chdir(tmp_path)
    _, *unnamed = arguments(saved, tmp_path / "out", "--task", "captioning", "--limit", "1")
    assert evaluate.main(unnamed) == 0
    assert (tmp_path / "out" / "evaluation.json").exists()
    assert "model: runs/demo/model, which `make train` made" in capsys.readouterr().err


def test_the_report_is_one_file(saved, tmp_path):
    assert evaluate.main(arguments(saved, tmp_path, "--task", "classification", "--inputs", "true", "blind")) == 0
    page = (tmp_path / "report.html").read_text()
    assert page.count("<img") == 2 * len(NAMES)  # prompts 0 and 1; no picture where there was no cloud
    assert "http:" not in page and "https:" not in page and "<script" not in page and "src='data:image/png" in page
    (tmp_path / "report.html").unlink()
    assert evaluate.main(["report", str(tmp_path)]) == 0 and (tmp_path / "report.html").read_text() == page


@pytest.mark.parametrize("metric", ["likelihood margin", "MiniLM cosine", None])
def test_the_gallery_shows_the_worst_answers_first(metric):
    values = {"good": 0.9, "bad": 0.1, "middling": 0.5}
    questions = [
        {"objects": [], "question": "?", "answer": name, "truth": "t", "values": {metric: value} if metric else {}}
        for name, value in values.items()
    ]
    task = {"kind": "classification", "metrics": {metric: {}} if metric else {}, "questions": questions}
    page = report._gallery("t", task, None)
    places = [page.index(f"</span> {name}<") for name in ("bad", "middling", "good")]
    assert metric is None or (places == sorted(places) and f"by {metric}" in page)
    assert metric or "by order" in page


def test_compare_pairs_the_questions(tmp_path):
    def write(path, values):
        rows = [{"id": str(i), "family": str(i), "values": {"head noun": v}} for i, v in enumerate(values)]
        path.write_text(json.dumps({"tasks": {"t": {"questions": rows}}}))
        return path

    ours = write(tmp_path / "a.json", [1.0] * 30 + [0.0] * 10)
    theirs = write(tmp_path / "b.json", [0.0] * 20 + [1.0] * 10 + [0.0] * 10)
    [row] = results.compare(ours, theirs)
    assert row["mean"] == 0.5 and row["count"] == 40 and row["p"] < 0.001 and row["low"] < 0.5 < row["high"]
    [back] = results.compare(theirs, ours)
    assert back["mean"] == -0.5 and back["p"] == row["p"]
    [same] = results.compare(ours, ours)
    assert same["mean"] == 0 and same["p"] == 1
    other = tmp_path / "c.json"
    other.write_text(json.dumps({"tasks": {"u": {"questions": []}}}))
    assert evaluate.main(["compare", str(ours), str(other)]) == 1


def test_modelnet_is_read_without_running_it(saved, tmp_path):
    clouds = [np.random.default_rng(i).normal(size=(300, 6)).astype(np.float32) for i in range(3)]
    path = tmp_path / "modelnet40.dat"
    path.write_bytes(pickle.dumps((clouds, [np.array([8]), np.array([0]), 39])))
    read, labels = load_modelnet40(path)
    assert labels == [8, 0, 39] and [CLASSES[i] for i in labels] == ["chair", "airplane", "xbox"]
    assert np.array_equal(read[0][:, :3], clouds[0][:, :3]) and not read[0][:, 3:].any()
    assert evaluate.main(
        [str(saved), "--task", "modelnet40", "--data", str(path), "--prompts", "0", "--inputs", "true",
         "--sentence_models", "none", "--generation.max_new_tokens", "4", "--output", str(tmp_path / "out")]
    ) == 0  # fmt: skip
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())["tasks"]["modelnet40-prompt0"]
    assert written["metrics"]["closed-set accuracy"]["count"] == 3 and len(CLASSES) == 40
    rows = json.loads((tmp_path / "out" / "modelnet40-prompt0.json").read_text())["results"]
    assert [(row["object_id"], row["ground_truth"], row["label_name"]) for row in rows] == [
        (0, 8, "chair"), (1, 0, "airplane"), (2, 39, "xbox"),
    ]  # fmt: skip
    path.write_bytes(pickle.dumps((clouds, [shutil.rmtree, 1, 2])))
    with pytest.raises(ValueError, match=r"refused: the pickle asks for shutil\.rmtree"):
        load_modelnet40(path)


def test_a_journal_of_another_run_is_refused(tmp_path):
    journal = Journal(tmp_path / "j", {"model": "a"})
    assert journal.get("k", lambda: [1]) == [1]
    assert Journal(tmp_path / "j", {"model": "a"}).get("k", lambda: 2) == [1]
    with pytest.raises(ValueError, match=r"another run \(model differ"):
        Journal(tmp_path / "j", {"model": "b"})


@pytest.mark.parametrize("arguments", [["--help"], ["compare", "--help"]])
def test_help_names_the_subcommands(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(arguments)
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    if len(arguments) == 1:
        listed = text.split("Subcommands")[1].split("\n\n")[0]
        assert [line.split()[0] for line in listed.splitlines()[1:] if line.strip()] == list(evaluate.COMMANDS)
    assert f"usage: pointalign {'compare ' if len(arguments) == 2 else 'evaluate [MODEL]'}" in text


def test_mistakes_are_named(saved, tmp_path, capsys):
    assert evaluate.main(["no-such-model", "--sentence_models", "none", "--task", "captioning"]) == 1
    assert "no-such-model" in capsys.readouterr().err
    assert evaluate.main([str(saved), "--task", "segmentation"]) == 1
    assert "--task segmentation: expected one of classification" in capsys.readouterr().err


def test_chat_and_evaluate_load_the_same_weights_of_a_run(tmp_path, tokenizer, monkeypatch):
    """Of a run's folder both take the exported model, though the stage file beside it holds other weights."""
    from conftest import tiny_text_config
    from transformers import AutoModelForCausalLM

    from pointalign import build, chat, stage_file
    from pointalign.model_options import DataOptions, ModelOptions

    AutoModelForCausalLM.from_config(tiny_text_config("llama")).save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    options = ModelOptions(llm=str(tmp_path / "llm"), dtype="float32", lora_rank=4)
    model, processor = build.build_model(options, DataOptions(num_points=256))
    run = tmp_path / "run"
    stage_file.save_stage(model, run / stage_file.STAGE_FILE, {"model": {**options.__dict__}})
    with torch.no_grad():
        model.model.modality_projector[1].bias.add_(1)
    exported = model.model.modality_projector[1].bias.detach().clone()
    build.export(model, processor, run / "model")

    loaded, load = [], build.load
    monkeypatch.setattr(build, "load", lambda *a, **k: (loaded.append(load(*a, **k)), loaded[-1])[1])
    cloud = CLOUDS / f"{NAMES[0]}_8192.npy"
    assert chat.main([str(cloud), "--model", str(run), "--question", "What?", "--max-new-tokens", "2"]) == 0
    arguments = ["--task", "captioning", "--limit", "1", "--data", str(CLOUDS / "annotations.json")]
    arguments += ["--clouds", str(CLOUDS), "--sentence_models", "none", "--generation.max_new_tokens", "2"]
    assert evaluate.main([str(run), *arguments, "--output", str(tmp_path / "out")]) == 0
    (first, _, first_hash), (second, _, second_hash) = loaded
    assert first_hash == second_hash == json.loads((tmp_path / "out" / "evaluation.json").read_text())["weights"]
    assert torch.equal(first.cpu().model.modality_projector[1].bias, exported)
    assert all(torch.equal(one, second.state_dict()[name].cpu()) for name, one in first.state_dict().items())


def test_a_stage_file_and_its_exported_folder_answer_alike(tmp_path, tokenizer):
    from conftest import tiny_text_config
    from transformers import AutoModelForCausalLM

    from pointalign import build, stage_file
    from pointalign.build import load
    from pointalign.model_options import DataOptions, ModelOptions

    AutoModelForCausalLM.from_config(tiny_text_config("llama")).save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    options = ModelOptions(llm=str(tmp_path / "llm"), dtype="float32", lora_rank=4, lora_alpha=8)
    trained, processor = build.build_model(options, DataOptions(num_points=256))
    with torch.no_grad():
        for name, one in trained.named_parameters():
            if ".lora_" in name:  # in bfloat16, as a stage file stores it
                one.copy_(torch.randn_like(one).div(10).bfloat16())
    description = {"model": {**options.__dict__}}
    stage_file.save_stage(trained, tmp_path / "run" / stage_file.STAGE_FILE, description)
    alone, one_processor, one_hash = load(str(tmp_path / "run"))
    build.export(alone, one_processor, tmp_path / "run" / "model")
    exported, _, other_hash = load(str(tmp_path / "run"))  # a run's folder: its exported model comes first
    cloud = np.load(CLOUDS / f"{NAMES[0]}_8192.npy").astype(np.float32)
    content = [{"type": "point", "point": cloud}, {"type": "text", "text": "What is this?"}]
    batch = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True)
    with torch.inference_mode():
        expected, first, second = (one.eval()(**batch).logits for one in (trained, alone, exported))
    assert (first - expected).abs().max() < 0.05  # the point branch is stored in bfloat16
    torch.testing.assert_close(second, first, atol=1e-5, rtol=1e-4)
    assert one_hash != other_hash and not any(".lora_" in name for name in alone.state_dict())


def test_the_questions_of_an_annotation_file_are_asked(saved, tmp_path, capsys):
    """Several clouds in a question included; conversations without a cloud in their first question are left out."""
    texts = {
        "one": ("<point>\nHow many legs has it?", "Four."),
        "two": ("Compare <point> and <point>.", "Both stand."),
        "text": ("What is a chair?", "A seat."),
    }
    ids = {"one": NAMES[0], "two": [NAMES[1], NAMES[2]], "text": None}
    entries = [
        {"object_id": ids[kind], "conversation_type": kind,
         "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": truth}]}
        for kind, (question, truth) in texts.items()
    ]  # fmt: skip
    (tmp_path / "mine.json").write_text(json.dumps(entries))
    given = arguments(saved, tmp_path / "out", "--task", "answers", "--data", str(tmp_path / "mine.json"))
    assert evaluate.main(given) == 0
    written = json.loads((tmp_path / "out" / "answers.json").read_text())["results"]
    assert [row["object_id"] for row in written] == [NAMES[0], [NAMES[1], NAMES[2]]]
    assert [row["ground_truth"] for row in written] == ["Four.", "Both stand."]
    task = json.loads((tmp_path / "out" / "evaluation.json").read_text())["tasks"]["answers"]
    assert [row["question"] for row in task["questions"]] == ["How many legs has it?", "Compare object 1 and object 2."]
    assert task["kind"] == "captioning" and task["metrics"]
    capsys.readouterr()
    assert evaluate.main([str(saved), "--task", "answers"]) == 1
    assert "--task answers asks the questions of your file" in capsys.readouterr().err


@pytest.fixture
def no_model(monkeypatch):
    """Whatever is refused is refused before the model is read."""
    from pointalign import build

    monkeypatch.setattr(build, "load", lambda *_, **__: pytest.fail("the model was read"))


def test_what_cannot_be_answered_or_scored_is_refused_before_the_model_is_read(
    saved, tmp_path, no_model, monkeypatch, capsys
):
    own = ["--data", str(CLOUDS / "annotations.json"), "--clouds", str(CLOUDS), "--sentence_models", "none"]
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "answers.jsonl").write_text('{"model": "another"}\n')
    (tmp_path / "empty").mkdir()
    for extra, named in (
        ([*own, "--task", "classification", "geometry"], "--task geometry needs objects with known facts"),
        ([*own, "--task", "captioning", "captioning"], "--task captioning is named twice"),
        (["--task", "modelnet40"], "--task modelnet40 needs --data"),
        ([*own, "--output", str(taken)], "holds another evaluation (model, asked, generation differ)"),
        ([*own, "--clouds", str(tmp_path / "empty")], "no cloud of object"),
        ([*own, "--sentence_models", "a=nowhere"], "--sentence_models a"),
    ):
        assert evaluate.main([str(saved), *extra]) == 1
        assert named in capsys.readouterr().err
    monkeypatch.setattr(metrics, "find_spec", lambda name: None if name == "rouge_score" else name)
    assert evaluate.main([str(saved), *own, "--task", "captioning"]) == 1
    assert "scored with rouge_score: pip install 'pointalign[eval]'" in capsys.readouterr().err
    assert [path.name for path in taken.iterdir()] == ["answers.jsonl"]


def test_an_annotation_file_is_asked_its_questions_and_a_second_task_gets_a_folder(
    saved, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    own = ["--data", str(CLOUDS / "annotations.json"), "--clouds", str(CLOUDS), "--sentence_models", "none"]
    own += ["--limit", "1", "--generation.max_new_tokens", "2"]
    assert evaluate.main([str(saved), *own]) == 0
    assert list(json.loads(Path("runs/evaluation/evaluation.json").read_text())["tasks"]) == ["answers"]
    capsys.readouterr()
    assert evaluate.main([str(saved), *own, "--task", "classification", "--prompts", "0", "--inputs", "true"]) == 0
    assert "runs/evaluation holds another evaluation: this one goes to runs/evaluation-2" in capsys.readouterr().err
    written = json.loads(Path("runs/evaluation-2/evaluation.json").read_text())
    assert list(written["tasks"]) == ["classification-prompt0"]
    assert evaluate.main([str(saved), *own]) == 0, "the same again continues in its folder"
    assert sorted(path.name for path in Path("runs").iterdir()) == ["evaluation", "evaluation-2"]


@pytest.mark.parametrize("given", [None, "x"])
def test_clouds_of_an_annotation_file_are_read_as_the_model_was_trained(given, model, processor, tmp_path, monkeypatch):
    """Unless --up_axis says otherwise; a model that was trained with z up would see them lying."""
    from pointalign.evaluation import tasks
    from pointalign.models import PointAlignFeatureExtractor, PointAlignProcessor

    extractor = PointAlignFeatureExtractor(256, 8, up_axis="z", reading={"missing_color": "grey"})
    model.save_pretrained(tmp_path / "model")
    PointAlignProcessor(extractor, processor.tokenizer, num_query_tokens=4).save_pretrained(tmp_path / "model")
    read, load = set(), tasks.load_point_cloud

    def noted(path, up_axis="y", **reading):
        read.add((up_axis, reading.get("missing_color")))
        return load(path, up_axis, **reading)

    monkeypatch.setattr(tasks, "load_point_cloud", noted)
    given_axis = ["--up_axis", given] if given else []
    own = ["--data", str(CLOUDS / "annotations.json"), "--clouds", str(CLOUDS), "--sentence_models", "none"]
    own += ["--limit", "1", "--generation.max_new_tokens", "2", "--output", str(tmp_path / "out"), *given_axis]
    assert evaluate.main([str(tmp_path / "model"), *own]) == 0
    assert (given or "z", "grey") in read  # the report draws its pictures without the model
