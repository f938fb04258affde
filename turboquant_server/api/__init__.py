"""OpenAI's HTTP surface: checks requests, asks the engine, shapes responses. Imports no torch."""
