"""An OpenAI-compatible server whose every request has a TurboQuant-compressed KV cache."""

from turboquant_core import __version__

__all__ = ["__version__"]
