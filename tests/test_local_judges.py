"""Judges on this computer: rules, and a language model that may think first."""

from pointalign.evaluation.judge import JudgeOptions, build_judge, judge_cases
from pointalign.evaluation.judge_prompts import Case
from pointalign.evaluation.judge_replies import verdict
from pointalign.evaluation.local_judges import StringJudge

CASES = [Case(f"a chair {i}", f"This is chair {i}.", "chair") for i in range(6)]


def test_a_local_model_that_thinks_gets_room_for_its_verdict(tmp_path, tokenizer, monkeypatch):
    from conftest import tiny_text_config
    from transformers import AutoModelForCausalLM

    from pointalign.evaluation.local_judges import SHORT_REPLY, LocalJudge

    AutoModelForCausalLM.from_config(tiny_text_config("llama")).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    limits = []
    replies = {SHORT_REPLY: "<think>Let me see", 200: "<think>Let me see.</think>T#same"}

    def generate(self, batch, limit):
        limits.append(limit)
        return torch.zeros(limit), replies[limit]

    import torch

    monkeypatch.setattr(LocalJudge, "_generate", generate)
    judge = build_judge(JudgeOptions(model=str(tmp_path), max_tokens=200))
    assert verdict("object", judge.reply("object", CASES[0]), CASES[0]) == 1.0 and limits == [SHORT_REPLY, 200]
    replies[SHORT_REPLY] = "T#same"
    judge.reply("object", CASES[0])
    assert limits == [SHORT_REPLY, 200, SHORT_REPLY]  # another model is not asked for more


def test_rules_judge_without_a_model(tmp_path, monkeypatch):
    import torch

    from pointalign.evaluation import caption_metrics

    vectors = {"couch": [1.0, 0.0], "sofa": [0.9, 0.436], "tree": [0.0, 1.0]}

    def embed(folder, texts):
        known = [next((v for word, v in vectors.items() if word in text), [0.6, 0.8]) for text in texts]
        return torch.tensor(known)

    monkeypatch.setattr(caption_metrics, "embed", embed)
    cases = [
        Case("This is a couch.", "This is a red sofa.", "couch"),  # near in meaning
        Case("This is a couch.", "This is a tree.", "couch"),
        Case("A wooden chair with arms.", "This is a chair.", "chair"),
    ]
    judge = StringJudge(tmp_path)
    judged = judge_cases(judge, "object", cases, tmp_path / "stored.jsonl")
    assert judged.values == [1.0, 0.0, 1.0]
    listed = [Case("sofa", "This is a fine couch.", "sofa", classes=("tree", "sofa", "chair"))]
    assert judge_cases(judge, "class", listed, tmp_path / "stored.jsonl").values == [1.0]
    assert judge_cases(judge, "class", [Case("", "a tree chair", "tree", classes=("tree", "chair"))],
                       tmp_path / "stored.jsonl").values == [0.0]  # fmt: skip


def test_a_local_model_judges(tmp_path, tokenizer):
    from conftest import tiny_text_config
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "judge"
    AutoModelForCausalLM.from_config(tiny_text_config("llama")).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    judge = build_judge(JudgeOptions(model=str(folder)))
    judged = judge_cases(judge, "object", CASES[:2], tmp_path / "stored.jsonl")
    assert judged.usage.requests == 2 and judged.usage.completion_tokens > 0
    assert judged.values == [None, None]  # random weights say nothing usable, and that is reported
    AutoModelForCausalLM.from_config(tiny_text_config("phi")).save_pretrained(tmp_path / "other" / "judge")
    tokenizer.save_pretrained(tmp_path / "other" / "judge")
    other = build_judge(JudgeOptions(model=str(tmp_path / "other" / "judge")))
    assert other.name != judge.name  # a reply is stored under the judge's name
    again = build_judge(JudgeOptions(model=str(folder)))
    assert [again.reply("object", case) for case in CASES[:2]] == judged.replies
