"""The published protocol, by an independent implementation of its formulas on 50 generated answers."""

import itertools
import json
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from pointalign import assets
from pointalign.data.dataset import CLASSES
from pointalign.evaluation import caption_metrics, judge_files, protocol
from pointalign.evaluation.answering import with_input
from pointalign.evaluation.caption_metrics import embed, pooling_of, similarity_name
from pointalign.evaluation.choices import Question
from pointalign.evaluation.judge import JudgeOptions, build_judge
from pointalign.evaluation.judge_prompts import OURS, Case, read_prompts
from pointalign.evaluation.protocol import PROTOCOLS, counts, output, tolerant_verdict
from pointalign.evaluation.tasks import Task

# 50 generated answers with the F values of ROUGE-1, -2 and -L by the Python package `rouge` 1.0.1
GENERATED = json.loads((Path(__file__).parent / "rouge_values.json").read_text())["rows"]
PAIRS = [(row["answer"], row["truth"]) for row in GENERATED]
# By stem, or by WordNet of the stems, as nltk looks them up: "automobil" is not in WordNet, so it is no car.
SAME = ({"chair", "chairs"}, {"leg", "legs"}, {"sofa", "couch"})


def bleu_by_formula(answer: str, truth: str, weights: tuple[float, ...]) -> float:
    said, meant = answer.split(), truth.split()
    logs = 0.0
    for order, weight in enumerate(weights, 1):
        grams, references = (
            Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1)) for words in (said, meant)
        )
        right, total = sum((grams & references).values()), max(1, sum(grams.values()))
        if order == 1 and not right:
            return 0.0
        logs += weight * math.log((right or 0.1) / total)  # smoothing method 1
    brevity = 1.0 if len(said) > len(meant) else math.exp(1 - len(meant) / len(said))
    return brevity * math.exp(logs)


def meteor_by_formula(answer: str, truth: str) -> float:
    """For texts in which no word occurs twice and none has two partners: the alignment is then the only one."""
    said, meant = answer.lower().split(), truth.lower().split()
    places = {word: place for place, word in enumerate(meant)}
    aligned = {i: places.pop(word) for i, word in enumerate(said) if word in places}
    for i, word in enumerate(said):
        partners = [other for other in places if any({word, other} == pair for pair in SAME)]
        if i not in aligned and partners:
            aligned[i] = places.pop(partners[0])
    if not aligned:
        return 0.0
    order = sorted(aligned.items())
    chunks = 1 + sum(b != (a[0] + 1, a[1] + 1) for a, b in itertools.pairwise(order))
    precision, recall = len(order) / len(said), len(order) / len(meant)
    mean = precision * recall / (0.9 * precision + 0.1 * recall)
    return mean * (1 - 0.5 * (chunks / len(order)) ** 3)


needs_wordnet = pytest.mark.skipif(
    not (assets.home() / "nltk_data" / "corpora" / "wordnet").exists(),
    reason="METEOR needs WordNet, which `python -m pointalign.assets` fetches",
)


@needs_wordnet
def test_every_traditional_figure_is_that_of_its_formula():
    pytest.importorskip("nltk", reason="BLEU and METEOR need nltk (extra: eval)")
    pytest.importorskip("rouge_score", reason="the stemmed ROUGE needs rouge-score (extra: eval)")
    scores = caption_metrics.caption_scores(*(list(texts) for texts in zip(*PAIRS, strict=True)))
    pairs = [(answer or "##", truth) for answer, truth in PAIRS]
    weights = {"bleu-1": (1.0,), "bleu-2": (0.5,) * 2, "bleu-3": (0.33,) * 3, "bleu-4": (0.25,) * 4}
    expected = {name: [bleu_by_formula(*pair, part) for pair in pairs] for name, part in weights.items()}
    expected |= {f"rouge-{n}": [row["rouge"][place] for row in GENERATED] for place, n in enumerate("12l")}
    expected["meteor"] = [meteor_by_formula(*pair) for pair in pairs]
    assert len(PAIRS) == 50 and list(scores)[:8] == list(expected)
    for name, values in expected.items():
        assert scores[name] == pytest.approx(values, abs=1e-6), name
        assert 100 * np.mean(scores[name]) == pytest.approx(100 * np.mean(values), abs=1e-4), name
    assert np.mean(scores["ROUGE-1, stemmed"]) > np.mean(scores["rouge-1"]) + 0.01, "stems and case are ours alone"
    assert scores["BLEU-3, equal weights"] != scores["bleu-3"]


