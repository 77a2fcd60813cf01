"""The audit end to end: what looks is called grounded, what does not is not; resumed, offline, within its time."""

import json
import re
from html.parser import HTMLParser
from time import process_time

import made_adapters
import numpy as np
import pytest
from conftest import lively, tiny_model

from pointalign.audit import adapter, measures, plan, summary
from pointalign.audit.__main__ import main
from pointalign.evaluation import answering


def audit(folder, name, *more):
    arguments = [name, "--objects", "procedural", "--quick", "--output", str(folder / "out"), *more]
    if name in made_adapters.ADAPTERS:
        arguments += ["--adapter", made_adapters.write(folder, name)]
    assert main(arguments) == 0
    return json.loads((folder / "out" / "audit.json").read_text())


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("oracle")
    return folder, audit(folder, "oracle")


def test_who_reads_the_cloud_is_grounded_and_flips_exactly_on_counterfactuals(oracle):
    _, result = oracle
    assert result["verdict"] == "grounded" and all(test["met"] for test in result["criteria"].values())
    cells = result["counterfactuals"]["cells"]
    flips = {(edit, kind) for edit, kinds in cells.items() for kind, cell in kinds.items() if cell["must"] == "flip"}
    assert flips == {("stretched", "taller or wider"), ("recoloured", "colour")}
    for edit, kinds in cells.items():
        for kind, cell in kinds.items():
            flipped = (edit, kind) in flips
            assert cell["same answer"]["mean"] == (0 if flipped else 1), (edit, kind)
            assert cell["right before and after"]["mean"] == (0 if kind == "name" else 1), (edit, kind)
            assert cell["same answer"]["count"] >= 3
    kinds = result["inputs"]["kinds"]
    for kind in ("colour", "taller or wider", "longest side", "taller, yes or no"):
        assert kinds[kind]["said"]["true"]["mean"] == 1 and kinds[kind]["likelihood"]["true"]["mean"] == 1
        assert kinds[kind]["said"]["blind"]["mean"] == kinds[kind]["said"]["zeroed"]["mean"] == 0
        assert kinds[kind]["said"]["shuffled"]["mean"] < 1
    assert result["noise"]["noise"]["mean"] == 1 and result["noise"]["objects"]["mean"] == 0
    assert result["noise"]["told apart"]["mean"] == 1
    probes = result["retention"]["probes"]
    assert probes["height over width"]["0"]["mean"] > 0.9 > 0.3 > probes["height over width"]["2"]["mean"]
    assert result["invariances"]["yaw, degrees"]["180"]["same answer"]["mean"] == 1


@pytest.mark.parametrize("name", ["ignorant", "capricious"])
def test_who_does_not_look_is_not_grounded(name, tmp_path):
    """Whether it always says the same, or anything at all."""
    result = audit(tmp_path, name)
    assert result["verdict"] == "not grounded" and not any(test["met"] for test in result["criteria"].values())
    assert result["retention"] is None
    cells = result["counterfactuals"]["cells"]
    if name == "ignorant":
        assert all(cell["same answer"]["mean"] == 1 for kinds in cells.values() for cell in kinds.values())
        assert cells["stretched"]["taller or wider"]["right before and after"]["mean"] == 0
        assert result["noise"]["noise"]["mean"] == 0
        assert result["calibration"]["names"]["confidence less accuracy"]["mean"] > 0.5
    else:
        assert cells["stretched"]["taller or wider"]["same answer"]["mean"] < 1


def test_a_stopped_audit_goes_on_and_gives_the_same(oracle, tmp_path, monkeypatch, capsys):
    _, expected = oracle
    calls = []
    get = answering.Journal.get

    def stops(self, key, compute):
        calls.append(key)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return get(self, key, compute)

    arguments = ["oracle", "--objects", "procedural", "--quick", "--output", str(tmp_path / "out")]
    arguments += ["--adapter", made_adapters.write(tmp_path, "oracle")]
    monkeypatch.setattr(answering.Journal, "get", stops)
    assert main(arguments) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "out" / "audit.json").exists()
    monkeypatch.setattr(answering.Journal, "get", get)
    known = (tmp_path / "out" / "answers.jsonl").read_text().count("\n")
    result = audit(tmp_path, "oracle")
    assert known == 4 and result["seconds"]["resumed"] and not expected["seconds"]["resumed"]
    for changing in ("seconds", "provenance"):
        expected, result = ({k: v for k, v in one.items() if k != changing} for one in (expected, result))
    assert result == expected
    assert main([*arguments, "--seed", "1"]) == 1
    assert "belongs to another run (asked differ)" in capsys.readouterr().err


