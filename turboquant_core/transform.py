"""Transform: the matrix that keys or values of one layer are multiplied by before they are quantized.

By default it is a random rotation, the same for all heads. With the second moments of a head's keys and of
the queries that read them it is made so that the error falls where queries look least: see `balanced`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from turboquant_core.rotation import rotation_matrix

# Added to every direction of a second moment, as a share of the mean, so that a direction which a short text
# never used is not taken for one that never matters. 0.001 to 0.1 give the same divergence within 1%.
_FLOOR = 0.01


class Transform:
    """Map vectors to the space in which they are quantized, and back.

    Immutable, and shared by everything that quantizes the same layer; a copy is the object itself.

    Args:
        matrix: float32 ``[num_heads, dim, dim]``, or ``[1, dim, dim]`` for all heads; ``y = matrix @ x``.
        inverse: Its inverse.

    Attributes:
        num_heads: Number of matrices.
        dim: Dimension of the vectors.
    """

    def __init__(self, matrix: Tensor, inverse: Tensor) -> None:
        self.num_heads, _, self.dim = matrix.shape
        # Transposed: vectors are rows.
        self._matrices = {
            matrix.device: (matrix.mT.contiguous(), inverse.mT.contiguous(), inverse.contiguous())
        }

    def apply(self, x: Tensor) -> Tensor:
        """Transform vectors: float32 ``[..., num_heads, num_vectors, dim]``, of the same shape."""
        return _multiply(x, self.matrices(x.device)[0])

    def undo(self, y: Tensor) -> Tensor:
        """Invert `apply`."""
        return _multiply(y, self.matrices(y.device)[1])

    def apply_to_queries(self, queries: Tensor) -> Tensor:
        """Return ``A^-T q``, whose products with transformed vectors are those of q with the vectors."""
        return _multiply(queries, self.matrices(queries.device)[2])

    def matrices(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return what rows are multiplied with from the right, ``[num_heads, dim, dim]`` each.

        For `apply`, for `undo` and for `apply_to_queries`; float32, contiguous.
        """
        if device not in self._matrices:
            with torch.inference_mode(False):
                first, second, third = next(iter(self._matrices.values()))
                self._matrices[device] = first.to(device), second.to(device), third.to(device)
        return self._matrices[device]

    def __copy__(self) -> Transform:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Transform:
        return self


class LayerTransforms(NamedTuple):
    """The transforms of one layer's keys and values; None stands for a rotation."""

    keys: Transform | None
    values: Transform | None


def _multiply(x: Tensor, matrices: Tensor) -> Tensor:
    # 16 bits would lose what tells tokens apart beside a large offset that they share.
    with torch.autocast(x.device.type, enabled=False):
        return x @ (matrices[0] if matrices.shape[0] == 1 else matrices)


@functools.lru_cache(maxsize=64)
def rotation(dim: int, seed: int) -> Transform:
    """Return the random rotation of a dimension and a seed, for all heads."""
    with torch.inference_mode(False):
        matrix = rotation_matrix(dim, seed).unsqueeze(0)
        return Transform(matrix, matrix.mT)


@torch.inference_mode(False)
@torch.no_grad()
def balanced(moment: Tensor, query_moment: Tensor | None, seed: int) -> Transform:
    """Return the transforms of heads that make the error of products with queries smallest.

    Quantizing ``y = A x`` leaves an error that is the same in all directions and proportional to
    ``tr(A M A^T)``, with M the second moment of the vectors. Seen by queries with the second moment Q it is
    ``tr(A M A^T) tr(A^-T Q A^-1)``, which no A makes smaller than one whose ``P = A^T A`` solves
    ``P M P = Q``: the geometric mean of ``M^-1`` and Q. A is then a rotation of ``P^(1/2)``. Whatever
    invertible matrix a model has between its queries and keys, an outlier channel say, cancels. Without
    queries (values) Q is the identity: the squared error of the vectors themselves is smallest.

    Args:
        moment: float64 ``[num_heads, dim, dim]``, on the CPU: mean of ``x x^T`` over vectors ``x``, less
            what is stored of their mean.
        query_moment: The same of the queries that read them.
        seed: Seed of the rotation.
    """
    dim = moment.shape[-1]
    moment = _normalized(moment)
    if query_moment is None:
        (root,) = _powers(moment, -0.25)
    else:
        half, inverse_half = _powers(moment, 0.5, -0.5)
        (middle,) = _powers(half @ _normalized(query_moment) @ half, 0.5)
        (root,) = _powers(inverse_half @ middle @ inverse_half, 0.5)
    matrix = rotation_matrix(dim, seed).double() @ root
    # As long after the transform as before, so that norms keep their range.
    lengths = (matrix @ moment @ matrix.mT).diagonal(dim1=-2, dim2=-1).mean(-1)
    matrix = matrix / lengths.sqrt()[:, None, None]
    return Transform(matrix.float(), torch.linalg.inv(matrix).float())


def _normalized(moment: Tensor) -> Tensor:
    """Scale to a mean eigenvalue of 1, or to the identity if there is nothing to scale, and add the floor."""
    identity = torch.eye(moment.shape[-1], dtype=moment.dtype)
    means = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    scaled = torch.where(means > 0, moment / means.where(means > 0, 1), identity)
    return (scaled + scaled.mT) / 2 + _FLOOR * identity


def _powers(matrix: Tensor, *exponents: float) -> list[Tensor]:
    """Return powers of symmetric positive definite matrices."""
    eigenvalues, eigenvectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    positive = eigenvalues.clamp_min(torch.finfo(matrix.dtype).tiny)
    return [(eigenvectors * (positive**e).unsqueeze(-2)) @ eigenvectors.mT for e in exponents]
