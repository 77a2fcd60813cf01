"""The report of an audit: one HTML file that needs no network."""

import html
from typing import Any

import numpy as np

from pointalign.audit.charts import bar, lines, percent, reliability
from pointalign.audit.plan import INPUTS, Clouds
from pointalign.audit.summary import INPUT_NAMES, points
from pointalign.evaluation.probe import QFORMER
from pointalign.evaluation.report import as_data_url, render

MEANING = {
    "grounded": "Its answers depend on the cloud: they are right more often with the object's cloud than with another "
    "or with none, and they follow an edit of the cloud.",
    "partly grounded": "Some of its answers depend on the cloud. Not every criterion below is met.",
    "not grounded": "Nothing here shows that its answers depend on the cloud: what it gets right can be guessed from "
    "the question.",
}
MUST = {"flip": "right before and after", "stay": "same answer"}  # what shows it
STYLE = """
:root { --page: #fff; --ink: #1c2430; --soft: #5b6675; --line: #dde2e8; --panel: #f5f7f9;
  --own: #2368b0; --other: #a9b4c0; --a: #2368b0; --b: #b8560f; --c: #3d7d4a; --good: #1d7448; --bad: #ad332c;
  --mid: #8a6100; }
@media (prefers-color-scheme: dark) { :root { --page: #14181e; --ink: #e4e8ee; --soft: #9aa6b4; --line: #303843;
  --panel: #1c222a; --own: #6aa9ea; --other: #566270; --a: #6aa9ea; --b: #eb9a5b; --c: #7cc58b; --good: #62c592;
  --bad: #f08a82; --mid: #e0b64e; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 0 auto;
  max-width: 1120px; padding: 24px 16px 60px; }
h1 { font-size: 25px; line-height: 1.25; margin: 0 0 6px; } h2 { font-size: 19px; margin: 40px 0 4px; }
h3 { font-size: 15px; margin: 0 0 6px; } p { margin: 4px 0 12px; max-width: 74ch; } .soft { color: var(--soft); }
.verdict { display: inline-block; font-weight: 700; font-size: 17px; padding: 3px 14px; border-radius: 20px;
  border: 2px solid; margin: 8px 0; }
.good { color: var(--good); } .bad { color: var(--bad); } .mid { color: var(--mid); }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 14px;
  margin: 12px 0; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; overflow: hidden; min-width: 0; }
.row { display: grid; grid-template-columns: 82px minmax(60px, 1fr) 92px; gap: 8px; align-items: center;
  font-size: 14px; }
.stack { display: grid; grid-template-columns: 1fr auto; gap: 2px 8px; font-size: 14px; margin-bottom: 8px; }
.stack .track { grid-column: 1 / 3; grid-row: 2; }
.figure { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; font-size: 13px; }
.track { position: relative; height: 14px; background: var(--panel); border-radius: 3px; overflow: hidden; }
.track b { position: absolute; inset: 0 auto 0 0; border-radius: 3px; } b.own { background: var(--own); }
b.other { background: var(--other); }
.track i { position: absolute; top: 6px; height: 2px; background: var(--ink); }
.track u { position: absolute; top: 0; width: 2px; height: 14px; background: var(--b); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { text-align: left; padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
td + td, th + th { text-align: right; }
td.word, th.word { text-align: left; }
.card td, .card th { white-space: normal; } figure { margin: 0; border: 1px solid var(--line); border-radius: 8px;
  padding: 10px 12px; min-width: 0; }
figcaption { font-weight: 600; font-size: 14px; } 
svg { width: 100%; max-width: 460px; display: block; margin: 4px auto 0; }
svg text { font: 11px system-ui, sans-serif; fill: var(--ink); } svg .soft { fill: var(--soft); }
svg polyline, svg path { fill: none; stroke-width: 2; } 
svg .thin { stroke-width: 1.2; } svg .dash { stroke-dasharray: 4 4; }
svg path.grid { stroke: var(--line); stroke-width: 1; }
.s0 { stroke: var(--a); } .s1 { stroke: var(--b); } .s2 { stroke: var(--c); }
circle.s0 { fill: var(--a); } circle.s1 { fill: var(--b); } circle.s2 { fill: var(--c); }
.legend { font-weight: 400; float: right; } .legend span { margin-left: 10px; white-space: nowrap; }
.l0 { color: var(--a); } .l1 { color: var(--b); } .l2 { color: var(--c); }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 8px; }
.pair img { width: 100%; border-radius: 4px; display: block; }
.pair p { margin: 6px 0 0; font-size: 14px; overflow-wrap: anywhere; } details { margin: 12px 0; }
summary { cursor: pointer; font-weight: 600; }
"""


