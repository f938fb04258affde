"""Packages that transformers imports where it finds them, for what no language model does. Imports none."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

# For assisted generation's roc_curve, losses of object detection, images and sound. Where all are installed,
# with what they import in turn, they are 29% of the modules and 22% of the time that imports take.
UNUSED = ("sklearn", "scipy", "torchvision", "torchaudio")


@contextmanager
def unused_packages_hidden() -> Iterator[None]:
    """Let imports take place as if these packages were not installed, and transformers remember it so.

    Afterwards they can be imported: code that comes with a model may have a use for them.
    """
    hidden = [name for name in UNUSED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # what Python takes for not found
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