def test_the_card_says_what_is_good_and_what_is_bad(oracle):
    _, result = oracle
    good, bad = summary.good_and_bad(result).split("Bad:")
    assert good.startswith("**grounded**") and "- colour flips when the cloud is recoloured: 100 [100, 100]" in good
    assert "- name: 0 [0, 0] right with its cloud, 0 [0, 0] with another's" in bad
    assert "- hedges or refuses on noise: 100 [100, 100], on objects: 0 [0, 0]" in good
    assert "- probe of height over width, R², at the input and after the last layer: 100 [100, 100]" in bad
    assert "- confidence less accuracy, names: 90 [90, 90]" in bad
    assert "| stretched: taller or wider | flip | 100 [100, 100] | 0 [0, 0] |" in summary.summary(result)


class Tags(HTMLParser):
    """Counts of opened and closed tags, and everything that points outside."""

    def __init__(self):
        super().__init__()
        self.open, self.outside = {}, []

    def handle_starttag(self, tag, attributes):
        self.open[tag] = self.open.get(tag, 0) + 1
        self.outside += [v for k, v in attributes if k in ("src", "href") and not (v or "").startswith("data:")]

    def handle_endtag(self, tag):
        self.open[tag] = self.open.get(tag, 0) - 1


def test_the_report_is_one_offline_file(oracle):
    folder, result = oracle
    page = (folder / "out" / "audit.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert tags.outside == [] and "http" not in page and "<script" not in page and "url(" not in page
    assert {
        tag: n for tag, n in tags.open.items() if tag in ("div", "svg", "figure", "table", "details", "p", "h2") and n
    } == {}
    assert page.count("<img") == 2 * len(result["pictures"]) > 8
    assert page.count("<svg") == 4 + 3 + 2  # groups of invariances, properties, reliability diagrams
    assert re.search(r"class='verdict good'>grounded<", page)


def test_the_tiny_model_is_audited_in_seconds(processor, tmp_path):
    lively(tiny_model()).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    began = process_time()
    result = audit(tmp_path, str(tmp_path / "model"))
    assert process_time() - began < 100, "CPU seconds; two minutes on two cores are promised"
    assert result["verdict"] == "not grounded", "its weights are random"
    assert list(result["retention"]["probes"]["main colour"]) == ["Q-Former", "0", "1", "2", "3", "4"]
    assert result["calibration"]["names"] is not None and result["weights"]
    assert result["inputs"]["kinds"]["all"]["likelihood"]["true"]["count"] > 40


def test_our_adapter_shows_the_cloud_and_replaces_one_of_zeros(processor, clouds, tmp_path):
    """Against the processor's own way from cloud to answer; batches mix prompts with and without clouds."""
    from pointalign.audit import own_adapter
    from pointalign.certainty import generate_answers

    model = lively(tiny_model())
    loaded = own_adapter.Loaded(model, processor, "hash")
    shown = [clouds[0], None, np.zeros((64, 6), dtype=np.float32), clouds[1]]
    options = ["This is a chair.", "This is a lamp."]
    ours = adapter.find("pointalign")
    replies = ours.reply(loaded, ["What is this?"] * 4, shown, [options, options, [], options])
    assert len({reply["text"] for reply in replies}) > 2 and replies[2]["scores"] is None
    for reply, cloud in zip(replies, shown, strict=True):
        if cloud is None or not cloud.any():
            continue
        content = [{"type": "point", "point": cloud}, {"type": "text", "text": "What is this?"}]
        batch = processor.apply_chat_template(
            [[{"role": "user", "content": content}]], tokenize=True, add_generation_prompt=True
        )
        (direct,) = generate_answers(model, processor, batch, max_new_tokens=24, do_sample=False)
        assert reply["text"] == direct.text and reply["probability"] == pytest.approx(direct.probability, rel=1e-3)
    assert replies[0]["scores"] != replies[1]["scores"] != replies[3]["scores"]


def test_what_an_adapter_gets_wrong_is_named(tmp_path, capsys):
    head = "def load(model): return None\ndef prompt(loaded, question, cloud): return question\n"
    reply = '{"text": "x", "probability": 0.5, "scores": None}'
    for body, named in {
        "": "the functions load, prompt, answer; answer is missing",
        "def answer(loaded, prompts, candidates): return []": "gave 0 replies to 16 prompts",
        'def answer(loaded, prompts, candidates): return [{"text": 3}] * len(prompts)': "`text` is 3, expected",
        f"def answer(l, prompts, c): return [{reply.replace('0.5', '-2')}] * len(prompts)": "`probability` is -2",
        f"def answer(l, prompts, c): return [{reply.replace('None', '[0.0]')}] * len(prompts)": "`scores` is [0.0]",
    }.items():
        path = tmp_path / "broken.py"
        path.write_text(head + body + "\n")
        arguments = ["m", "--adapter", str(path), "--objects", "procedural", "--quick"]
        assert main([*arguments, "--output", str(tmp_path / "out")]) == 1
        assert named in capsys.readouterr().err
    assert main(["m", "--adapter", "nowhere.py"]) == 1
    assert "expected pointalign, pointllm, or a Python file" in capsys.readouterr().err
    assert main(["m", "--objects", "cars"]) == 1
    assert "expected furniture or procedural" in capsys.readouterr().err


def test_every_option_stands_in_help(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    for name, default in (("adapter", "pointalign"), ("objects", "furniture"), ("seed", "0"), ("batch_size", "16")):
        assert f"--{name} " in printed and f"(default: {default})" in printed
    assert "--quick" in printed and "runs/audit" in printed


def test_what_an_answer_states():
    item = plan.Item("a", "a", "name", "?", "chair", {"chair": "", "lamp": "", "car": ""})
    for text, expected in {
        "This is an office chair.": "chair",
        "It looks like a lamp.": "lamp",
        "This is a 3D model of a red car with a chair on top.": "car",
        "This is a zebra.": "zebra",
        "": None,
    }.items():
        assert measures.stated(item, text) == expected, text
    assert measures.abstains("It looks like a chair.") and measures.abstains(" ") and measures.abstains("I'm not sure.")
    assert not measures.abstains("This is a chair.") and not measures.abstains("This is a nothingness.")


def test_confidence_is_measured():
    rows = np.array([[0.9, 1], [0.8, 1], [0.7, 0], [0.2, 0], [0.1, 0]])
    assert measures.auroc(rows) == 1 and measures.auroc(rows * [-1, 1]) == 0
    assert measures.auroc(np.array([[0.5, 1], [0.5, 0]])) == 0.5 == measures.auroc(rows[:2])
    assert measures.calibration_error(rows) == pytest.approx((0.1 + 0.2 + 0.7 + 0.2 + 0.1) / 5)
    perfect = np.array([[1.0, 1]] * 10 + [[0.0, 0]] * 10)
    assert measures.calibration_error(perfect) == 0


def test_the_verdict_needs_every_criterion_in_the_right_direction():
    def test_of(mean, p):
        return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "count": 9, "p": p}

    names = list(measures.CRITERIA)
    assert measures.verdict({name: test_of(0.3, 0.001) for name in names}) == "grounded"
    assert measures.verdict({name: test_of(0.3, 0.04) for name in names}) == "not grounded", "Holm counts three tests"
    assert measures.verdict({name: test_of(-0.3, 0.001) for name in names}) == "not grounded"
    mixed = {name: test_of(0.3, p) for name, p in zip(names, (0.001, 0.5, 0.5), strict=True)}
    assert measures.verdict(mixed) == "partly grounded" and [test["met"] for test in mixed.values()] == [
        True,
        False,
        False,
    ]