def page(result: dict[str, Any], clouds: Clouds) -> str:
    """The report, without references to anything outside."""
    title = f"Grounding audit of {html.escape(result['model'])}"
    parts = [
        _head(title, result),
        _controls(result["inputs"]["kinds"]),
        _counterfactuals(result["counterfactuals"]["cells"]),
        _pictures(result["pictures"], clouds),
        _invariances(result["invariances"]),
        _retention(result["retention"]),
        _calibration(result["calibration"]),
        _noise(result["noise"]),
        _method(result),
    ]
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<meta name=color-scheme content='light dark'><title>{title}</title><style>{STYLE}</style>"
        f"{''.join(parts)}</html>\n"
    )


def _head(title: str, result: dict[str, Any]) -> str:
    verdict = result["verdict"]
    tone = {"grounded": "good", "partly grounded": "mid", "not grounded": "bad"}[verdict]
    cards = "".join(
        f"<div class=card><h3>{html.escape(name)}</h3><b class={'good' if test['met'] else 'bad'}>"
        f"{'met' if test['met'] else 'not met'}</b>: {points(test)}<br><span class=soft>p = {test['p_holm']:.4f} "
        f"after Holm, {test['count']} answers</span></div>"
        for name, test in result["criteria"].items()
    )
    quick = " A quick audit: a quarter of the questions." if result["asked"]["quick"] else ""
    return (
        f"<h1>{title}</h1><span class='verdict {tone}'>{verdict}</span><p>{MEANING[verdict]}{quick}</p>"
        f"<div class=grid>{cards}</div>"
    )


def _controls(kinds: dict[str, Any]) -> str:
    cards = []
    for kind, entry in kinds.items():
        rows = "".join(
            bar(INPUT_NAMES[name], entry["said"][name], "own" if name == "true" else "other", entry["guess"])
            for name in INPUTS
        )
        owed = entry["owed to the cloud"]
        cards.append(
            f"<div class=card><h3>{html.escape('all questions' if kind == 'all' else kind)}</h3>{rows}"
            f"<p class=soft>owed to the cloud: {points(owed)}, n = {owed['count']}</p></div>"
        )
    likelihood = ""
    if all("likelihood" in entry for entry in kinds.values()):
        body = "".join(
            f"<tr><td>{html.escape(kind)}" + "".join(f"<td>{percent(entry['likelihood'][name])}" for name in INPUTS)
            for kind, entry in kinds.items()
        )
        head = "".join(f"<th>{INPUT_NAMES[name]}" for name in INPUTS)
        likelihood = (
            "<details><summary>The same by likelihood of the options, without generating</summary><div class=scroll>"
            f"<table><tr><th>{head}{body}</table></div></details>"
        )
    return (
        "<h2>Does the cloud matter?</h2><p class=soft>Right answers, %, with 95 % intervals: with the object's cloud, "
        "with another object's, with a cloud of zeros, and from the question alone. The tick is what the most frequent "
        f"answer scores.</p><div class=grid>{''.join(cards)}</div>{likelihood}"
    )


def _counterfactuals(cells: dict[str, Any]) -> str:
    cards = []
    for edit, kinds in cells.items():
        rows = "".join(
            bar(f"{kind} {'flips' if cell['must'] == 'flip' else 'stays'}", cell[MUST[cell["must"]]], layout="stack")
            for kind, cell in kinds.items()
        )
        count = max(cell["same answer"]["count"] for cell in kinds.values())
        cards.append(f"<div class=card><h3>{html.escape(edit)}, {count} objects</h3>{rows}</div>")
    rows = "".join(
        f"<tr><td>{html.escape(edit)}: {html.escape(kind)}<td class=word>{cell['must']}"
        f"<td>{percent(cell['right before and after'])}<td>{percent(cell['same answer'])}"
        f"<td>{cell['same answer']['count']}"
        for edit, kinds in cells.items()
        for kind, cell in kinds.items()
    )
    return (
        "<h2>Does an answer flip, and only then?</h2><p class=soft>One factor of a cloud is edited: it is stretched so "
        "that what was taller than wide becomes wider than tall (or back), or takes another colour. The answer about "
        "that factor must flip: right before and right after. The others must stay: the same before and after. In %."
        f"</p><div class=grid>{''.join(cards)}</div><details><summary>Both measures of every question</summary>"
        "<div class=scroll><table><tr><th>edit: question<th class=word>must<th>right before and after<th>same answer"
        f"<th>pairs{rows}</table></div></details>"
    )


def _pictures(examples: list[dict[str, Any]], clouds: Clouds) -> str:
    cards = []
    for example in examples:
        sides = []
        for name, truth, answer, stated in zip(
            *(example[key] for key in ("clouds", "true", "answers", "stated")), strict=True
        ):
            cloud = np.asarray(clouds(name))
            image = render(cloud, 140)[:, 280:]  # the third view, from above and aside
            tone = "good" if stated == truth else "bad"
            sides.append(
                f"<div><img loading=lazy alt='{html.escape(name, quote=True)}' src='{as_data_url(image)}'>"
                f"<p class={tone}>{html.escape(answer) or '(nothing)'}</p>"
                f"<p class=soft>true: {html.escape(truth)}</p></div>"
            )
        cards.append(
            f"<div class=card><h3>{html.escape(example['question'])}</h3><div class=pair>{''.join(sides)}</div></div>"
        )
    return f"<div class=grid>{''.join(cards)}</div>"


