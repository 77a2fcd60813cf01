"""Model cards, of a run and of the shipped checkpoints: trained from and on what, for what, licences and results."""

import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

from pointalign import assets, storage
from pointalign.evaluation import markdown_table
from pointalign.models import adapters

EMBEDDED_MODEL = "smollm2"
SHIPPED_DATA = (
    "The point branch comes with pointalign. It was trained on textured objects of the Sweet Home 3D furniture "
    "libraries and of the Minetest mod homedecor (CC0, CC-BY and CC-BY-SA works; `ATTRIBUTION.md` of the package names "
    "creators and licences), on procedural objects, and on the features of an ImageNet network."
)
EMBEDDED_DATA = (
    "Questions about the embedded objects, made from names and from facts that are computed from the clouds: "
    "CC0 and CC-BY works, see `ATTRIBUTION.md` of the package."
)


def write(run: Path, described: dict[str, Any], shipped: bool) -> None:
    """Write `README.md` into the run's exported model, and into its adapter's folder.

    Args:
        run: its folder, whose `accuracy.json` is read if there is any.
        described: the options and the origin of the run, as `pointalign.train.describe` returns them, and `steps`.
        shipped: whether it started from a checkpoint that comes with the package.
    """
    accuracy = storage.read_json(run / "accuracy.json") if (run / "accuracy.json").exists() else None
    for folder, opening in ((run / "model", _model_opening()), (run / "adapter", _adapter_opening())):
        if folder.is_dir():
            with storage.replacing(folder / "README.md") as temporary:
                temporary.write_text(_card(described, shipped, _results(accuracy), opening), encoding="utf-8")


def _model_opening() -> str:
    return (
        "# A language model that reads 3D point clouds\n\nIt answers questions about coloured point clouds and meshes. "
        "`pip install pointalign`, then\n\n```python\nimport pointalign\n\n"
        'model, processor, _ = pointalign.load("this folder")\n```\n\n'
        "or `pointalign chat CLOUD --model FOLDER`. transformers' Auto classes load it once `pointalign` is imported."
    )


def _adapter_opening() -> str:
    return (
        "# LoRA adapter of a language model that reads 3D point clouds\n\nThe language model's adapter in PEFT's "
        "layout, `PeftModel.from_pretrained(language_model, FOLDER)`. The folder `model` beside it holds the complete "
        "model, with the point branch that the adapter was trained behind and the adapter merged."
    )


def shipped_card(
    described: dict[str, Any], stage1: dict[str, Any], evaluation: dict[str, Any] | None, audit: str | None = None
) -> str:
    """The card beside the shipped checkpoints, which `benchmarks/report.py` writes.

    Args:
        described: `furniture.json`, the description of the model that answers.
        stage1: `furniture-stage1.json`, of its point branch.
        evaluation: `evaluation.json` of these weights, if they were evaluated.
        audit: what an audit of these weights says in short, if there was one.
    """
    opening = (
        "# The shipped checkpoints\n\n`furniture` answers questions about coloured point clouds and meshes of "
        "furniture and household objects: `pointalign chat CLOUD`, or `pointalign.load()`. It is a point branch and "
        "LoRA adapters for a small language model, which `pointalign assets` fetches. `furniture-stage1` is the point "
        "branch alone, from which `make train` starts.\n\n"
        f"The point branch trained for {stage1['stage1']['encoder_steps']} steps (encoder) and "
        f"{stage1['stage1']['query_steps']} steps (queries) of {stage1['stage1']['batch_size']} objects, "
        f"`{stage1['command']}`; then `furniture`:"
    )
    results = _evaluated(evaluation) if evaluation else "These weights have not been evaluated."
    audited = f"\n## Audit\n\n{audit}\n" if audit else ""
    return f"{_card(described, True, results, opening)}{audited}\n## Attribution\n\n{_attribution()}\n"


def _attribution() -> str:
    """Whose works the training data are, counted by licence."""
    names = assets.FURNITURE_DATA / "ATTRIBUTION.md"
    rows = re.findall(r"^\|(?:[^|\n]*\|){3} *(CC[\w.-]+) *\|$", names.read_text(encoding="utf-8"), re.MULTILINE)
    works = ", ".join(f"{count} under {licence}" for licence, count in sorted(Counter(rows).items()))
    return (
        f"Training data: 3D models of the Sweet Home 3D furniture libraries, collected by Emmanuel Puybaret / eTeks "
        f"({works}); and of homedecor_modpack by Vanessa Ezekowitz and contributors (CC-BY-SA-4.0, some WTFPL). "
        f"Changes: sampled as coloured point clouds, centred and scaled. Every work, its creator and its licence: "
        f"[ATTRIBUTION.md](../embedded/furniture_data/ATTRIBUTION.md). Whoever passes these checkpoints on passes this "
        f"on with them."
    )


