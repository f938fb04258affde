"""Draws the quantizers' error against bits beside what theory allows: turboquant_core/figures/distortion.png.

    python scripts/plot_distortion.py

Squared error of the vectors and of their inner products, as in figure 3 of the TurboQuant paper (arXiv
2504.19874), with its bounds of theorems 1 to 3. Prints the numbers as a table and, last, one JSON object.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import matplotlib
import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from turboquant_core import BlockQuantizer, TurboQuantMSE, TurboQuantProd

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FIGURE = Path(__file__).resolve().parents[1] / "turboquant_core/figures/distortion.png"
DIM = 128
NUM_VECTORS = 64 * 400
BITS = range(1, 9)
CACHE_BITS = (2, 3, 4, 8)
NUM_SEEDS = 5  # of rotations and projections; inner products of one vector with all queries share an error


def errors(x: Tensor, estimate: Tensor, queries: Tensor) -> tuple[float, float]:
    """Returns the mean squared error of unit vectors, and DIM times that of products with unit queries."""
    difference = x - estimate
    products = (difference * queries).sum(-1)
    return difference.square().sum(-1).mean().item(), DIM * products.square().mean().item()


def measure() -> dict[str, dict[int, tuple[float, float]]]:
    """Returns by name and bits the two errors, averaged over seeds."""
    generator = torch.Generator().manual_seed(0)
    x, queries = (normalize(torch.randn(NUM_VECTORS, DIM, generator=generator), dim=-1) for _ in range(2))
    results: dict[str, dict[int, tuple[float, float]]] = {"TurboQuantMSE": {}, "TurboQuantProd": {}}
    for bits in tqdm(BITS, unit="bits"):
        for name, make in (("TurboQuantMSE", TurboQuantMSE), ("TurboQuantProd", TurboQuantProd)):
            found = []
            for seed in range(NUM_SEEDS):
                quantizer = make(DIM, bits, seed=seed)
                codes = quantizer.quantize(x)
                parts = codes if name == "TurboQuantMSE" else (codes,)
                found.append(errors(x, quantizer.dequantize(*parts), queries))
            results[name][bits] = tuple(torch.tensor(found, dtype=torch.float64).mean(0).tolist())
    results["cache, keys"] = {}
    for bits in CACHE_BITS:
        cache = BlockQuantizer(DIM, bits, scale="norm_corrected")
        estimate = cache.dequantize(cache.quantize(x.view(-1, 64, DIM))).view_as(x)
        results["cache, keys"][bits] = errors(x, estimate, queries)
    return results


def draw(results: dict[str, dict[int, tuple[float, float]]]) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    titles = ("squared error of unit vectors", f"squared error of inner products x {DIM}")
    upper = (math.sqrt(3) * math.pi / 2, math.sqrt(3) * math.pi**2)
    for index, (axis, title) in enumerate(zip(axes, titles, strict=True)):
        for name, marker in (("TurboQuantMSE", "o"), ("TurboQuantProd", "s"), ("cache, keys", "x")):
            points = results[name]
            axis.plot(
                list(points), [point[index] for point in points.values()], marker, label=name, alpha=0.8
            )
        axis.plot(BITS, [4.0**-b for b in BITS], "k:", label="lower bound, any quantizer")
        axis.plot(BITS, [upper[index] * 4.0**-b for b in BITS], "k--", label="upper bound of the paper")
        axis.set(yscale="log", xlabel="bits per number", title=title, xticks=list(BITS))
        axis.grid(alpha=0.3)
    axes[0].legend()
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, dpi=110)


def main() -> None:
    results = measure()
    draw(results)
    print(f"{'bits':>18}" + "".join(f"{bits:>11}" for bits in BITS))
    for index, kind in enumerate(("vectors", "products")):
        for name, points in results.items():
            cells = (f"{points[bits][index]:>11.3g}" if bits in points else " " * 11 for bits in BITS)
            print(f"{name:>18}" + "".join(cells) + f"  {kind}")
    print(json.dumps({"dim": DIM, "vectors": NUM_VECTORS, "seeds": NUM_SEEDS, "errors": results}))


if __name__ == "__main__":
    main()