def test_rouge_reads_sentences_as_the_package_does():
    for row in GENERATED:
        found = caption_metrics.rouge(row["answer"] or "##", row["truth"])
        assert list(found.values()) == pytest.approx(row["rouge"], abs=1e-9)
    assert caption_metrics.rouge("...", "A chair.") == {"rouge-1": 0.0, "rouge-2": 0.0, "rouge-l": 0.0}
    assert caption_metrics.rouge("a a a chair", "a chair")["rouge-1"] == pytest.approx(1), "a repeated word counts once"


def cases(kind: str) -> tuple[list[Case], list[str], list[float | None]]:
    """50 cases, replies, and what each reply means: None where it cannot be used."""
    rng = random.Random(5)
    made, replies, meant = [], [], []
    for number in range(50):
        label = rng.choice(CLASSES)
        made.append(Case("a chair", f"answer {number}", label, CLASSES if kind == "class" else ()))
        usable = rng.random() < 0.8
        if kind == "object":
            right = rng.random() < 0.5
            replies.append(rng.choice(["T#", " t, the same", "True"] if right else ["F#", "false"]) if usable else "No")
            meant.append(float(right) if usable else None)
        elif kind == "class":
            index = CLASSES.index(label) if rng.random() < 0.5 else rng.randrange(40)
            valid = [f"{index}#{label}#why", f"Output: {index}#x#why", f"{index}"]
            replies.append(rng.choice(valid if usable else ["-1#NA#Cannot infer", "40#?#", "a chair", ""]))
            meant.append(float(index) if usable else None)
        else:
            score = rng.randrange(101)
            valid = [f"{score}#why", f"Score: {score}#why", f" {score} "]
            replies.append(rng.choice(valid if usable else ["101#", "#none", "eighty"]))
            meant.append(float(score) if usable else None)
    return made, replies, meant


@pytest.mark.parametrize("kind", ["object", "class", "caption"])
def test_every_judged_figure_is_that_of_its_formula(kind):
    made, replies, meant = cases(kind)
    assert [tolerant_verdict(kind, reply) for reply in replies] == meant
    found = counts(kind, replies, made)
    invalid = meant.count(None)
    usable = [value for value in meant if value is not None]
    assert invalid >= 5 and (found["total_predictions"], found["invalid_responses"]) == (50, invalid)
    if kind == "caption":
        assert found["average_score"] == pytest.approx(np.mean(usable), abs=1e-4)
    elif kind == "object":
        assert found["accuracy"] == pytest.approx(100 * np.mean(usable), abs=1e-4)
        assert found["minigpt3d"]["accuracy"] == pytest.approx(100 * sum(usable) / (50 - 2 * invalid), abs=1e-4)
    else:
        random.seed(0)
        guesses = [random.choice(range(40)) if value is None else value for value in meant]
        right = [guess == CLASSES.index(case.label) for guess, case in zip(guesses, made, strict=True)]
        sure = [r for r, value in zip(right, meant, strict=True) if value is not None]
        assert found["accuracy"] == pytest.approx(100 * np.mean(right), abs=1e-4)
        assert found["clean_accuracy"] == pytest.approx(100 * np.mean(sure), abs=1e-4)
        assert found["minigpt3d"]["clean_accuracy"] == pytest.approx(100 * sum(sure) / (50 - 2 * invalid), abs=1e-4)
        assert found["invalid_correct_predictions"] == sum(right) - sum(sure)


def test_a_number_before_a_mark_counts_wherever_it_stands():
    """What a strict reader would refuse, and the published evaluator takes."""
    assert tolerant_verdict("caption", "87.5#most") == 5 and tolerant_verdict("caption", "about 80") is None
    assert tolerant_verdict("class", "-1#chair#no") == 1 and tolerant_verdict("class", "1#NA#no") is None
    assert tolerant_verdict("class", "1#chair#yes\nand more") is None or tolerant_verdict("class", "8#a#b\n") == 8
    assert tolerant_verdict("object", "") is None and tolerant_verdict("object", "Two chairs") == 1
    none = counts("class", ["?"] * 2, [Case("", "", CLASSES[0], CLASSES)] * 2)
    assert none["accuracy"] == none["clean_accuracy"] == 0


