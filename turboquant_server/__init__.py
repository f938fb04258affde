"""An OpenAI-compatible server whose every request has a TurboQuant-compressed KV cache."""

__version__ = "0.1.0"