def _invariances(groups: dict[str, Any]) -> str:
    charts = [
        lines(
            group.partition(",")[0],
            list(levels),
            {name: [level.get(name) for level in levels.values()] for name in ("same answer", "right")},
            group,
        )
        for group, levels in groups.items()
    ]
    return (
        "<h2>What should not change an answer</h2><p class=soft>Answers about clouds that are turned, thinned, noisy "
        "or lit otherwise, about what stays true of them: how often they are the same as for the unchanged cloud, and "
        f"how often they are right, %.</p><div class=grid>{''.join(charts)}</div>"
    )


def _retention(content: dict[str, Any] | None) -> str:
    title = "<h2>What the layers hold</h2>"
    if content is None:
        return f"{title}<p class=soft>Not measured: the adapter has no `states`.</p>"
    charts = []
    for name, places in content["probes"].items():
        layers = [place for place in places if place != QFORMER]
        series = {"linear probe": [places[layer] for layer in layers]}
        if QFORMER in places:
            series[QFORMER] = [places[QFORMER]] * len(layers)
        low = min([0.0, *(estimate["low"] for estimate in places.values())])
        span = (max(-1.0, np.floor(4 * low) / 4), 1.0)
        kind = {"accuracy": "accuracy, %", "R2": "R², %"}[content["kinds"][name]]
        charts.append(lines(f"{name}, {kind}", layers, series, "layer of the language model", span, QFORMER))
    return (
        f"{title}<p class=soft>What a linear probe, fitted on other objects, reads from the mean of the point tokens "
        "after each layer of the language model (0 is its input). A curve that falls is geometry that fades.</p>"
        f"<div class=grid>{''.join(charts)}</div>"
    )


def _calibration(parts: dict[str, Any]) -> str:
    titles = {"names": "generated names", "options": "likeliest option"}
    measured = {titles[part]: content for part, content in parts.items() if content is not None}
    title = "<h2>Does it know what it knows?</h2>"
    if not measured:
        return f"{title}<p class=soft>Not measured: the adapter gives no probabilities.</p>"
    charts = "".join(reliability(name, content["bins"]) for name, content in measured.items())
    measures = [measure for measure in next(iter(measured.values())) if measure != "bins"]
    rows = "".join(
        f"<tr><td>{measure}" + "".join(f"<td>{percent(content[measure])}" for content in measured.values())
        for measure in measures
    )
    return (
        f"{title}<p class=soft>How often answers are right, by their probability. On the diagonal a model is "
        f"calibrated; below it, too sure. AUROC is how often a right answer has the higher probability.</p>"
        f"<div class=grid>{charts}"
        f"<div class=card><div class=scroll><table><tr><th>%{''.join(f'<th>{name}' for name in measured)}{rows}</table>"
        "</div></div></div>"
    )


def _noise(content: dict[str, Any]) -> str:
    heard = ", ".join(f"“{html.escape(text)}” ({count})" for text, count in content["examples"])
    apart = content["told apart"]
    told = "" if apart is None else f" Its probabilities tell objects from noise with an AUROC of {percent(apart)}."
    return (
        "<h2>Does it abstain on noise?</h2><p class=soft>“What is this?” about clouds that show nothing, and about "
        "objects: answers that hedge, refuse or are empty, %.</p><div class=grid><div class=card>"
        f"{bar('noise', content['noise'])}{bar('objects', content['objects'], 'other')}</div></div>"
        f"<p>The most frequent answers to noise: {heard}.{told}</p>"
    )


def _method(result: dict[str, Any]) -> str:
    origin, asked, seconds = result["provenance"], result["asked"], result["seconds"]
    objects = {"furniture": "the embedded held-out objects", "procedural": "procedural objects"}[asked["objects"]]
    resumed = ", of the last part of a resumed run" if seconds["resumed"] else ""
    facts = (
        f"{result['questions']} questions about {objects}, adapter {asked['adapter']}, weights {result['weights']}, "
        f"seed {asked['seed']}; {seconds['wall']:.0f} s ({seconds['cpu']:.0f} s of CPU){resumed}. {origin['device']}, "
        f"torch {origin['torch']}, transformers {origin['transformers']}, commit {origin['commit']}, {origin['date']}."
    )
    return (
        "<h2>How it was measured</h2><p>Intervals are 95 %, by bootstrap over families of near-duplicate objects; "
        "p-values are of sign flips over families, corrected by Holm's method. A criterion is met at p &lt; 0.05 in "
        f"the right direction. Answers are generated greedily.</p><p class=soft>{html.escape(facts)}</p>"
    )
