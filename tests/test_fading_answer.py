"""The answer of the study of fading follows the rules that were fixed in advance, and the committed one its cells."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import fading_tables

from experiments.fading import __main__ as command
from experiments.fading import conclusion, figure, summary
from experiments.fading.grid import ARMS, BASELINE, LAYERS, METHOD, STUDIES, WRONG_TARGETS
from experiments.fading.things import FACTORS_B
from pointalign.evaluation import probe


def made_cell(right: float, lost: float, captioned: float, seed: int) -> dict:
    """A cell of 60 objects with these shares of right words and captions, and B lost over the layers."""
    rng = np.random.default_rng([seed, 9])
    jitter = 0.004 * rng.normal()
    places = [probe.QFORMER, *map(str, range(LAYERS + 1))]
    curve = {place: 0.95 - (lost + jitter) * max(0, number - 1) / LAYERS for number, place in enumerate(places)}
    difficulty = np.random.default_rng(3).random((60, 4))  # of the same objects in every arm
    digits = "".join(str(int(count)) for count in (difficulty + jitter < right).sum(axis=1))
    named = "".join("2" if value < captioned else "0" for value in (np.arange(60) + 0.5) / 60)
    return {
        "few-shot": {"16": digits, "64": digits},
        "few-shot by factor": {"16": dict.fromkeys(FACTORS_B, right), "64": dict.fromkeys(FACTORS_B, right)},
        "captions": named,
        "losses": {"ntp": [1.0] * 8 + [0.1, 0.1], "alignment": [0.0] * 10},
        "probes": {f"B: {name}": curve for name in FACTORS_B} | {"A: shape": dict.fromkeys(places, 1.0)},
        "probes on all tokens": {f"B: {name}": {"0": 0.9, "3": 0.9, str(LAYERS): 0.9} for name in FACTORS_B},
        "retrieval at equal A": {"3": 0.5, str(LAYERS): 0.5 + jitter},
        "seconds": 1.0,
        "versions": {"device": "CPU", "torch": "2", "transformers": "5", "commit": "abc", "date": "2026-01-01"},
    }


def content_of(right: dict[str, float], lost: float = 0.3, captioned: float = 1.0, seeds: int = 5) -> dict:
    """Arms with these shares of right words, the method with this share of exact captions."""
    cells = {
        arm: {
            seed: made_cell(share, lost, captioned if arm == METHOD else 1.0, seed) | {"seed": seed}
            for seed in range(seeds)
        }
        for arm, share in right.items()
    }
    return summary.summarise(cells) | {
        "gate": {"read": {"B: bend": 0.9}},
        "versions": made_cell(0.5, 0.1, 1.0, 0)["versions"],
        "definition": {"sizes": {"captions": {"steps": 3, "batch_size": 2}, "few_shot_steps": {"16": 5, "64": 9}}},
        "missing": [],
    }


OTHER, RANDOM = WRONG_TARGETS


@pytest.mark.parametrize(
    ("right", "more", "expected"),
    [
        ({METHOD: 0.8, OTHER: 0.6, RANDOM: 0.6}, {}, "yes"),
        ({METHOD: 0.8, OTHER: 0.6, RANDOM: 0.8}, {}, "not the target"),
        ({METHOD: 0.8, OTHER: 0.6}, {}, "not the target"),
        ({METHOD: 0.8, OTHER: 0.6, RANDOM: 0.6}, {"captioned": 0.9}, "price"),
        ({METHOD: 0.6, OTHER: 0.6, RANDOM: 0.6}, {}, "no"),
        ({METHOD: 0.4, OTHER: 0.6, RANDOM: 0.6}, {}, "worse"),
        ({METHOD: 0.8, OTHER: 0.6, RANDOM: 0.6}, {"lost": 0.0}, "untested"),
        ({METHOD: 0.8, OTHER: 0.6, RANDOM: 0.6}, {"seeds": 4}, "unfinished"),
        ({METHOD: 0.8, OTHER: 0.6, RANDOM: 0.6}, {"seeds": 1}, "unfinished"),
        ({}, {}, "unfinished"),
    ],
)
def test_the_answer_follows_the_rules_that_were_fixed_in_advance(right, more, expected):
    content = content_of({BASELINE: 0.6} | right, **more)
    assert conclusion.verdict(content) == expected
    text = "\n".join(conclusion.paragraphs(content))
    assert text.startswith(f"**{conclusion.ANSWERS[expected]}**")
    assert ("most of all alignment 1" in text) == (expected in ("yes", "not the target", "price", "untested"))
    assert ("is shown to raise few-shot accuracy in the main setting" in text) == (expected in ("no", "worse"))
    assert expected != "yes" or "says little" not in text
    assert ("nothing is recommended" in text) == (expected == "unfinished") == ("margin of" not in text)


def test_a_measure_near_its_floor_is_called_insensitive():
    text = "\n".join(conclusion.paragraphs(content_of({BASELINE: 0.52, METHOD: 0.55, OTHER: 0.52, RANDOM: 0.52})))
    assert "the best arm, alignment 1, has 5" in text and "says little for or against" in text


def test_lambdas_are_corrected_together_and_differences_are_paired():
    content = content_of({BASELINE: 0.6, METHOD: 0.8, "alignment 0.1": 0.6, OTHER: 0.6, RANDOM: 0.6})
    rows = conclusion.by_name(content)
    method = rows[METHOD]["difference"]["few-shot"]
    assert method["p_holm"] == pytest.approx(min(1, 2 * method["p"])), "two lambdas, the smaller p first"
    assert rows["alignment 0.1"]["difference"]["few-shot"]["mean"] == 0
    gain = rows[METHOD]["few-shot, mean over k"]["mean"] - rows[BASELINE]["few-shot, mean over k"]["mean"]
    assert method["mean"] == pytest.approx(gain) == pytest.approx(np.mean(method["per_seed"]))


def test_settings_beside_the_main_one_are_told_apart_from_it():
    plain, trained = "trained projector, no alignment", "trained projector, alignment 1"
    right = {BASELINE: 0.6, METHOD: 0.6, OTHER: 0.6, RANDOM: 0.6, plain: 0.6, trained: 0.8}
    right |= {"width 96, no alignment": 0.6, "width 96, alignment 1": 0.6}
    content = content_of(right)
    rows = conclusion.by_name(content)
    gain = rows[trained]["difference"]["few-shot"]
    text = conclusion.elsewhere(rows)
    assert f"a gain is shown with a projector that trains ({conclusion.points(gain)} points, p = " in text
    assert "no gain is shown with width 96 (+0.0 [" in text and "tokens 30 times" not in text
    assert "These settings are secondary" in text and "No wrong target was run in them" in text
    assert not any(ARMS[wrong].baseline != BASELINE for wrong in WRONG_TARGETS), "as the text says"
    assert conclusion.verdict(content) == "no", "the answer is that of the main setting"
    assert "is shown to help with a projector that trains, which is a secondary setting" in conclusion._when(rows)
    few = content_of(right, seeds=4)
    assert "a gain is shown" not in conclusion.elsewhere(conclusion.by_name(few)), "four seeds show nothing"
    assert conclusion.elsewhere(conclusion.by_name(content_of({BASELINE: 0.6, METHOD: 0.6}))) == ""


def test_what_a_wrong_target_keeps_readable_is_said():
    content = content_of({BASELINE: 0.6, METHOD: 0.6, OTHER: 0.6, RANDOM: 0.6})
    rows = conclusion.by_name(content)
    kept = {"mean": 0.2, "low": 0.1, "high": 0.3}
    rows[METHOD]["difference"]["B at the last layer"] = kept
    sentence = "So more of B stays readable, although few-shot accuracy is not shown to gain."
    assert sentence in conclusion.readable(rows) and "does that as well" not in conclusion.readable(rows)
    rows[OTHER]["difference"]["B at the last layer"] = kept
    assert "But another object's target does that as well (+0.20 [+0.10, +0.30])." in conclusion.readable(rows)


def test_the_section_shows_the_answer_the_figure_and_what_is_missing(tmp_path, monkeypatch):
    content = content_of({BASELINE: 0.6, METHOD: 0.8, OTHER: 0.6, RANDOM: 0.6})
    content["missing"] = ["release span, seed 3", "release span, seed 4"]
    monkeypatch.setattr(fading_tables, "RESULTS", tmp_path)
    assert "Not measured" in fading_tables.fading_answer() and "not measured" in fading_tables.fading_line()
    assert "Nothing is recommended" in fading_tables.fading_advice()
    (tmp_path / "fading.json").write_text(json.dumps(content))
    text = fading_tables.fading()
    assert conclusion.ANSWERS["yes"] in text and "](../benchmarks/results/fading.png)" in text
    assert "2 runs of the plan are missing (`make fading` continues): release span." in text
    assert "commit abc, 2026-01-01" in text
    estimate = conclusion.by_name(content)[METHOD]["difference"]["few-shot"]
    short = fading_tables.fading_answer()
    assert f"- First study, main setting: **{conclusion.ANSWERS['yes']}**" in short
    assert f"| {conclusion.points(estimate)} | {estimate['p_holm']:.3f} | a gain | 0.65 to 0.65 |" in short
    assert "Not measured" in fading_tables.fading_longer() and "Second study" not in short
    (tmp_path / "fading_longer.json").write_text(json.dumps(content_of({BASELINE: 0.6, METHOD: 0.4})))
    assert conclusion.ANSWERS["worse"] in fading_tables.fading_longer()
    short = fading_tables.fading_answer()
    assert f"- Second study, main setting: **{conclusion.ANSWERS['worse']}**" in short and "| a loss |" in short
    assert "first study: yes, in this setting" in fading_tables.fading_line()
    assert "is shown to raise few-shot accuracy in the main setting" in fading_tables.fading_advice()
    figure.draw(content, tmp_path / "fading.png")
    assert (tmp_path / "fading.png").stat().st_size > 10_000


@pytest.mark.parametrize("study", STUDIES)
def test_the_committed_result_is_what_its_cells_say(study):
    folder = command.RESULTS / study
    result = json.loads(folder.with_suffix(".json").read_text())
    assert result["answer"] == conclusion.verdict(result)
    planned, measured = STUDIES[study].plan(command.SEEDS), {row["arm"]: row["seeds"] for row in result["arms"]}
    missing = [f"{arm}, seed {seed}" for arm, seed in planned if seed not in measured.get(arm, [])]
    assert result["missing"] == missing, "run `make fading ARGS='--study NAME --report'`"
    seeds = 1 + max(seed for row in result["arms"] for seed in row["seeds"])
    again = json.loads(json.dumps(summary.summarise(summary.read_cells(folder, seeds))))
    assert [row["arm"] for row in again["arms"]] == [row["arm"] for row in result["arms"]]
    for ours, theirs in zip(again["arms"], result["arms"], strict=True):
        assert ours["few-shot, mean over k"] == pytest.approx(theirs["few-shot, mean over k"])
        assert ours["B by layer"]["8"] == pytest.approx(theirs["B by layer"]["8"])
        assert ours["seeds"] == theirs["seeds"] and ("difference" in ours) == ("difference" in theirs)
