"""What an ablation concludes: paired by seed, corrected for the number of comparisons, silent where too little ran."""

from collections.abc import Sequence

import numpy as np
import pytest

from experiments.ablation import comparison, conclusion
from experiments.ablation.measure import PRIMARY, SECOND
from experiments.ablation.train_arm import Arm
from pointalign.evaluation import statistics


def compared(
    nouns: int,
    methods: list[float],
    others: dict[str, list[float]],
    set_b: float = 0.0,
    read: Sequence[float] = (0.0, 0.0, 0.0),
    baseline: Sequence[float] | None = None,
    first_seed: dict[str, int] | None = None,
):
    """Rows of arms, and the arms, from the mean likelihood margin of each seed above that of the objects."""
    start = np.random.default_rng(0).normal(0, 1, nouns)

    def run(shift: float, seed: int, gain: float, reading: float) -> dict:
        values = start + shift + np.random.default_rng(seed).normal(0, 0.05, nouns)
        scores = {PRIMARY: values.tolist(), SECOND: (values > 0).astype(float).tolist()}
        probes = {"A: colour": {"Q-Former": 0.9, "0": 0.9, "2": 0.9}}
        probes["B: taper"] = {"Q-Former": 0.8, "0": 0.8, "2": 0.3 + gain + 0.01 * seed}
        similar = {"1": {"centred cosine": 0.1 + reading, "retrieval@1": 0.1, "CKA": 0.1}}
        return {"scores": scores, "families": [str(i) for i in range(nouns)], "layer": 1, "similarity": similar,
                "probes": probes, "few_shot": {}}  # fmt: skip

    shifts = {"no alignment": list(baseline or [0.0] * len(methods)), "alignment": methods} | others
    runs = {}
    for name, by_seed in shifts.items():
        is_method, first = name == "alignment", (first_seed or {}).get(name, 0)
        noise = 0 if name == "no alignment" else 10
        runs[name] = {
            seed: run(shift, seed + noise, set_b * is_method, read[seed] if is_method and seed < len(read) else 0.0)
            for seed, shift in enumerate(by_seed, first)
        }
    arms = {"no alignment": Arm(weight=0.0), "alignment": Arm()} | {name: Arm(source="other") for name in others}
    rows = comparison.compare_arms(runs, "no alignment", {})
    return rows, arms


