"""Plotting helpers for runs and studies: colors, figures, and lines with labels at their ends.

matplotlib is imported when something is drawn: it takes as long as everything else that the trainer imports.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED = "#222222", "#8f8f8f"
MODALITY_COLORS = ("#3b6fb6", "#d9822b", "#3a9a5c", "#a3529f", "#8c6d46")
METHOD_COLORS = ("#6b7a8f", "#c4476a", "#17a2a2", "#a89a1f", "#7b5fc7", "#5b5b5b")  # models of all modalities


def new_figure(width: float, height: float) -> Figure:
    """A figure without a window; sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    FigureCanvasAgg(figure)
    return figure


def fonts_for(text: str) -> tuple[list[str], str]:
    """The font families that draw the text, the usual one first, and its characters that no installed font has."""
    from matplotlib.font_manager import findfont, fontManager

    families = ["DejaVu Sans"]
    missing = {c for c in text if c.isprintable()} - characters_of(findfont(families[0]))
    regular = [font for font in fontManager.ttflist if font.style == "normal" and font.weight == 400]
    for font in regular if missing else ():
        if "Last Resort" not in font.name and (found := missing & characters_of(font.fname)):
            families.append(font.name)
            missing -= found
    return families, "".join(sorted(missing))


def characters_of(file: str) -> set[str]:
    """The characters that a font has."""
    from matplotlib.ft2font import FT2Font

    try:
        return set(map(chr, FT2Font(file).get_charmap()))
    except (OSError, RuntimeError):  # of a format that Matplotlib does not read
        return set()


def style_axes(axes: Axes, title: str, xlabel: str = "epoch"):
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(xlabel)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def curves(axes: Axes, lines: Sequence[tuple[str, Sequence[int], Sequence[float], dict]]):
    """Draws lines (name, epochs, values, style) with their names at the ends. Equal lines are drawn once."""
    from matplotlib.ticker import MaxNLocator

    merged: list[list] = []
    for name, epochs, values, style in (line for line in lines if line[1]):
        equal = next((line for line in merged if line[2] == values), None)
        if equal:
            equal[0] += f" = {name}"
        else:
            merged.append([name, epochs, values, style])
    for _, epochs, values, style in merged:
        axes.plot(epochs, values, marker="o" if len(epochs) == 1 else None, **style)
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True, min_n_ticks=1))
    axes.margins(x=0.02)
    label_ends(axes, [(name, epochs[-1], values[-1], style["color"]) for name, epochs, values, style in merged])


def label_ends(axes: Axes, ends: Sequence[tuple[str, float, float, str]], size: float = 9):
    """Writes labels (name, x, y, color) to the right of the axes, close to the height of their points."""
    ends = [end for end in ends if end[2] == end[2]]  # without NaN
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    gap = 1.25 * size / 72 / (axes.bbox.height / axes.figure.dpi)
    ends = sorted(ends, key=lambda end: end[2])
    positions = separated([(end[2] - low) / (high - low) for end in ends], gap)
    for (name, x, y, color), position in zip(ends, positions, strict=True):
        axes.annotate(
            name, (x, y), (1.03, position), textcoords="axes fraction", va="center", fontsize=size, color=color,
            arrowprops={"arrowstyle": "-", "color": color, "alpha": 0.5, "linewidth": 0.8, "relpos": (0, 0.5)},
        )  # fmt: skip


def separated(positions: Sequence[float], gap: float) -> list[float]:
    """Moves ascending positions in [0, 1] as little as possible so that they are at least ``gap`` apart.

    Positions that are too close are spread around their mean.
    """
    blocks: list[list[float]] = []

    def bottom(block):
        height = gap * (len(block) - 1)
        return max(0, min(sum(block) / len(block) - height / 2, 1 - height))

    for position in positions:
        blocks.append([position])
        while len(blocks) > 1 and bottom(blocks[-1]) - bottom(blocks[-2]) < gap * len(blocks[-2]):
            upper = blocks.pop()
            blocks[-1] += upper
    return [bottom(block) + gap * i for block in blocks for i in range(len(block))]
