"""What training changed: held-out objects are named before and after, beside baselines, and asked further questions."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pointalign import assets, storage
from pointalign.build import load
from pointalign.certainty import calibrated_threshold, is_hedged
from pointalign.embedded.facts import PALETTE
from pointalign.embedded.questions import NAME
from pointalign.evaluation.choices import (
    YES_NO,
    Question,
    chosen,
    evenly,
    geometry_questions,
    yes_no_questions,
    yes_no_rates,
)
from pointalign.evaluation.naming import (
    ask_about,
    ask_certain,
    ask_names,
    controls,
    correct,
    random_yaw,
    report,
    shuffled,
)
from pointalign.evaluation.samples import answer_samples, samples_picture, samples_table
from pointalign.evaluation.statistics import cluster_mean
from pointalign.evaluation.tasks import embedded_objects
from pointalign.models import PointAlignForConditionalGeneration, PointAlignProcessor

PER_KIND = 16  # questions of a kind, at the end of a training
CALIBRATED, UNKNOWN = 64, 48  # validation objects and objects of unknown nouns that are asked about
BEFORE = 32  # objects that the model names before training: enough to see that it cannot
CHANCE = {"longest side": 1 / 3, "aspect bucket": 1 / 4, "colour": 1 / len(PALETTE)}  # else 1 / 2


class HeldOutReport:
    """Held-out embedded objects named before and after training, beside the baselines; other questions; ten samples.

    Args:
        fold: see `assets.embedded_objects`.
        split: the held-out part, `validation` or `test`.
        folder: the run's folder, which receives `accuracy.json`, `answers.md` and `answers.png`.
    """

    def __init__(self, fold: int | None, split: str, folder: Path):
        objects = assets.embedded_objects(fold)
        self.split, self.folder, self.fold = split, folder, fold
        self.held_out = embedded_objects(objects, self.split)
        self.training = embedded_objects(objects, "train")
        known = np.isin(self.held_out.labels, self.training.labels)
        # only these can be named right, so accuracies are of these
        self.known = self.held_out.subset(np.flatnonzero(known))
        self.unknown = self.held_out.subset(np.flatnonzero(~known)).first(UNKNOWN)
        self.results: dict[str, np.ndarray] = {}

    def before(self, model: PointAlignForConditionalGeneration, processor: PointAlignProcessor) -> None:
        """Name `BEFORE` objects, evenly chosen; the result of the others is NaN."""
        rows = evenly(len(self.known.ids), BEFORE)
        part = self.known.subset(rows)
        result = np.full(len(self.known.ids), np.nan)
        result[rows] = correct(ask_names(model, processor, part.clouds, "naming before training"), part)
        self.results["model before training"] = result

    def calibrate(self, model: PointAlignForConditionalGeneration, processor: PointAlignProcessor) -> None:
        """Set the probability below which the model hedges names, on the validation objects, known nouns and unknown.

        Folds have no validation part: the threshold stays 0 there.
        """
        if self.fold is not None:
            return
        objects = embedded_objects(assets.embedded_objects(), "validation").first(CALIBRATED)
        answers = ask_certain(
            model,
            processor,
            [[cloud] for cloud in objects.clouds],
            [NAME] * len(objects.ids),
            description="calibration",
        )
        right = correct([answer.text for answer in answers], objects)
        model.config.name_threshold = calibrated_threshold([answer.probability for answer in answers], right)

    def after(self, exported: Path) -> None:
        """Evaluate the exported model, not the one in memory."""
        model, processor, _ = load(exported)
        clouds = self.known.clouds
        inputs = {"model": clouds, "model, random yaw": random_yaw(clouds)}
        answers = {name: ask_names(model, processor, part, name) for name, part in inputs.items()}
        # The question is the same for all objects, so another object's cloud has been answered about already.
        answers["model, shuffled clouds"] = [answers["model"][i] for i in shuffled(len(clouds))]
        self.results |= {name: correct(texts, self.known) for name, texts in answers.items()}
        self.results |= controls(self.known, self.training)
        known = np.ones(len(self.known.ids), dtype=bool)
        summary = report(self.results, self.known.labels, self.known.families, known)
        kinds = self.kinds(model, processor)
        per_object = [
            {
                "object_id": record["object_id"],
                "family": record["family"],
                "truth": record["head_noun"],
                "noun_in_training": True,
                "answer": answers["model"][row],
                "right": [name for name, right in self.results.items() if right[row] == 1],
                "not asked": [name for name, right in self.results.items() if np.isnan(right[row])],
            }
            for row, record in enumerate(self.known.records)
        ]
        if self.unknown.ids:
            others = ask_names(model, processor, self.unknown.clouds, "objects of unknown nouns")
            per_object += [
                {
                    "object_id": record["object_id"],
                    "family": record["family"],
                    "truth": record["head_noun"],
                    "noun_in_training": False,
                    "answer": text,
                    "right": [],
                }
                for record, text in zip(self.unknown.records, others, strict=True)
            ]
        hedging = hedged_shares(per_object)
        content = (
            {"split": self.split} | summary.as_dict() | {"kinds": kinds, "hedging": hedging, "objects": per_object}
        )
        storage.write_json(self.folder / "accuracy.json", content)
        samples = answer_samples(model, processor, self.held_out)
        (self.folder / "answers.md").write_text(samples_table(samples), encoding="utf-8")
        samples_picture(samples, self.held_out, self.folder / "answers.png")
        print(f"\n{self.split} objects, never seen in training; 95 % intervals clustered by family\n{summary.table()}")
        print(f"\n{kinds_table(kinds)}")
        shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in hedging.items())
        print(f'\n"It looks like ..." in place of "This is ...": {shares}\n\n{samples_table(samples)}')

    def kinds(self, model: PointAlignForConditionalGeneration, processor: PointAlignProcessor) -> dict[str, dict]:
        """Kind of question -> accuracy with its interval, what guessing scores, and for yes/no `yes_no_rates`."""
        objects = self.held_out
        asked = geometry_questions(objects.records) + yes_no_questions(objects.records, objects.candidates)
        asked = limited(asked)
        answers = ask_about(model, processor, objects, asked, "other questions")
        right = np.array([chosen(a, q.choices) == q.label for a, q in zip(answers, asked, strict=True)], dtype=float)
        rows: dict[str, dict] = {}
        for kind in dict.fromkeys(question.kind for question in asked):
            of_kind = [row for row, question in enumerate(asked) if question.kind == kind]
            estimate = cluster_mean(right[of_kind], [asked[row].family for row in of_kind])
            rows[kind] = estimate.as_dict() | {"chance": CHANCE.get(kind, 1 / 2)}
            if asked[of_kind[0]].choices == YES_NO:
                answered_yes = [float(chosen(answers[row], YES_NO) == "yes") for row in of_kind]
                labels = [asked[row].label for row in of_kind]
                rows[kind] |= yes_no_rates(labels, answered_yes, right[of_kind].tolist())
        return rows


def hedged_shares(objects: Sequence[dict]) -> dict[str, float]:
    """Share of hedged answers among the objects named right, named wrong, and of nouns that training did not have."""
    groups = {
        "named right": [row for row in objects if "model" in row["right"]],
        "named wrong": [row for row in objects if row["noun_in_training"] and "model" not in row["right"]],
        "unknown nouns": [row for row in objects if not row["noun_in_training"]],
    }
    return {name: float(np.mean([is_hedged(row["answer"]) for row in rows])) for name, rows in groups.items() if rows}


def limited(questions: Sequence[Question]) -> list[Question]:
    """At most `PER_KIND` questions of each kind and answer, evenly over those that there are."""
    groups: dict[tuple[str, str], list[Question]] = {}
    for question in questions:
        yes_no = question.label if "yes" in question.choices else ""
        groups.setdefault((question.kind, yes_no), []).append(question)
    return [
        group[i]
        for (_, yes_no), group in groups.items()
        for i in evenly(len(group), PER_KIND // 2 if yes_no else PER_KIND)
    ]


def kinds_table(kinds: dict[str, dict]) -> str:
    width = max(map(len, kinds))
    lines = [f"{'right answers, %':{width}}  model [interval]       guessing  answered yes  balanced"]
    for kind, row in kinds.items():
        value = f"{100 * row['mean']:.0f} [{100 * row['low']:.0f}, {100 * row['high']:.0f}]"
        yes = f"{100 * row['yes_rate']:5.0f} %" if "yes_rate" in row else ""
        balanced = f"{100 * row['balanced']:7.0f}" if "balanced" in row else ""
        lines.append(f"{kind:{width}}  {value:21}  {100 * row['chance']:5.0f}     {yes:12}{balanced}".rstrip())
    return "\n".join(lines)
