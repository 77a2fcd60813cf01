"""An evaluation, from a model's name to files with metrics, and the comparison of two evaluations."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pointalign import assets, build, storage
from pointalign.evaluation import caption_metrics, markdown_table, metrics, own_questions, protocol, statistics, tasks
from pointalign.evaluation.answering import Features, Generation, Journal, answer, with_input


@dataclass
class EvaluationOptions:
    """Which questions about which objects a model is asked.

    Attributes:
        task: any of classification, captioning, geometry, yesno, modelnet40; or answers, the questions of an
            annotation file.
        data: `furniture` (the embedded objects), an annotation file in the PointLLM schema, or ModelNet40's `.dat`.
        clouds: folder of the clouds that an annotation file names.
        split: part of the embedded objects: train, validation or test.
        prompts: prompts of classification and modelnet40: 0 "What is this?", 1 "This is an object of ".
        inputs: what the model sees when it names an object: the `true` cloud, or as a control, under the first prompt
            only, `shuffled` (another object's cloud), `zeroed` point tokens, `blind` (no cloud).
        protocol: how answers are generated and processed: `greedy` (ours), `pointllm` (sampling at temperature 1), or
            `minigpt3d` (its release: sampling with 2 beams, lower case).
        limit: ask about at most this many objects, evenly spaced.
        up_axis: vertical axis of the clouds of an annotation file.
        sentence_models: NAME=FOLDER of sentence encoders; by default MiniLM of the assets; `none` leaves them out. The
            names `sbert` (all-mpnet-base-v2) and `simcse` (sup-simcse-roberta-large) give PointLLM's metrics.
        device: by default CUDA where there is one.
        quantization: `nf4` keeps the language model in 4 bits.
        output: folder of the results.
    """

    task: list[str] = field(default_factory=lambda: ["classification", "captioning", "geometry"])
    data: str = "furniture"
    clouds: str | None = None
    split: str = "test"
    prompts: list[int] = field(default_factory=lambda: [0, 1])
    inputs: list[str] = field(default_factory=lambda: ["true", "shuffled"])
    protocol: str = "greedy"
    limit: int | None = None
    up_axis: str = "y"
    sentence_models: list[str] = field(default_factory=list)
    device: str | None = None
    quantization: str | None = None
    output: str = "runs/evaluation"

    def __post_init__(self) -> None:
        for name in self.task:
            if name not in (*tasks.TASKS, own_questions.TASK):
                raise ValueError(f"--task {name}: expected one of {', '.join((*tasks.TASKS, own_questions.TASK))}")
        if self.protocol not in protocol.PROTOCOLS:
            raise ValueError(f"--protocol {self.protocol}: expected one of {', '.join(protocol.PROTOCOLS)}")
        if own_questions.TASK in self.task and self.data == "furniture":
            raise ValueError("--task answers asks the questions of your file: add --data FILE and --clouds FOLDER")
        if self.data != "furniture" and self.clouds is None and "modelnet40" not in self.task:
            raise ValueError("--data FILE needs --clouds FOLDER, the folder of the clouds that the file names")
        if any(number not in (0, 1) for number in self.prompts):
            raise ValueError(f"--prompts {self.prompts}: expected 0, 1 or both (captioning always uses prompt 2)")


def load_objects(options: EvaluationOptions) -> tasks.ObjectSet:
    if options.data == "furniture":
        objects = tasks.embedded_objects(assets.embedded_objects(), options.split)
    elif "modelnet40" in options.task:
        objects = tasks.modelnet_objects(Path(options.data))
    else:
        assert options.clouds is not None
        objects = tasks.annotated_objects(Path(options.data), Path(options.clouds), options.up_axis)
    return objects.first(options.limit)


def sentence_models(entries: Sequence[str]) -> dict[str, Path]:
    if list(entries) == ["none"]:
        return {}
    if not entries:
        return {"MiniLM": assets.sentence_encoder()}
    pairs = [entry.partition("=") for entry in entries]
    for name, _, folder in pairs:
        if not folder or not (Path(folder) / "config.json").exists():
            raise ValueError(
                f"--sentence_models {name}: expected NAME=FOLDER, where FOLDER holds a sentence encoder (config.json)"
            )
    return {name: Path(folder) for name, _, folder in pairs}


def evaluate(name: str, options: EvaluationOptions, generation: Generation) -> dict[str, Any]:
    """Ask the questions, score the answers and write both; returns the content of `evaluation.json`.

    Files in the output folder: `answers.jsonl` (the journal), one file for each task in PointLLM's format, and
    `evaluation.json`: metrics with intervals, and the values of every question, for `compare`. The same model, options
    and machine give the same bytes.
    """
    folder = Path(options.output)
    objects = load_objects(options)
    model, processor, digest = build.load(name, device=options.device, quantization=options.quantization)
    asked_options = {k: v for k, v in asdict(options).items() if k not in ("output", "device", "sentence_models")}
    if options.quantization is None:  # earlier results do not name it
        del asked_options["quantization"]
    content = {"model": Path(name).name, "weights": digest, "asked": asked_options, "generation": asdict(generation)}
    journal = Journal(folder / "answers.jsonl", content)
    features = Features(model, processor)
    encoders = sentence_models(options.sentence_models)
    preset = protocol.PROTOCOLS[options.protocol]
    results: dict[str, Any] = {}
    for kind in options.task:
        if kind == own_questions.TASK:
            built = [own_questions.question_task(Path(options.data), options.limit)]
        else:
            built = tasks.build_tasks(kind, objects, options.prompts)
        for number, prompt_task in enumerate(built):
            names_objects = kind in ("classification", "modelnet40")
            inputs = options.inputs if names_objects and number == 0 else ["true"]  # controls under one prompt suffice
            for task in [with_input(prompt_task, control) for control in inputs]:
                answers = answer(model, processor, task, objects, features, preset, generation, journal)
                scores = metrics.score(task, answers, encoders)
                results[task.name] = _result(task, answers.texts, scores)
                storage.write_json(folder / f"{task.name}.json", protocol.output(task, answers.texts))
    read = {
        name: {"folder": path.name, "pooling": caption_metrics.pooling_of(path, name)}
        for name, path in encoders.items()
    }
    content |= {"versions": versions(), "sentence_encoders": read, "tasks": results}
    storage.write_json(folder / "evaluation.json", content)
    return content


def _result(task: tasks.Task, texts: Sequence[str], scores: metrics.Scores) -> dict[str, Any]:
    rows = [
        {
            "id": question.id,
            "objects": list(question.object_ids),
            "family": question.family,
            "kind": question.kind,
            "question": question.text,
            "truth": question.truth,
            "label": question.label,
            "answer": text,
            "values": {name: values[place] for name, values in scores.items() if values[place] is not None},
        }
        for place, (question, text) in enumerate(zip(task.questions, texts, strict=True))
    ]
    result = {"kind": task.kind, "metrics": metrics.summarise(task, scores), "questions": rows}
    if task.kind == "captioning":
        result["sacrebleu"] = caption_metrics.corpus_bleu(texts, [question.truth for question in task.questions])
    return result


def versions() -> dict[str, str | bool | None]:
    origin = storage.provenance(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return {name: origin[name] for name in ("torch", "transformers", "commit", "uncommitted_changes", "device")}


def table(evaluation: dict[str, Any]) -> str:
    """Every metric of every task with its interval, as Markdown."""
    rows = []
    for name, task in evaluation["tasks"].items():
        rows += [[name, metric, *shown(metric, estimate)] for metric, estimate in task["metrics"].items()]
        if "sacrebleu" in task:
            rows.append([name, "sacreBLEU (corpus)", f"{task['sacrebleu']:.1f}", "", str(len(task["questions"]))])
    return markdown_table(["task", "metric", "mean", "95 % interval", "n"], rows, "llrrr")


def shown(metric: str, estimate: dict[str, float]) -> tuple[str, str, str]:
    """Mean, interval and number of values as text: in percent, but nats for unbounded metrics."""
    scale = 1 if metric in metrics.UNBOUNDED else 100
    digits = 2 if scale == 1 else 1
    mean = f"{scale * estimate['mean']:.{digits}f}"
    names = {"majority": "majority", "yes_rate": "answered yes", "balanced": "balanced"}
    if extra := [f"{name} {100 * estimate[key]:.1f}" for key, name in names.items() if key in estimate]:
        mean += f" ({', '.join(extra)})"
    interval = f"{scale * estimate['low']:.{digits}f} to {scale * estimate['high']:.{digits}f}"
    return mean, interval, str(int(estimate["count"]))


# -- comparison of two evaluations -----------------------------------------------------------------------------------


def compare(ours: Path, theirs: Path) -> list[dict[str, Any]]:
    """Paired differences `ours - theirs` of every metric that both files hold for the same questions.

    Returns:
        One row per task and metric: `mean`, `low`, `high`, `count`, `p` (sign flips over families), `p_holm` (corrected
        over all rows), `detectable` (the minimum detectable effect).

    Raises:
        ValueError: the files share no question.
    """
    first, second = (json.loads(Path(path).read_text())["tasks"] for path in (ours, theirs))
    rows = []
    for task in [name for name in first if name in second]:
        other = {row["id"]: row for row in second[task]["questions"]}
        shared = [(row, other[row["id"]]) for row in first[task]["questions"] if row["id"] in other]
        for metric in dict.fromkeys(metric for row, _ in shared for metric in row["values"]):
            pairs = [
                (row["values"][metric], mate["values"][metric], row["family"])
                for row, mate in shared
                if metric in row["values"] and metric in mate["values"]
            ]
            if not pairs:
                continue
            a, b, families = (list(column) for column in zip(*pairs, strict=True))
            estimate, p = statistics.paired_difference(a, b, families)
            detectable = statistics.minimum_detectable_effect(np.array(a) - np.array(b), families)
            rows.append({"task": task, "metric": metric} | estimate.as_dict() | {"p": p, "detectable": detectable})
    if not rows:
        raise ValueError(f"{ours} and {theirs} share no question: they hold answers to different tasks or objects")
    for row, p in zip(rows, statistics.holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = p
    return rows


def comparison_table(rows: Sequence[dict[str, Any]]) -> str:
    """What `compare` returned, as Markdown."""
    header = ["task", "metric", "difference", "95 % interval", "n", "p", "p (Holm)", "detectable"]
    lines = []
    for row in rows:
        scale = 1 if row["metric"] in metrics.UNBOUNDED else 100
        tests = [f"{row['p']:.4f}", f"{row['p_holm']:.4f}", f"{scale * row['detectable']:.2f}"]
        lines.append([row["task"], row["metric"], *shown(row["metric"], row), *tests])
    return markdown_table(header, lines, "llrrrrrr")
