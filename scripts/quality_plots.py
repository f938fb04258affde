"""PNGs of what `evaluate_quality.py` measured: divergence against bits, and each setting's needle grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS_PER_ROW = 4


def plot_divergence(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Draws each setting's mean KL divergence, on a log axis, against its bits per value."""
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    for name, result in results.items():
        if result["kld_mean"] > 0:
            axes.errorbar(
                result["bits_per_value"],
                result["kld_mean"],
                yerr=result["kld_standard_error"],
                fmt="o",
                capsize=3,
                color="tab:blue",
            )
            place = (result["bits_per_value"], result["kld_mean"])
            axes.annotate(name, place, xytext=(7, 4), textcoords="offset points")
    axes.set(
        xlabel="bits per value (without exact tokens)",
        ylabel="KL divergence to bf16 per token, nats",
        yscale="log",
    )
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def plot_needles(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Draws the share of codes found by depth and length, a panel for each setting."""
    rows = -(-len(results) // PANELS_PER_ROW)
    columns = min(len(results), PANELS_PER_ROW)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.4 * columns, 3.2 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(results) :]:
        axis.axis("off")
    for axis, (name, result) in zip(axes.flat, results.items(), strict=False):
        shares = {(cell["depth"], cell["length"]): cell["exact"] for cell in result["needle"]}
        depths, lengths = (sorted({key[i] for key in shares}) for i in range(2))
        grid = [[shares[depth, length] for length in lengths] for depth in depths]
        image = axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for (depth, length), share in shares.items():
            place = lengths.index(length), depths.index(depth)
            axis.text(
                *place, f"{share:.0%}", ha="center", va="center", color="white" if share > 0.9 else "black"
            )
        axis.set(title=name, xlabel="context, tokens", ylabel="depth of the code")
        axis.set_xticks(range(len(lengths)), lengths)
        axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    figure.colorbar(image, ax=axes, label="codes given back exactly")
    figure.savefig(path, dpi=100)
    plt.close(figure)
