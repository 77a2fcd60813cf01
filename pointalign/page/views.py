"""Pictures of the page: clouds in three dimensions and a line over layers, as plotly figures.

Backgrounds are transparent and the ink is a grey that is legible on light and on dark, so that a figure fits both.
"""

import numpy as np
import plotly.graph_objects as go

INK = "#7b8694"
ACCENT = "#2f81f7"
MAX_SHOWN = 8192  # points in a picture; the browser turns them without delay
MARKER = 2.4  # size of a point, in pixels
MAX_POWER = 3  # colours end at 8 times the average and at an eighth of it
CORNER = "from a corner"
CAMERAS = {  # where the eye is, in units of the cloud's box; y is up
    CORNER: {"x": 1.25, "y": 0.75, "z": 1.55},
    "front": {"x": 0, "y": 0.2, "z": 2.1},
    "side": {"x": 2.1, "y": 0.2, "z": 0},
    "above": {"x": 0, "y": 2.2, "z": 0.2},
}


def cloud_figure(points: np.ndarray, camera: str = CORNER) -> go.Figure:
    """A cloud `[N, 6]` in its colours, y up, with equal axes.

    Args:
        camera: of `CAMERAS`.
    """
    rgb = (np.clip(points[:, 3:], 0, 1) * 255).round().astype(int)
    return _scene(points, {"color": [f"rgb({r},{g},{b})" for r, g, b in rgb], "size": MARKER}, camera)


def attention_figure(points: np.ndarray, values: np.ndarray, camera: str = CORNER) -> go.Figure:
    """A cloud `[N, 6]` coloured by a multiple of the average for each point `[N]`, with a colour bar.

    Colours follow the logarithm: half and twice the average are equally far from it.
    """
    powers = np.log2(np.maximum(values, 2.0**-MAX_POWER))
    limit = int(np.clip(np.ceil(np.abs(powers).max(initial=0)), 1, MAX_POWER))
    ticks = list(range(-limit, limit + 1))
    bar = {
        "title": {"text": "attention, × the average patch", "side": "top"},
        "orientation": "h", "x": 0.5, "y": 0.0, "yanchor": "bottom", "len": 0.7, "thickness": 10, "outlinewidth": 0,
        "tickvals": ticks, "ticktext": [f"1/{2**-t}" if t < 0 else str(2**t) for t in ticks],
    }  # fmt: skip
    marker = {"color": powers, "colorscale": "Plasma", "cmin": -limit, "cmax": limit, "size": MARKER, "colorbar": bar}
    return _scene(points, marker, camera, bottom=0.16)


def _scene(points: np.ndarray, marker: dict, camera: str, bottom: float = 0.0) -> go.Figure:
    """A share `bottom` of the height is left free under the cloud."""
    x, y, z = points[:, :3].T
    cloud = go.Scatter3d(x=x, y=y, z=z, mode="markers", marker=marker | {"line": {"width": 0}}, hoverinfo="skip")
    axis = {"visible": False, "showspikes": False}
    scene = {
        "xaxis": axis, "yaxis": axis, "zaxis": axis, "aspectmode": "data", "dragmode": "orbit",
        "camera": {"up": {"x": 0, "y": 1, "z": 0}, "eye": CAMERAS[camera]},
        "bgcolor": "rgba(0,0,0,0)", "domain": {"x": [0, 1], "y": [bottom, 1]},
    }  # fmt: skip
    edges = {"l": 0, "r": 0, "t": 0, "b": 0}
    # with a revision of its own, a view that was turned by hand stays until another camera is chosen
    return _figure(cloud, scene=scene, margin=edges, uirevision=camera)


def layer_figure(similarity: dict[int, float]) -> go.Figure:
    """Similarity, 0 to 1, by layer as a line."""
    line = go.Scatter(
        x=list(similarity), y=list(similarity.values()), mode="lines+markers", line={"color": ACCENT, "width": 2.5},
        marker={"size": 6}, hovertemplate="layer %{x}: %{y:.2f}<extra></extra>",
    )  # fmt: skip
    axis = {"gridcolor": "rgba(123,134,148,0.25)", "zeroline": False, "automargin": True}
    return _figure(
        line,
        xaxis=axis | {"title": {"text": "layer (0: the input)"}},
        yaxis=axis | {"title": {"text": "similarity to the Q-Former (CKA)"}, "range": [0, 1.02]},
        dragmode=False,
        margin={"l": 12, "r": 20, "t": 20, "b": 12},
    )


def _figure(trace: object, **layout: object) -> go.Figure:
    clear = "rgba(0,0,0,0)"
    plain = {"paper_bgcolor": clear, "plot_bgcolor": clear, "font": {"color": INK, "size": 12}, "showlegend": False}
    return go.Figure(trace, layout=plain | layout)
