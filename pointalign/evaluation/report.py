"""The report of an evaluation: one HTML file that works offline, with tables, plots and a gallery of answers.

Also the plot of a training run's losses.
"""

import base64
import html
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pointalign.data.point_cloud import normalise, turn
from pointalign.early_stopping import ALIGNMENT, HELD_OUT
from pointalign.evaluation import results

SHOWN = 40  # gallery entries per task
WORST = ("likelihood margin", "accuracy")  # the gallery is sorted by the first of these that the task has
STYLE = """
:root { --ink: #1c2430; --soft: #5d6876; --line: #d9dee5; --good: #1f7a4d; --bad: #b3372f; --panel: #f6f7f9; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); margin: 0 auto; max-width: 1120px; padding: 24px 20px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 36px 0 10px; } .soft { color: var(--soft); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; background: var(--panel); } td.bar { width: 34%; min-width: 180px; }
.track { position: relative; height: 14px; background: var(--panel); border-radius: 3px; }
.track i { position: absolute; top: 5px; height: 4px; background: #8fb3d9; border-radius: 2px; }
.track b { position: absolute; top: 2px; width: 3px; height: 10px; background: #1f5fa8; border-radius: 1px; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 14px; }
.card { border: 1px solid var(--line); border-radius: 8px; overflow: hidden; }
.card img { width: 100%; display: block; }
.card p { margin: 0; padding: 2px 12px; } .card p:first-of-type { padding-top: 8px; }
.card p:last-of-type { padding-bottom: 10px; }
.card span { color: var(--soft); display: inline-block; width: 68px; }
.right { color: var(--good); } .wrong { color: var(--bad); }
details { margin: 14px 0; } summary { cursor: pointer; font-weight: 600; padding: 6px 0; } figure { margin: 16px 0; }
figure img { max-width: 100%; }
"""


def write_report(folder: Path) -> Path:
    """Write `report.html` into an evaluation's folder, from the files in it. Returns its path.

    Judged answers (`*.judged.json`) and plots (`*.png`) in the folder are shown too. The clouds are read from where the
    evaluation read them; if they are no longer there, the gallery has no pictures and says so.

    Raises:
        FileNotFoundError: the folder holds no `evaluation.json`.
    """
    evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    cloud = _clouds(evaluation["asked"])
    parts = [
        f"<h1>Evaluation of {html.escape(evaluation['model'])}</h1>",
        f"<p class=soft>{_facts(evaluation)}</p>",
        *(_task_table(name, task) for name, task in evaluation["tasks"].items()),
        *(_judged(path) for path in sorted(folder.glob("*.judged.json"))),
        *(_figure(path) for path in sorted(folder.glob("*.png"))),
        "<h2>Gallery</h2><p class=soft>Three views of each cloud, with the worst answers first. "
        "Pictures show the clouds that the model received.</p>",
        *(_gallery(name, task, cloud) for name, task in evaluation["tasks"].items()),
    ]
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>Evaluation of {html.escape(evaluation['model'])}</title><style>{STYLE}</style>"
        f"{''.join(parts)}</html>\n"
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _clouds(asked_options: dict[str, Any]) -> Callable[[str], np.ndarray] | None:
    """Object id -> cloud, for the options of an evaluation; None where its data are no longer there."""
    options = results.EvaluationOptions(**asked_options, sentence_models=["none"])
    if options.data != "furniture" and not Path(options.data).exists():
        return None
    return results.load_objects(options).cloud


def _facts(evaluation: dict[str, Any]) -> str:
    options, versions = evaluation["asked"], evaluation["versions"]
    objects = f"embedded objects, {options['split']} split" if options["data"] == "furniture" else options["data"]
    return html.escape(
        f"{objects}; protocol {options['protocol']}, seed {evaluation['generation']['seed']}; weights "
        f"{evaluation['weights']}, commit {versions['commit']}, torch {versions['torch']}, {versions['device']}. "
        "Intervals: 95 %, bootstrap over families."
    )


