"""The plots of the page. Their labels are HTML to plotly: what comes from data is escaped."""

import html
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from declip_jax.metrics import is_share
from declip_jax.report.runs import Run
from declip_jax.report.scores import SEVERAL, TASKS, Scores, metric_title

COLUMNS, PANEL = 3, 215  # panels side by side; pixels
_FONT = "system-ui, sans-serif"
_INK, _GRID = "#333", "#e8e8e8"
# Titles of the panels, in their order; the loss terms come after the loss, then what a method logs
# of its own, then the evaluations.
_LOSS = "train/loss"
_TITLES = {
    "train/learning_rate": "Learning rate",
    "train/logit_scale": "Logit scale",
    "train/logit_scale_dense": "Logit scale of tokens",
    "train/grad_norm": "Norm of the gradient",
    "train/top1": "Top-1 within the batch",
    "train/top5": "Top-5 within the batch",
    "train/nn_similarity": "Support set: cosine of the nearest",
    "train/nn_replaced": "Support set: rows replaced",
    "train/nn_young": "Support set: nearest is young",
    "train/pairs_per_s": "Training, pairs/s",
    "data/pairs_per_s": "Input pipeline, pairs/s",
    "train/data_wait_share": "Time spent waiting for data",
}
_HIDDEN = {"train/pairs_per_s_per_device", "train/seconds_left", "train/update_norm"}
_SHARES = {f"train/{n}" for n in ("top1", "top5", "nn_replaced", "nn_young", "data_wait_share")}


def curves(runs: Sequence[Run]) -> str:
    """All curves over the steps, a panel a name; a click in the legend hides a run in all."""
    panels = _panels(runs)
    if not panels:  # all of them other programs' weights
        return ""
    rows = -(-len(panels) // COLUMNS)
    figure = make_subplots(
        rows=rows,
        cols=COLUMNS,
        subplot_titles=[html.escape(title) for title, _ in panels],
        horizontal_spacing=0.055,
        vertical_spacing=65 / (PANEL * rows) if rows > 1 else 0,
    )
    named = set()
    for place, (_, name) in enumerate(panels):
        at = dict(row=place // COLUMNS + 1, col=place % COLUMNS + 1)
        for run in runs:
            for trace in _traces(run.curves[name]) if name in run.curves else ():
                entry = run.name not in named and trace.opacity is None
                named |= {run.name} if entry else set()
                label = html.escape(run.name)
                trace.update(name=label, legendgroup=label, showlegend=entry, line_color=run.color)
                figure.add_trace(trace, **at)
        if name.endswith("_per_s"):
            figure.update_yaxes(tickformat=".3~s", **at)
        if name.startswith("val/") or name in _SHARES:
            figure.update_yaxes(tickformat=".1~%", rangemode="tozero", **at)
    figure.update_annotations(font=dict(size=13, color=_INK), yshift=4)
    last = max(step for run in runs for step in run.curves.get("step", ()))
    figure.update_xaxes(tickformat="~s", nticks=6, range=[0, 1.02 * last])
    return _html(figure, "curves", height=PANEL * rows + 60, top=62)


def bars(scores: Scores) -> str:
    """Scores in per cent: for each row of the table beside, which tells the colors, its bars."""
    rows = [row for row in scores.rows if any(row in one.values for one in scores.series)]
    lengths, ticks = [{} for _ in scores.series], {}  # values by place; labels by place
    place = 0.0  # of the next bar; rows have as many as they need
    for row in rows:
        first = place
        for one, values in zip(scores.series, lengths, strict=True):
            if row in one.values:
                values[place] = one.values[row]
                place += 1
        several = f", {metric_title(row.metric)}" if scores.task in SEVERAL else ""
        ticks[(first + place - 1) / 2] = html.escape(scores.rows[row] + several) + "  "
        place += 0.6
    figure = go.Figure()
    for one, values in zip(scores.series, lengths, strict=True):
        figure.add_bar(
            y=list(values),
            x=list(values.values()),
            width=0.92,
            texttemplate="%{x:.1f}",
            textposition="outside",
            textfont_size=10,
            name=html.escape(f"{one.label}, {one.detail}"),
            marker_color=one.color,
            orientation="h",
            hoverinfo="name+x",
        )
    highest = max(value for one in scores.series for value in one.values.values())
    figure.update_layout(barmode="overlay", showlegend=False)
    figure.update_yaxes(
        tickvals=list(ticks),
        ticktext=list(ticks.values()),
        range=[place - 0.4, -0.8],
        showgrid=False,
        automargin=True,
    )
    figure.update_xaxes(ticksuffix=" %", range=[0, 1.1 * highest or 1])
    return _html(figure, scores.task, height=round(50 + 15 * place), top=6)


def _panels(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Titles and names of what any run has logged."""
    logged = list(dict.fromkeys(name for run in runs for name in run.curves if "/" in name))
    trained = [run.trained.config for run in runs if not run.imported]
    terms = dict.fromkeys(f"train/{term}" for config in trained for term in config.loss.weights)
    titles = {_LOSS: "Loss"}
    if len(terms) > 1:  # one is the loss itself, but for its weight
        titles |= {name: f"Loss: {name[6:]}" for name in terms}
    titles |= _TITLES
    own = [n for n in logged if n.startswith("train/") and n not in {*titles, *terms, *_HIDDEN}]
    titles |= {name: name[6:].replace("_", " ") for name in own}
    for name in logged:
        if name.startswith("val/") and is_share(name) and not name.endswith("_std"):
            *parts, metric = name[4:].split("/")
            parts = [TASKS.get(part, part) for part in parts]
            title = f"{' '.join(parts)}, {metric_title(metric)}".replace("_", " ")
            titles[name] = title[0].upper() + title[1:]
    return [(title, name) for name, title in titles.items() if name in logged]


def _traces(curve: dict[int, float]) -> list[go.Scatter]:
    steps, values = np.array(list(curve)), np.array(list(curve.values()), float)
    mode = "lines+markers" if len(values) <= 50 else "lines"  # a lone value has no line
    window = len(values) // 50
    if window <= 1:
        return [go.Scatter(x=steps, y=values, mode=mode, line_width=1.8, marker_size=5)]
    # Single batches scatter: they are pale, and their running mean is not.
    mean = np.convolve(values, np.full(window, 1 / window), mode="valid")
    return [
        go.Scatter(x=steps, y=values, mode="lines", line_width=1, opacity=0.25, hoverinfo="skip"),
        go.Scatter(x=steps[window - 1 :], y=mean, mode="lines", line_width=1.8),
    ]


def _html(figure: go.Figure, name: str, height: int, top: int) -> str:
    axis = dict(gridcolor=_GRID, zeroline=False, linecolor="#bbb", tickfont_size=11)
    figure.update_xaxes(**axis).update_yaxes(**axis).update_layout(
        template=None,
        font=dict(family=_FONT, size=12, color=_INK),
        paper_bgcolor="white",
        plot_bgcolor="white",
        margin=dict(l=48, r=12, t=top, b=36),
        height=height,
        legend=dict(orientation="h", x=0, xref="container", y=1, yref="container", yanchor="top"),
        hovermode="x" if name == "curves" else "closest",
    )
    return figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=f"plot-{name}",
        default_height=f"{height}px",
        # A "$" begins no formula.
        config=dict(displaylogo=False, displayModeBar=False, responsive=True, typesetMath=False),
    )
