"""Charts as inline SVG; colours come from the page's style classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from onnxrank.pages import escape

_WIDTH = 560


@dataclass(frozen=True)
class Series:
    """A curve with intervals: `(x, y, low, high)` per point, all above 0."""

    name: str
    style: str
    points: Sequence[tuple[float, float, float, float]]


def curves(
    series: Sequence[Series],
    x_title: str,
    label: Callable[[float], str],
    height: int = 340,
    even: float | None = None,
) -> str:
    """Curves over a logarithmic x axis, with bars for the intervals.

    Args:
        series: The curves.
        x_title: What the x axis counts.
        label: Text for a value of y.
        height: Height in pixels.
        even: A value of y to draw a line at; the y axis is then linear and starts at 0, else it is logarithmic.
    """
    xs = sorted({p[0] for s in series for p in s.points})
    ys = [v for s in series for p in s.points for v in p[1:]]
    left, right, top, bottom = 70, 16, 12, 42
    scale = math.log10 if even is None else float
    if even is None:
        low, high = math.log10(min(ys)) - 0.08, math.log10(max(ys)) + 0.08
    else:
        low, high = 0.0, 1.08 * max(*ys, even)
    first, last = math.log10(xs[0]), math.log10(xs[-1])

    def x_at(v: float) -> float:
        part = (math.log10(v) - first) / (last - first) if last > first else 0.5
        return left + 12 + part * (_WIDTH - left - right - 24)

    def y_at(v: float) -> float:
        return top + (high - scale(v)) / (high - low) * (height - top - bottom)

    out = [_open(_WIDTH, height, f"{x_title}: {', '.join(s.name for s in series)}")]
    base = height - bottom
    for v in _ticks(low, high) if even is None else _round_steps(high):
        y = y_at(v)
        out.append(f'<path class="axis" d="M{left} {y:.1f}H{_WIDTH - right}"/>')
        out.append(f'<text class="faint" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(label(v))}</text>')
    out.append(f'<path class="axis" d="M{left} {top}V{base}H{_WIDTH - right}"/>')
    if even is not None:
        out.append(f'<path class="even" d="M{left} {y_at(even):.1f}H{_WIDTH - right}"/>')
    for v in xs:
        out.append(f'<text class="faint" x="{x_at(v):.1f}" y="{base + 17}" text-anchor="middle">{v:g}</text>')
    out.append(f'<text class="faint" x="{_WIDTH / 2}" y="{height - 6}" text-anchor="middle">{escape(x_title)}</text>')
    for s in series:
        path = " L".join(f"{x_at(x):.1f} {y_at(y):.1f}" for x, y, _, _ in s.points)
        out.append(f'<path class="curve {s.style}" style="fill:none" d="M{path}"/>')
        for x, y, under, over in s.points:
            told = escape(f"{s.name}, {x_title} {x:g}: {label(y)} ({label(under)} to {label(over)})")
            at = f"{x_at(x):.1f}"
            out.append(
                f'<g class="{s.style}"><title>{told}</title><path d="M{at} {y_at(under):.1f}V{y_at(over):.1f}" '
                f'stroke-width="2"/><circle class="plain" cx="{at}" cy="{y_at(y):.1f}" r="4"/></g>'
            )
    return "".join(out) + "</svg>"


def _ticks(low: float, high: float) -> list[float]:
    """Round values between two powers of ten: 1, 2, 5 or 1 of every decade."""
    steps = (1, 2, 5) if high - low < 2.5 else (1,)
    decades = range(math.floor(low), math.ceil(high) + 1)
    return [m * 10.0**d for d in decades for m in steps if low <= math.log10(m * 10.0**d) <= high]


def _round_steps(high: float) -> list[float]:
    """From 0 in at most seven round steps."""
    least = high / 7
    decade = 10.0 ** math.floor(math.log10(least))
    step = next(m * decade for m in (1, 2, 5, 10) if m * decade >= least)
    return [k * step for k in range(math.floor(high / step) + 1)]


@dataclass(frozen=True)
class Bar:
    """A bar of parts that follow each other: `(style, size, title)`."""

    name: str
    parts: Sequence[tuple[str, float, str]]
    label: str


def bars(groups: Sequence[tuple[str, Sequence[Bar]]], width: int = _WIDTH, name_width: int = 150) -> str:
    """Horizontal bars in groups; each group has a scale of its own if it has a title, else all share one.

    Args:
        groups: Titles and bars.
        width: Width in pixels.
        name_width: Room for the names.
    """
    line, gap, label_width = 20, 10, 120
    rows = sum(len(b) + bool(title) for title, b in groups)
    height = rows * line + gap * len(groups)
    every = max((sum(p[1] for p in b.parts) for _, several in groups for b in several), default=1.0) or 1.0
    out = [_open(width, height, "bars")]
    y = 0
    room = width - name_width - label_width
    for title, several in groups:
        longest = every
        if title:
            out.append(f'<text class="faint" x="0" y="{y + 14}">{escape(title)}</text>')
            y += line
            longest = max(sum(p[1] for p in b.parts) for b in several) or 1.0
        for b in several:
            name = b.name if len(b.name) < 26 else b.name[:24] + "…"
            out.append(f'<text x="{name_width - 8}" y="{y + 14}" text-anchor="end">{escape(name)}</text>')
            x = float(name_width)
            for style, size, told in b.parts:
                wide = size / longest * room
                out.append(
                    f'<rect class="{style} plain" x="{x:.1f}" y="{y + 3}" width="{wide:.2f}" height="{line - 6}">'
                    f"<title>{escape(told)}</title></rect>"
                )
                x += wide
            out.append(f'<text class="faint" x="{x + 6:.1f}" y="{y + 14}">{escape(b.label)}</text>')
            y += line
        y += gap
    return "".join(out) + "</svg>"


def _open(width: int, height: int, told: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(told)}">'
    )