def _task_table(name: str, task: dict[str, Any]) -> str:
    rows = []
    for metric, estimate in task["metrics"].items():
        mean, interval, count = results.shown(metric, estimate)
        bar = ""
        if metric not in results.metrics.UNBOUNDED:
            low, high, middle = (100 * min(max(estimate[key], 0), 1) for key in ("low", "high", "mean"))
            bar = (
                f"<div class=track><i style='left:{low:.1f}%;width:{max(high - low, 0.5):.1f}%'></i>"
                f"<b style='left:{middle:.1f}%'></b></div>"
            )
        rows.append(f"<tr><td>{html.escape(metric)}<td>{mean}<td>{interval}<td>{count}<td class=bar>{bar}")
    head = "<tr><th>metric<th>mean<th>95 % interval<th>n<th>0 to 100"
    extra = f"<p class=soft>sacreBLEU over the corpus: {task['sacrebleu']:.1f}</p>" if "sacrebleu" in task else ""
    return f"<h2>{html.escape(name)}</h2><div class=scroll><table>{head}{''.join(rows)}</table></div>{extra}"


def _judged(path: Path) -> str:
    judged = json.loads(path.read_text(encoding="utf-8"))
    score = judged["score"]
    return (
        f"<h2>{html.escape(path.name.removesuffix('.judged.json'))}, judged</h2><p>{html.escape(judged['judge'])} "
        f"({judged['kind']}): <b>{100 * score['mean']:.1f}</b> [{100 * score['low']:.1f}, {100 * score['high']:.1f}] "
        f"over {score['count']} answers; {judged['invalid']} unusable replies, each counted once as 0. Judge's prompt: "
        f"{html.escape((judged['judge_prompt'] or {'prompt': 'none, these are rules'})['prompt'])}.</p>"
    )


