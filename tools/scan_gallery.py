"""Draws every scan order as arrows over a grid, coloured from the first step to the last.

python -m zoo.tools.scan_gallery                          # scans.png, all strategies on a 6x6 grid
python -m zoo.tools.scan_gallery --rows 5 --columns 8 --scans window atrous --output wide.png
"""

import argparse
from pathlib import Path

import torch

import zoo
from zoo.optional import require


def draw_path(axes, path: torch.Tensor, rows: int, columns: int, title: str) -> None:
    """One path as arrows from cell to cell; skipped zero tokens leave no mark, dashed lines are jumps."""
    cells = path[path >= 0].long()
    y, x = (cells // columns).tolist(), (cells % columns).tolist()
    colours = require("matplotlib").colormaps["viridis"]
    for step in range(len(cells) - 1):
        jump = abs(y[step + 1] - y[step]) > 1 or abs(x[step + 1] - x[step]) > 1
        axes.annotate(
            "",
            xy=(x[step + 1], y[step + 1]),
            xytext=(x[step], y[step]),
            arrowprops=dict(
                arrowstyle="-|>",
                color=colours(step / max(1, len(cells) - 2)),
                linewidth=0.8 if jump else 1.6,
                linestyle=(0, (3, 3)) if jump else "solid",
                shrinkA=3,
                shrinkB=3,
            ),
        )
    axes.scatter(x, y, c=range(len(cells)), cmap="viridis", s=22, zorder=3)
    axes.scatter(x[:1], y[:1], s=90, facecolors="none", edgecolors="crimson", linewidths=1.6, zorder=4)
    axes.set(xlim=(-0.6, columns - 0.4), ylim=(rows - 0.4, -0.6), xticks=[], yticks=[], aspect="equal")
    axes.set_title(title, fontsize=9)
    for spine in axes.spines.values():
        spine.set_color("#dddddd")


def draw_gallery(scans: list[str], rows: int, columns: int, output: Path) -> None:
    """One row of pictures per strategy, one picture per path."""
    tables = {name: zoo.scan_paths(name, rows, columns, **({"size": 3} if name == "window" else {})) for name in scans}
    width = max(len(table) for table in tables.values())
    figure = require("matplotlib.figure").Figure(figsize=(2.1 * width, 2.3 * len(scans)), dpi=110)
    grid = figure.subplots(len(scans), width, squeeze=False)
    for row, (name, table) in zip(grid, tables.items(), strict=True):
        for k, axes in enumerate(row):
            if k < len(table):
                draw_path(axes, table[k], rows, columns, name if len(table) == 1 else f"{name}, path {k + 1}")
            else:
                axes.axis("off")
    figure.tight_layout()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m zoo.tools.scan_gallery",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=int, default=6)
    parser.add_argument("--columns", type=int, default=6)
    parser.add_argument("--scans", nargs="+", choices=zoo.list_scans(), default=zoo.list_scans(), metavar="NAME")
    parser.add_argument("--output", type=Path, default=Path("scans.png"))
    options = parser.parse_args()
    draw_gallery(options.scans, options.rows, options.columns, options.output)
    print(f"{len(options.scans)} scan orders on a {options.rows}x{options.columns} grid: {options.output}")


if __name__ == "__main__":
    main()
