"""Bars and small line charts with intervals as HTML and SVG; colours are the page's variables, for light and dark."""

import html
from collections.abc import Sequence

Estimate = dict[str, float]

WIDTH, HEIGHT = 320, 190
LEFT, RIGHT, TOP, BOTTOM = 38, 12, 10, 34  # of a chart's frame


def percent(estimate: Estimate | None) -> str:
    """ "83 [71, 93]", or a dash."""
    if estimate is None:
        return "-"
    mean, low, high = (round(100 * estimate[key]) for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def bar(label: str, estimate: Estimate, tone: str = "own", mark: float | None = None, layout: str = "row") -> str:
    """A row: label, a bar from 0 to 100 with its interval, the figures.

    Args:
        tone: class of the bar's colour.
        mark: where a tick stands, such as what guessing scores.
        layout: `row`, or `stack`: a long label above the bar.
    """
    low, high, mean = (100 * min(max(estimate[key], 0), 1) for key in ("low", "high", "mean"))
    tick = "" if mark is None else f"<u style='left:{100 * mark:.1f}%'></u>"
    return (
        f"<div class={layout}><span>{html.escape(label)}</span><div class=track>"
        f"<b class={tone} style='width:{mean:.1f}%'></b>"
        f"<i style='left:{low:.1f}%;width:{max(high - low, 0.6):.1f}%'></i>{tick}</div>"
        f"<span class=figure>{percent(estimate)}</span></div>"
    )


def lines(
    title: str,
    places: Sequence[str],
    series: dict[str, Sequence[Estimate | None]],
    label: str,
    span: tuple[float, float] = (0.0, 1.0),
    dashed: str = "",
) -> str:
    """A chart of estimates over places that are named, evenly spaced; None leaves a place out.

    Args:
        span: of the vertical axis.
        dashed: a series that is drawn as a level: its value at the first place.
    """
    step = (WIDTH - LEFT - RIGHT) / max(len(places) - 1, 1)
    parts = _axis(span)
    for place, name in enumerate(places):
        x = LEFT + place * step
        anchor = "middle" if 0 < place < len(places) - 1 else "end" if place else "start"
        x = x + RIGHT - 2 if anchor == "end" else x - 10 if anchor == "start" else x
        parts.append(f"<text x={x:.1f} y={HEIGHT - BOTTOM + 14} text-anchor={anchor}>{html.escape(name)}</text>")
    parts.append(
        f"<text x={(LEFT + WIDTH) / 2:.0f} y={HEIGHT - 4} text-anchor=middle class=soft>{html.escape(label)}</text>"
    )
    for number, (name, estimates) in enumerate(series.items()):
        points = [(LEFT + i * step, estimate) for i, estimate in enumerate(estimates) if estimate is not None]
        if name == dashed and points:
            y = _y(points[0][1]["mean"], span)
            parts.append(f"<path class='s{number} dash' d='M{LEFT} {y:.1f}H{WIDTH - RIGHT}'/>")
            continue
        path = " ".join(f"{x:.1f},{_y(estimate['mean'], span):.1f}" for x, estimate in points)
        parts.append(f"<polyline class=s{number} points='{path}'/>")
        for x, estimate in points:
            low, high, mean = (_y(estimate[key], span) for key in ("low", "high", "mean"))
            parts.append(f"<path class='s{number} thin' d='M{x:.1f} {low:.1f}V{high:.1f}'/>")
            parts.append(f"<circle class=s{number} cx={x:.1f} cy={mean:.1f} r=3 />")
    return _figure(title, parts, list(series))


def reliability(title: str, bins: Sequence[dict]) -> str:
    """Accuracy over mean confidence of each bin, with the diagonal of perfect calibration."""
    span = (0.0, 1.0)
    parts = _axis(span)
    inner = WIDTH - LEFT - RIGHT
    for value in (0, 0.5, 1):
        x = LEFT + value * inner
        parts.append(f"<text x={x:.0f} y={HEIGHT - BOTTOM + 14} text-anchor=middle>{round(100 * value)}</text>")
    parts.append(f"<text x={(LEFT + WIDTH) / 2:.0f} y={HEIGHT - 4} text-anchor=middle class=soft>confidence, %</text>")
    parts.append(f"<path class='grid dash' d='M{LEFT} {_y(0, span):.1f}L{LEFT + inner} {_y(1, span):.1f}'/>")
    points = [(LEFT + entry["confidence"] * inner, entry["right"]) for entry in bins]
    path = " ".join(f"{x:.1f},{_y(estimate['mean'], span):.1f}" for x, estimate in points)
    parts.append(f"<polyline class=s0 points='{path}'/>")
    for x, estimate in points:
        low, high, mean = (_y(estimate[key], span) for key in ("low", "high", "mean"))
        parts.append(f"<path class='s0 thin' d='M{x:.1f} {low:.1f}V{high:.1f}'/>")
        parts.append(f"<circle class=s0 cx={x:.1f} cy={mean:.1f} r=3 />")
    return _figure(title, parts, ["right, %"])


def _y(value: float, span: tuple[float, float]) -> float:
    share = (min(max(value, span[0]), span[1]) - span[0]) / (span[1] - span[0])
    return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)


def _axis(span: tuple[float, float]) -> list[str]:
    parts = []
    for quarter in range(round(4 * span[0]), round(4 * span[1]) + 1):
        value = quarter / 4
        y = _y(value, span)
        parts.append(f"<path class=grid d='M{LEFT} {y:.1f}H{WIDTH - RIGHT}'/>")
        parts.append(f"<text x={LEFT - 6} y={y + 4:.1f} text-anchor=end>{round(100 * value)}</text>")
    return parts


def _figure(title: str, parts: list[str], names: list[str]) -> str:
    legend = "".join(f"<span class=l{number}>{html.escape(name)}</span>" for number, name in enumerate(names))
    return (
        f"<figure><figcaption>{html.escape(title)}<span class=legend>{legend}</span></figcaption>"
        f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role=img aria-label='{html.escape(title, quote=True)}'>"
        f"{''.join(parts)}</svg>"
        "</figure>"
    )