def _figure(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f"<figure><img src='data:image/png;base64,{data}' alt='{html.escape(path.stem)}'></figure>"


def _gallery(name: str, task: dict[str, Any], cloud: Callable[[str], np.ndarray] | None) -> str:
    questions = task["questions"]
    cosines = [name for name in task["metrics"] if name.endswith(("cosine", "_similarity"))]
    metric = next((name for name in (*WORST, *cosines, "bleu-1") if name in task["metrics"]), "order")
    ordered = sorted(questions, key=lambda row: row["values"].get(metric, float("inf")))
    cards = [_card(row, metric, cloud) for row in ordered[:SHOWN]]
    note = "The clouds are no longer where the evaluation read them, so there are no pictures."
    note = "" if cloud is not None else f"<p class=soft>{note}</p>"
    opened = "" if name.endswith(("shuffled", "zeroed", "blind")) else " open"
    return (
        f"<details{opened}><summary>{html.escape(name)}: {len(cards)} of {len(questions)}, by {html.escape(metric)}"
        f"</summary>{note}<div class=gallery>{''.join(cards)}</div></details>"
    )


def _card(row: dict[str, Any], metric: str, cloud: Callable[[str], np.ndarray] | None) -> str:
    names: Sequence[str] = [name for name in row["objects"] if name.isprintable()]
    picture = ""
    if cloud is not None and names:
        size = 150 if len(names) == 1 else 110
        image = np.concatenate([render(cloud(name), size) for name in names], axis=0)
        picture = f"<img loading=lazy src='{as_data_url(image)}' alt='{html.escape(', '.join(names))}'>"
    right = row["values"].get("head noun", row["values"].get("accuracy"))
    kind = "" if right is None else " class=right" if right else " class=wrong"
    value = row["values"].get(metric)
    lines = [
        ("asked", row["question"], ""),
        ("answer", row["answer"] or "(nothing)", kind),
        ("truth", row["truth"], ""),
    ]
    if value is not None and metric != "accuracy":
        lines.append((metric.split()[-1], f"{value:.2f}", ""))
    text = "".join(
        f"<p{style}><span>{html.escape(label)}</span> {html.escape(content)}</p>" for label, content, style in lines
    )
    return f"<div class=card>{picture}{text}</div>"


BACKGROUND = (0.87, 0.89, 0.92)  # light grey: many objects are white or black
VIEWS = ((0.0, 0.15), (np.pi / 2, 0.15), (np.pi / 4, 0.6))  # turn about the vertical axis and tilt, radians


def render(cloud: np.ndarray, size: int = 150) -> np.ndarray:
    """A cloud `[N, 6]` (y up, colours in 0..1) from three views, side by side: `[size, 3 * size, 3]` uint8."""
    cloud = normalise(cloud)
    return np.concatenate([_view(cloud, size, yaw, tilt) for yaw, tilt in VIEWS], axis=1)


def _view(cloud: np.ndarray, size: int, yaw: float, tilt: float) -> np.ndarray:
    xyz = turn(cloud[:, :3], yaw)
    cos, sin = np.cos(tilt), np.sin(tilt)
    up, toward = xyz[:, 1] * cos - xyz[:, 2] * sin, xyz[:, 1] * sin + xyz[:, 2] * cos
    column = ((xyz[:, 0] * 0.47 + 0.5) * size).astype(int)
    row = ((0.5 - up * 0.47) * size).astype(int)
    shade = 0.72 + 0.28 * (toward + 1) / 2  # distant points are darker
    colours = np.clip(cloud[:, 3:6], 0, 1) * shade[:, None]
    image = np.empty((size, size, 3))
    image[:] = BACKGROUND
    order = np.argsort(toward, kind="stable")  # paint near points last, over distant ones
    for down in (0, 1, 2):
        for right in (0, 1, 2):
            image[np.clip(row[order] + down, 0, size - 1), np.clip(column[order] + right, 0, size - 1)] = colours[order]
    return (image * 255).round().astype(np.uint8)


def as_data_url(image: np.ndarray) -> str:
    """An image `[H, W, 3]` uint8 as the `src` of an `<img>`, PNG with 64 colours."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).quantize(64).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def loss_curves(history: list[dict[str, Any]], path: Path, weight: float) -> None:
    """Write a PNG of both losses over steps, from the Trainer's log; nothing if no loss was logged.

    Where held-out losses were logged, they are drawn by kind of question, and the training loss, whose batches differ
    from step to step, thinly behind them.

    Args:
        history: the Trainer's `state.log_history`.
        weight: lambda; without an alignment loss (0) only the next-token loss is drawn.
    """
    from matplotlib.figure import Figure

    panels = {"next-token loss": "ntp_loss"} | (
        {"alignment loss, 1 - mean cos": "alignment_loss"} if weight > 0 else {}
    )
    if not any("ntp_loss" in entry for entry in history):
        return
    held_out = sorted({name for entry in history for name in entry if name.startswith(HELD_OUT)})
    figure = Figure(figsize=(6.4 * len(panels), 4))
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, (title, training) in zip(axes[0], panels.items(), strict=True):
        alignment = training == "alignment_loss"
        names = [name for name in held_out if (name == ALIGNMENT) == alignment]
        steps, values = curve(history, training)
        colour = "#b8bec6" if names else "tab:orange" if alignment else "tab:blue"
        axis.plot(steps, values, color=colour, linewidth=1.4, label="training batches")
        for name in names:
            label = "held-out objects" if alignment else name.removeprefix(HELD_OUT)
            axis.plot(*curve(history, name), linewidth=1.8, marker="o", markersize=2.5, label=label)
        if names:
            axis.legend(fontsize=7.5, frameon=False, ncols=2)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def curve(history: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a logged quantity."""
    logged = [entry for entry in history if name in entry]
    return [entry["step"] for entry in logged], [entry[name] for entry in logged]
