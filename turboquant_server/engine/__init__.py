"""The engine: token ids and sampling parameters in, tokens and text out. Knows nothing about HTTP."""
