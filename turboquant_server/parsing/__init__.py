"""What a model writes, to content, reasoning and tool calls. Imports no HTTP library and no engine."""