def _evaluated(evaluation: dict[str, Any]) -> str:
    rows = [
        (task, name, f"{100 * value['mean']:.1f}", f"{100 * value['low']:.1f} to {100 * value['high']:.1f}", str(count))
        for task, content in evaluation["tasks"].items()
        for name, value in content["metrics"].items()
        if name in ("head noun", "closed-set accuracy", "accuracy")
        for count in [value["count"]]
    ]
    table = markdown_table(["task", "right, %", "mean", "95 % interval", "questions"], rows, "llrrr")
    where = ", ".join(str(evaluation["versions"][name]) for name in ("device", "torch", "transformers", "commit"))
    return (
        f"Held-out objects of the {evaluation['asked']['split']} part, which no training has seen; intervals are "
        f"clustered by family of near-duplicates. `shuffled`: asked with another object's cloud.\n\n{table}\n\n{where}."
    )


def _card(described: dict[str, Any], shipped: bool, results: str, opening: str) -> str:
    model, data, alignment = (described[name] for name in ("model", "data", "alignment"))
    start = model["checkpoint"] or model["point_branch"]
    training = {"learning_rate": 1e-4, "per_device_train_batch_size": 8, "seed": 0} | described["training"]
    mixture = [part["batch_size"] for part in data.get("mixture") or []]  # a part's batch is that of a step
    sizes = sorted(set(mixture)) or [training["per_device_train_batch_size"]]
    llm = "SmolLM2-135M-Instruct" if model["llm"] == EMBEDDED_MODEL else _name(model["llm"])
    rows = [
        ("language model", llm + (", in 4 bits" if model["quantization"] != "none" else "")),
        ("started from", _name(start) if start else "the language model's folder"),
        ("parts trained", ", ".join(model["train"]) or "none"),
        ("steps", f"{described['steps']} of {' or '.join(map(str, sizes))} samples a device"),
        ("learning rate", f"{training['learning_rate']:g}"),
        ("alignment loss", f"weight {alignment['weight']:g}, target {alignment['target']}"),
        ("vertical axis of the files", data["up_axis"]),
        ("hash of the annotations (SHA-256)", described["data_sha256"]),
        ("made with", ", ".join(f"{name} {version}" for name, version in described["versions"].items())),
        ("commit, device", f"{described['commit']}, {described['device']}"),
    ]
    own = data["annotations"] is not None
    trained_on = f"The annotations `{_name(data['annotations'])}` and their clouds." if own else EMBEDDED_DATA
    licences = [
        "SmolLM2-135M-Instruct: Apache-2.0." if model["llm"] == EMBEDDED_MODEL else f"{llm}: see its own card.",
        *(["The shipped point branch: Apache-2.0; attribution of its training data as above."] if shipped else []),
        *(["Your clouds and annotations: their licences are for you to state here."] if own else []),
    ]
    sections = {
        "Training": markdown_table(["", ""], rows, "ll"),
        "Training data": "\n\n".join([trained_on, *([SHIPPED_DATA] if shipped else [])]),
        "Intended use and limits": (
            "Research and demonstration: naming and describing single objects like those of the training data. It "
            "knows little else, states wrong names fluently, and its answers are no measurement. Clouds must be turned "
            "as in training; other kinds of scans need training of their own."
        ),
        "Results": results,
        "Licences": "\n".join(f"- {line}" for line in licences),
    }
    header = f"---\nlibrary_name: pointalign\nlicense: other\ntags: [3d, point-cloud, pointalign]\n---\n{opening}"
    return "\n\n".join([header, *(f"## {title}\n\n{text}" for title, text in sections.items())]) + "\n"


def _results(accuracy: dict[str, Any] | None) -> str:
    if accuracy is None:
        return "Not evaluated. `pointalign evaluate FOLDER --data MINE.json --clouds CLOUDS` asks held-out questions."
    rows = [
        (name, f"{100 * value['mean']:.1f}", f"{100 * value['low']:.1f} to {100 * value['high']:.1f}")
        for name, parts in accuracy["accuracy"].items()
        for value in [parts["noun in training"]]
    ]
    table = markdown_table(["held-out objects named right, %", "mean", "95 % interval"], rows)
    return f"{table}\n\nOf {len(accuracy['objects'])} objects; intervals are clustered by family of near-duplicates."


def _name(path: str) -> str:
    """The last part of a path: the card says nothing about a user's folders."""
    return os.path.basename(os.path.normpath(path))


def write_adapter(model: Any, folder: Path, llm: str) -> bool:
    """Write the language model's adapter in PEFT's layout before it is merged; returns whether there is any."""
    if "language_model" not in (model.config.adapters or {}):
        return False
    with storage.replacing(folder) as temporary:
        temporary.mkdir()
        adapters.save_peft(model, temporary, llm)
    return True
