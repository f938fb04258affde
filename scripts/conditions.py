"""Conditions: with what command, when and on what a measurement was made."""

from __future__ import annotations

import platform
import shlex
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch
import transformers


def conditions(*, on_gpu: bool) -> dict[str, str]:
    """Return the conditions of this run, for a report."""
    return {
        "command": shlex.join(["python", f"scripts/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