def test_presets_decode_as_the_published_code():
    greedy, pointllm, release = (PROTOCOLS[name] for name in ("greedy", "pointllm", "minigpt3d"))
    assert greedy.arguments("captioning") == {
        "max_new_tokens": 96, "do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None,
    }  # fmt: skip
    sampling = {"do_sample": True, "num_beams": 1, "temperature": 1.0, "top_k": 50, "top_p": 0.95}
    assert pointllm.arguments("modelnet40") == sampling | {"max_length": 2048}
    assert pointllm.arguments("captioning", 7) == sampling | {"max_new_tokens": 7}
    beams = {"do_sample": True, "num_beams": 2, "temperature": 0.2, "top_k": 50, "top_p": 0.7, "min_new_tokens": 10}
    assert release.arguments("modelnet40") == beams | {"max_new_tokens": 100}
    assert release.arguments("classification") == release.arguments("captioning") == beams | {"max_new_tokens": 150}
    text = "  This is a Chair<unk> ### A Bed"
    assert [preset.process(text) for preset in (greedy, pointllm, release)] == [
        "This is a Chair<unk>", "This is a Chair<unk>", "this is a chair",
    ]  # fmt: skip
    assert release.process("Assistant: A Chair") == "assistant: a chair", "the split comes after the lower case"


def test_modelnet_output_is_counted_right_by_the_published_formula():
    """Row and class index are integers: the published evaluator compares the judge's index with `ground_truth`."""
    labels = ["night stand", "airplane", "xbox"]
    questions = [Question(str(i), (str(i),), "What is this?", label, label) for i, label in enumerate(labels)]
    task = Task("modelnet40-prompt0", "modelnet40", "What is this?", questions)
    written = json.loads(json.dumps(output(task, [f"A {label}." for label in labels])))
    perfect = [f"{CLASSES.index(label)}#{label}#named" for label in labels]
    rows = written["results"]
    assert [tolerant_verdict("class", reply) for reply in perfect] == [row["ground_truth"] for row in rows]
    assert [row["object_id"] for row in rows] == [0, 1, 2] and rows[0]["label_name"] == "night stand"
    shuffled = output(with_input(task, "zeroed"), ["a", "b", "c"])["results"]
    assert [row["object_id"] for row in shuffled] == [0, 1, 2], "the object that is asked about"
    pair = Task("t", "captioning", "", [Question("0/a+b", ("a", "b"), "?", "Both stand.")])
    assert output(pair, ["x"])["results"][0]["object_id"] == ["a", "b"]


def test_a_genuine_modelnet_file_is_judged_by_rules(tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "sentence_encoder", lambda: tmp_path / "encoder")
    monkeypatch.setattr(caption_metrics, "embed", lambda folder, texts, name="": torch.eye(64)[: len(texts)])
    rows = [{"object_id": i, "ground_truth": truth, "model_output": f"This is a {name}.", "label_name": CLASSES[truth]}
            for i, (truth, name) in enumerate([(8, "chair"), (23, "night stand"), (0, "sofa")])]  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps({"prompt": "What is this?", "results": rows}))
    line = judge_files.judge_file(tmp_path / "a.json", "class", JudgeOptions(model="string"))
    judged = json.loads((tmp_path / "a.judged.json").read_text())
    assert [row["verdict"] for row in judged["results"]] == [1.0, 1.0, 0.0]
    assert "accuracy 66.67, clean accuracy 66.67, 0 invalid" in line and "the judge is a set of rules" in line
    assert judged["judge_prompt"] is None and judged["protocol"]["correct_predictions"] == 2


SOURCE = '''
import openai  # nothing of this file is run
gpt4_open_free_from_cls_prompt = """Same? 1. {ground_truth} 2. {model_output}\\nOutput: """  # a remark
chatgpt_close_set_cls_prompt = """Of these:\\n{candidate_lists}\\nInput: """
gpt4_close_set_cls_prompt = chatgpt_close_set_cls_prompt
raise SystemExit
'''


