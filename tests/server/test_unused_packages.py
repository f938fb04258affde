"""What transformers has no use for here is not imported, where it is installed, and can be afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from turboquant_server.unused_packages import UNUSED

ROOT = Path(__file__).parents[2]
CODE = """
import sys
from turboquant_server.unused_packages import UNUSED, unused_packages_hidden

with unused_packages_hidden():
    import turboquant_server.model_manager
print(*(name for name in UNUSED if name in sys.modules))
import torchvision, scipy
print(torchvision.__name__, scipy.__name__)
"""


def test_packages_are_found_only_by_what_is_imported_later(tmp_path: Path) -> None:
    for name in UNUSED:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    paths = os.pathsep.join([str(ROOT), str(tmp_path)])
    result = subprocess.run(
        [sys.executable, "-c", CODE],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout == "\ntorchvision scipy\n", result.stderr