@pytest.mark.parametrize(
    ("methods", "others", "said"),
    [
        ([0.0] * 5, {"wrong": [0.0] * 5}, ["cannot tell alignment", "controls (wrong) could explain"]),
        ([-0.5] * 5, {"wrong": [0.0] * 5}, ["Shown: alignment lowers", "No gain of alignment"]),
        ([0.5] * 5, {"wrong": [0.0] * 5}, ["Shown: alignment raises", "Alignment beats wrong."]),
        ([0.5] * 5, {"wrong": [0.5] * 5}, ["Shown: alignment raises", "plain regularisation may explain both"]),
    ],
)  # fmt: skip
def test_the_conclusion_says_what_is_shown_and_what_is_not(methods, others, said, monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    rows, arms = compared(60, methods, others)
    paragraphs = conclusion.conclusion(rows, "no alignment", arms)
    for words, paragraph in zip(said, paragraphs, strict=False):
        assert words in paragraph
    assert "5 paired seeds, 60 objects" in paragraphs[0] and "is detected with 80 % power" in paragraphs[0]
    wrong, aligned = rows[2]["differences from alignment"][PRIMARY], rows[1]["differences"][PRIMARY]
    assert wrong["mean"] == pytest.approx(others["wrong"][0] - methods[0], abs=0.05)
    assert aligned["mean"] == pytest.approx(methods[0], abs=0.05)
    assert "differences from alignment" not in rows[0] and "differences from alignment" not in rows[1]


def test_a_control_that_harms_is_not_called_indistinguishable(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    rows, arms = compared(60, [0.5] * 5, {"wrong": [-0.5] * 5})
    rows[2]["differences from alignment"][PRIMARY]["p_holm"] = 1.0  # as if nothing were shown of it
    assert "Wrong is shown to be worse than no alignment" in conclusion.conclusion(rows, "no alignment", arms)[1]


def test_what_captions_never_mention_is_compared_over_seeds(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 100)
    rows, arms = compared(20, [0.0] * 5, {}, set_b=0.2)
    kept = rows[1]["differences"]["set B"]
    assert kept["mean"] == pytest.approx(0.3) and kept["low"] > 0 and kept["count"] == 5
    assert "alignment keeps more of it" in conclusion.conclusion(rows, "no alignment", arms)[-1]
    table = comparison.probe_table(rows, "no alignment")
    assert "| B: taper | 0.800 | 0.320 | 0.620 |" in table
    assert "Q-Former | last layer, no alignment | last layer, alignment" in table


@pytest.mark.parametrize(
    ("read", "words"),
    [
        ([0.3, 0.28, 0.33, 0.31, 0.29], "reads more"),
        ([-0.3, -0.28, -0.33, -0.31, -0.29], "reads less"),
        ([0.9, -0.5, 0.2, -0.3, 0.4], "reads no more"),
    ],
)
def test_what_alignment_asks_for_is_said_apart_from_what_it_brings(read, words, monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 100)
    rows, arms = compared(20, [0.0] * 5, {}, read=read)
    assert rows[1]["differences"]["centred cosine"]["mean"] == pytest.approx(np.mean(read))
    paragraphs = conclusion.conclusion(rows, "no alignment", arms)
    said = [one for one in paragraphs if one.startswith("What alignment asks for")]
    assert len(said) == 1 and words in said[0] and "over 5 seeds" in said[0] and "cannot tell" in paragraphs[0]


def test_arms_are_compared_on_the_seeds_that_both_have(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 100)
    # seeds 2 and 3 are far above the others, in the baseline as well
    rows, _ = compared(20, [0.1, 0.1, 5.1, 5.1], {"two seeds": [0.3, 0.3]}, baseline=[0.0, 0.0, 5.0, 5.0])
    _, method, two = rows
    margin = {row["arm"]: row["metrics"][PRIMARY]["mean"] for row in rows}
    assert margin["alignment"] - margin["no alignment"] == pytest.approx(0.1, abs=0.05)
    assert margin["two seeds"] < margin["no alignment"] - 2  # other seeds: no comparison
    beside = {name: figures["metrics"][PRIMARY]["mean"] for name, figures in two["same seeds"].items()}
    assert margin["two seeds"] - beside["no alignment"] == pytest.approx(0.3, abs=0.05)
    assert margin["two seeds"] - beside["alignment"] == pytest.approx(0.2, abs=0.05)
    assert two["seeds"] == two["differences"]["seeds"] == two["differences from alignment"]["seeds"] == [0, 1]
    assert method["differences"]["seeds"] == [0, 1, 2, 3]
    assert two["differences"][PRIMARY]["mean"] == pytest.approx(0.3, abs=0.05)
    lines = [line.split(" | ")[:3] for line in comparison.arm_table(rows, "no alignment").splitlines()[2:]]
    assert [(name.removeprefix("| "), seeds) for name, seeds, _ in lines] == [
        ("no alignment", "0-3"), ("alignment", "0-3"),
        ("no alignment", "0-1"), ("alignment", "0-1"), ("two seeds", "0-1"),
    ]  # fmt: skip
    assert float(lines[4][2]) - float(lines[2][2]) == pytest.approx(0.3, abs=0.05)
    assert "| two seeds | 0-1 | " in comparison.difference_table(rows, "no alignment")
    assert "(seeds 0-3)" in comparison.probe_table(rows, "no alignment")


def test_an_arm_without_a_seed_in_common_is_not_shown(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 100)
    rows, _ = compared(20, [0.0, 0.0], {"later": [0.0, 0.0]}, first_seed={"later": 2})
    assert [row["arm"] for row in rows] == ["no alignment", "alignment"]
    assert comparison.seed_text([0, 2, 3]) == "0, 2, 3" and comparison.seed_text([4]) == "4"


def test_two_seeds_have_no_interval_over_seeds(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 100)
    rows, arms = compared(20, [0.0, 0.0], {}, read=[0.3, 0.4])
    assert "centred cosine" not in rows[1]["differences"] and "set B" not in rows[1]["differences"]
    assert not any("asks for" in one for one in conclusion.conclusion(rows, "no alignment", arms))


def test_an_arm_that_differs_is_named_even_where_alignment_does_not(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    rows, arms = compared(60, [0.0] * 5, {"wrong": [0.5] * 5, "same": [0.0] * 5})
    said = [one for one in conclusion.conclusion(rows, "no alignment", arms) if one.startswith("Shown for other arms")]
    assert len(said) == 1 and "wrong +0.50" in said[0] and "over 5 seeds" in said[0]
    assert "same" not in said[0]


def test_nothing_is_shown_with_fewer_than_five_seeds(monkeypatch):
    """However large the effect: a hundred standard deviations of the noise."""
    monkeypatch.setattr(statistics, "RESAMPLES", 200)
    effect = [5.0] * 4
    rows, arms = compared(20, effect, {"wrong": effect}, set_b=3.0, read=[0.3, 0.31, 0.29, 0.3])
    assert rows[1]["differences"][PRIMARY]["low"] > 4 and rows[1]["differences"][PRIMARY]["p_holm"] < 0.01
    text = "\n".join(conclusion.conclusion(rows, "no alignment", arms))
    assert "Shown" not in text and text.count("4 seeds; with fewer than 5 nothing counts as shown") == 2
    assert "reads no more" in text and "No gain of alignment is shown" in text