def test_prompts_are_read_from_a_published_evaluator(tmp_path):
    (tmp_path / "evaluator.py").write_text(SOURCE)
    prompts = read_prompts(tmp_path / "evaluator.py")
    assert prompts.text("object", Case("a {model_output}", "a bed")) == "Same? 1. a {model_output} 2. a bed\nOutput: "
    listed = Case("chair", "It is {ground_truth}.", "chair", ("chair", "bed"))
    assert prompts.text("class", listed) == "Of these:\n0: chair\n1: bed\nInput: It is {ground_truth}.\nOutput: "
    assert "caption" not in prompts.templates and prompts.described("object") == "evaluator.py, not a published one"
    (tmp_path / "p.json").write_text(json.dumps({"caption": OURS.templates["caption"]}))
    same = read_prompts(tmp_path / "p.json")
    assert same.sha256("caption") == OURS.sha256("caption") and same.owner("caption") is None
    for text, message in (('{"captions": "x"}', "got captions"), ('{"object": "x"}', "no place {ground_truth}")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_prompts(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="needs a language model as judge"):
        JudgeOptions(model="string", prompts="p.json")


def test_the_prompts_of_a_file_are_asked_and_recorded(tmp_path, tokenizer, monkeypatch):
    from conftest import tiny_text_config
    from transformers import AutoModelForCausalLM

    from pointalign.evaluation import judge_prompts
    from pointalign.evaluation.local_judges import LocalJudge

    AutoModelForCausalLM.from_config(tiny_text_config("llama")).save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    (tmp_path / "evaluator.py").write_text(SOURCE)
    options = JudgeOptions(model=str(tmp_path / "llm"), prompts=str(tmp_path / "evaluator.py"))
    asked = []
    monkeypatch.setattr(LocalJudge, "reply", lambda self, kind, case: asked.append(self.question(kind, case)) or "T#")
    rows = [{"object_id": "a", "ground_truth": "a chair", "model_output": "A seat."}]
    (tmp_path / "a.json").write_text(json.dumps({"prompt": "What is this?", "results": rows}))
    line = judge_files.judge_file(tmp_path / "a.json", "object", options)
    assert asked == ["Same? 1. a chair 2. A seat.\nOutput: "] and "evaluator.py, not a published one" in line
    digest = build_judge(options).prompts.sha256("object")
    assert json.loads((tmp_path / "a.judged.json").read_text())["judge_prompt"]["sha256"] == digest
    monkeypatch.setitem(judge_prompts.PUBLISHED, digest, "PointLLM's")
    assert "judge's object prompt" not in judge_files.judge_file(tmp_path / "a.json", "object", options)
    with pytest.raises(ValueError, match=r"evaluator\.py holds no prompt of kind caption"):
        judge_files.judge_file(tmp_path / "a.json", "caption", options)


def test_simcse_is_read_at_its_pooler_because_of_its_name_alone(tmp_path, tokenizer):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertModel(BertConfig(vocab_size=259, **sizes)).eval()
    folders = [tmp_path / "sup-simcse-roberta-large", tmp_path / "encoder"]
    for folder in folders:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        assert pooling_of(folder) == "mean" and pooling_of(folder, "simcse") == "pooler"
    with torch.no_grad():
        pooled = model(**tokenizer("a chair", return_tensors="pt", return_token_type_ids=False)).pooler_output
    for folder in folders:
        found = embed(folder, ["a chair"], "simcse")
        torch.testing.assert_close(found, torch.nn.functional.normalize(pooled, dim=-1))
        assert not torch.allclose(found, embed(folder, ["a chair"]), atol=1e-3)
    assert [similarity_name(name) for name in ("sbert", "simcse", "MiniLM")] == [
        "sbert_similarity", "simcse_similarity", "MiniLM cosine",
    ]  # fmt: skip


def test_a_protocol_that_is_not_known_is_refused():
    from pointalign.evaluation.results import EvaluationOptions

    with pytest.raises(ValueError, match="--protocol odd: expected one of greedy, pointllm, minigpt3d"):
        EvaluationOptions(protocol="odd")
    assert protocol.END == "###"
