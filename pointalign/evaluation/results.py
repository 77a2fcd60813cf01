"""An evaluation, from a model's name to files with metrics, and the comparison of two evaluations."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pointalign import assets, build, storage
from pointalign.data.dataset import find_cloud
from pointalign.evaluation import caption_metrics, markdown_table, metrics, own_questions, protocol, statistics, tasks
from pointalign.evaluation.answering import JOURNAL, Features, Generation, Journal, answer, with_input

EMBEDDED_TASKS = ("classification", "captioning", "geometry")
DEFAULT_OUTPUT = "runs/evaluation"


@dataclass
class EvaluationOptions:
    """Which questions about which objects a model is asked.

    Attributes:
        task: any of classification, captioning, geometry, yesno, modelnet40; or answers, the questions of an
            annotation file. By default classification, captioning and geometry of the embedded objects, answers of an
            annotation file, modelnet40 of a `.dat`.
        data: `furniture` (the embedded objects), an annotation file in the PointLLM schema, or ModelNet40's `.dat`.
        clouds: folder of the clouds that an annotation file names.
        split: part of the embedded objects: train, validation or test.
        prompts: prompts of classification and modelnet40: 0 "What is this?", 1 "This is an object of ".
        inputs: what the model sees when it names an object: the `true` cloud, or as a control, under the first prompt
            only, `shuffled` (another object's cloud), `zeroed` point tokens, `blind` (no cloud).
        protocol: how answers are generated and processed: `greedy` (ours), `pointllm` (sampling at temperature 1), or
            `minigpt3d` (its release: sampling with 2 beams, lower case).
        limit: ask about at most this many objects, evenly spaced.
        up_axis: vertical axis of the clouds of an annotation file; by default as the model was trained.
        sentence_models: NAME=FOLDER of sentence encoders; by default MiniLM of the assets; `none` leaves them out. The
            names `sbert` (all-mpnet-base-v2) and `simcse` (sup-simcse-roberta-large) give PointLLM's metrics.
        device: by default CUDA where there is one.
        quantization: `nf4` keeps the language model in 4 bits.
        output: folder of the results; by default runs/evaluation, with a number where that holds another evaluation.
    """

    task: list[str] = field(default_factory=list)
    data: str = "furniture"
    clouds: str | None = None
    split: str = "test"
    prompts: list[int] = field(default_factory=lambda: [0, 1])
    inputs: list[str] = field(default_factory=lambda: ["true", "shuffled"])
    protocol: str = "greedy"
    limit: int | None = None
    up_axis: str | None = None
    sentence_models: list[str] = field(default_factory=list)
    device: str | None = None
    quantization: str | None = None
    output: str | None = None

    def __post_init__(self) -> None:
        embedded, modelnet = self.data == "furniture", Path(self.data).suffix == ".dat"
        if not self.task:
            self.task = list(EMBEDDED_TASKS) if embedded else ["modelnet40" if modelnet else own_questions.TASK]
        for name in self.task:
            if name not in (*tasks.TASKS, own_questions.TASK):
                raise ValueError(f"--task {name}: expected one of {', '.join((*tasks.TASKS, own_questions.TASK))}")
            if self.task.count(name) > 1:
                raise ValueError(f"--task {name} is named twice")
            if name in tasks.CHOICE_TASKS and not embedded:
                raise ValueError(
                    f"--task {name} needs objects with known facts, the embedded ones (--data furniture): of your own "
                    f"file ask its questions, --task answers, or classification and captioning"
                )
        if self.protocol not in protocol.PROTOCOLS:
            raise ValueError(f"--protocol {self.protocol}: expected one of {', '.join(protocol.PROTOCOLS)}")
        if own_questions.TASK in self.task and (embedded or modelnet):
            raise ValueError("--task answers asks the questions of your file: add --data FILE and --clouds FOLDER")
        if "modelnet40" in self.task and embedded:
            raise ValueError("--task modelnet40 needs --data modelnet40_test_8192pts_fps.dat, the file of its clouds")
        if "modelnet40" in self.task and len(self.task) > 1:
            raise ValueError("--task modelnet40 has objects of its own: evaluate the other tasks in another command")
        if not embedded and self.clouds is None and "modelnet40" not in self.task:
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
        objects = tasks.annotated_objects(Path(options.data), Path(options.clouds), options.up_axis or "y")
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
    and machine give the same bytes. All that can be refused is refused before the model is read; `options.output` is
    set where it was left open.

    Raises:
        FileNotFoundError: there is no model of this name.
        ValueError: options, questions or the output folder do not fit, or a package is missing.
        PointCloudError: an object has no cloud.
    """
    metrics.require_packages(options.task)
    build.find_model(name)  # before objects are read, which the first time are downloaded
    encoders = sentence_models(options.sentence_models)
    objects = load_objects(options)
    asked = [(kind, task) for kind in options.task for task in _tasks(kind, objects, options)]
    if options.clouds is not None and "modelnet40" not in options.task:
        questions = [question for _, task in asked for question in task.questions]
        for object_id in sorted({object_id for question in questions for object_id in question.object_ids}):
            find_cloud(options.clouds, object_id)
    asked_options = {k: v for k, v in asdict(options).items() if k not in ("output", "device", "sentence_models")}
    if options.quantization is None:  # earlier results do not name it
        del asked_options["quantization"]
    if options.clouds is None:  # earlier results name the axis of the embedded objects
        asked_options["up_axis"] = "y"
    content = {"model": Path(name).name, "asked": asked_options, "generation": asdict(generation)}
    if options.output is not None:
        require_same_run(Path(options.output) / JOURNAL, content)
    model, processor, digest = build.load(name, device=options.device, quantization=options.quantization)
    content = {"model": content["model"], "weights": digest, **content}
    if options.clouds is not None and "modelnet40" not in options.task:
        extractor = processor.feature_extractor
        axis = options.up_axis or extractor.up_axis
        objects = replace(objects, cloud=tasks.reader(Path(options.clouds), axis, **extractor.reading))
    options.output = options.output or free_output(content)
    folder = Path(options.output)
    journal = Journal(folder / JOURNAL, content)
    features = Features(model, processor)
    preset = protocol.PROTOCOLS[options.protocol]
    results: dict[str, Any] = {}
    for _, task in asked:
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


def _tasks(kind: str, objects: tasks.ObjectSet, options: EvaluationOptions) -> list[tasks.Task]:
    """The tasks of one kind, of naming also under the controls, which only the first prompt has."""
    if kind == own_questions.TASK:
        return [own_questions.question_task(Path(options.data), options.limit)]
    built = tasks.build_tasks(kind, objects, options.prompts)
    if kind in ("classification", "modelnet40"):
        return [with_input(built[0], control) for control in options.inputs] + built[1:]
    return built


def require_same_run(journal: Path, content: dict[str, Any]) -> None:
    """Refuse the folder of another evaluation before the model is read.

    Raises: ValueError: the journal there was written for other values of `content`.
    """
    if journal.exists() and (first := journal.read_text(encoding="utf-8").partition("\n")[0]):
        other = json.loads(first)
        different = [name for name, value in json.loads(json.dumps(content)).items() if other.get(name) != value]
        if different:
            raise ValueError(
                f"{journal.parent} holds another evaluation ({', '.join(different)} differ): choose another --output"
            )


def free_output(content: dict[str, Any]) -> str:
    """`DEFAULT_OUTPUT`, or with the first number whose folder is free or holds this very evaluation."""
    number, folder = 1, Path(DEFAULT_OUTPUT)
    while True:
        try:
            require_same_run(folder / JOURNAL, content)
            break
        except ValueError:
            number += 1
            folder = Path(f"{DEFAULT_OUTPUT}-{number}")
    if number > 1:
        print(f"{DEFAULT_OUTPUT} holds another evaluation: this one goes to {folder}", file=sys.stderr)
    return str(folder)


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
    return {name: origin[name] for name in ("torch", "transformers", "commit", "uncommitted_changes", "device", "date")}


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
    first, second = (json.loads(Path(path).read_text(encoding="utf-8"))["tasks"] for path in (ours, theirs))
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
