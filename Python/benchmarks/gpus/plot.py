"""A plot of gigabytes a second over multiprocessors, as SVG."""

from __future__ import annotations

import dataclasses
import math
from typing import Optional
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 860, 480
LEFT, RIGHT, TOP, BOTTOM = 70, 250, 50, 50
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


@dataclasses.dataclass
class Curve:
    name: str
    # (multiprocessors, GB/s), in order.
    points: list[tuple[int, float]]
    color: str
    dashes: Optional[str] = None


@dataclasses.dataclass
class Limit:
    """A horizontal line."""

    name: str
    gigabytes_per_second: float
    color: str


def nice_step(span: float) -> float:
    """1, 2 or 5 times a power of ten, so that the span has four to ten of it."""
    power = 10 ** math.floor(math.log10(span / 4))
    return next(power * factor for factor in (5, 2, 1) if span / (power * factor) >= 4)


def svg(title: str, y_title: str, curves: list[Curve], limits: list[Limit]) -> str:
    workers = sorted({point[0] for curve in curves for point in curve.points})
    highest = max([point[1] for curve in curves for point in curve.points] + [limit.gigabytes_per_second for limit in limits])
    step = nice_step(highest)
    top_value = step * math.ceil(highest / step)
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    last = max(workers[-1], 1)

    def x(count: float) -> float:
        return LEFT + (right - LEFT) * count / last

    def y(rate: float) -> float:
        return bottom - (bottom - TOP) * rate / top_value

    def line(x1: float, y1: float, x2: float, y2: float, color: str = "#dddddd", dashes: Optional[str] = None) -> str:
        dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
        width = 1 if color == "#dddddd" else 2
        return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke-width="{width}" stroke="{color}"{dashed}/>'

    def label(text: str, at_x: float, at_y: float, anchor: str) -> str:
        return f'<text x="{at_x:.1f}" y="{at_y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'

    parts = []
    for index in range(round(top_value / step) + 1):
        height = y(index * step)
        parts += [line(LEFT, height, right, height), label(f"{index * step:g}", LEFT - 8, height + 4, "end")]
    for count in workers:
        parts += [line(x(count), TOP, x(count), bottom), label(str(count), x(count), bottom + 18, "middle")]
    parts.append(label("multiprocessors of a rank", (LEFT + right) / 2, HEIGHT - 10, "middle"))
    parts.append(label(y_title, LEFT - 40, TOP - 12, "start"))
    legend: list[tuple[str, str, Optional[str]]] = []
    for limit in limits:
        height = y(limit.gigabytes_per_second)
        parts.append(line(LEFT, height, right, height, limit.color, "2 4"))
        legend.append((limit.name, limit.color, "2 4"))
    for curve in curves:
        points = " ".join(f"{x(count):.1f},{y(rate):.1f}" for count, rate in curve.points)
        dashed = f' stroke-dasharray="{curve.dashes}"' if curve.dashes else ""
        parts.append(f'<polyline fill="none" stroke-width="2" stroke="{curve.color}"{dashed} points="{points}"/>')
        parts += [f'<circle cx="{x(count):.1f}" cy="{y(rate):.1f}" r="3" fill="{curve.color}"/>' for count, rate in curve.points]
        legend.append((curve.name, curve.color, curve.dashes))
    for index, (name, color, dashes) in enumerate(legend):
        height = TOP + 8 + 20 * index
        parts += [
            line(right + 16, height, right + 44, height, color, dashes),
            label(name, right + 52, height + 4, "start"),
        ]
    return f"""<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12">
<rect width="100%" height="100%" fill="white"/>
<text x="{LEFT}" y="20">{escape(title)}</text>
{chr(10).join(parts)}
</svg>
"""
