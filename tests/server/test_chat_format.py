"""The parsers are found in chat templates, or told by flags that know the same names."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from answers import FORMATS, TOOLS, chat_format, parse
from openai import OpenAI
from tiny_tokenizer import CHAT_TEMPLATE, build_tokenizer
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from turboquant_server.config import ServerConfig
from turboquant_server.engine.detokenizer import Detokenizer
from turboquant_server.parsing import chat_format as registry

QWEN3 = (
    "{%- if tools %}{{- '<tools></tools> return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\\n<tool_call>\\n{"name": <function-name>, "arguments": '
    "<args-json-object>}\\n</tool_call>' }}{%- endif %}{%- if '</think>' in content %}{%- endif %}"
)
# What stands in the templates of models, shortened.
TEMPLATES = {
    "Qwen3": (QWEN3, "hermes", "qwen3"),
    "Qwen2.5": (QWEN3.split("{%- if '</think>'")[0], "hermes", "none"),
    "Qwen3-Coder": ("{% if tools %}<tool_call>\n<function=example_function_name>", "qwen3_coder", "none"),
    "Llama 3.1": (
        "{% if tools %}Environment: ipython{% endif %}{{- '<|python_tag|>' + tool_call.name }}"
        '{"name": function name, "parameters": dictionary of argument name and its value}',
        "llama3_json",
        "none",
    ),
    "Llama 3.2": (
        'Respond in the format {"name": function name, "parameters": dictionary of argument name and its '
        "value}. Do not use variables.{{ tools }}",
        "llama3_json",
        "none",
    ),
    "Mistral": ("[AVAILABLE_TOOLS]{{ tools }}[TOOL_CALLS]", "mistral", "none"),
    "Magistral": ("[AVAILABLE_TOOLS]{{ tools }}[TOOL_CALLS][THINK]x[/THINK]", "mistral", "mistral"),
    "gpt-oss": (
        '{{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}{{ tools }}',
        "openai",
        "openai_gptoss",
    ),
    "DeepSeek-R1": (
        "{{'<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] + "  # noqa: RUF001
        "'<｜tool▁sep｜>' + '```json'}}{% set content = content.split('</think>')[-1] %}",  # noqa: RUF001
        "deepseek_v3",
        "deepseek_r1",
    ),
    "DeepSeek-V3.1": (
        "{{'<｜Assistant｜></think>'}}{{'<｜tool▁call▁begin｜>' + name + '<｜tool▁sep｜>'}}",  # noqa: RUF001
        "deepseek_v31",
        "deepseek_r1",
    ),
    "GLM": ("<tool_call>{function-name}\n<arg_key>{arg-key}</arg_key></tool_call></think>", "none", "qwen3"),
    "plain": (CHAT_TEMPLATE, "none", "none"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_gives_its_models_format_away(name: str) -> None:
    template, tool_call_parser, reasoning_parser = TEMPLATES[name]
    chat = chat_format(build_tokenizer(), template)
    assert (chat.tool_call_parser, chat.reasoning_parser) == (tool_call_parser, reasoning_parser)


def test_one_of_several_templates_may_be_the_one_with_tools() -> None:
    tokenizer = build_tokenizer()
    chat = chat_format(tokenizer, {"default": CHAT_TEMPLATE, "tool_use": QWEN3})  # type: ignore[arg-type]
    assert chat.has_tools and chat.tool_call_parser == "hermes"
    assert not chat_format(tokenizer, CHAT_TEMPLATE).has_tools
    assert str(chat_format(tokenizer, None)) == "tool calls left in the text, reasoning left in the text"  # type: ignore[arg-type]


def test_the_flags_know_every_parser() -> None:
    fields = ServerConfig.model_fields
    own = {registry.AUTO, registry.NONE}
    calls = {*registry.CALL_PARSERS, registry.HARMONY_CALLS}
    assert set(get_args(fields["tool_call_parser"].annotation)) == own | calls
    reasoning = {*registry.REASONING_MARKS, registry.HARMONY_REASONING}
    assert set(get_args(fields["reasoning_parser"].annotation)) == own | reasoning
    assert {name for name, _ in registry.CALL_SIGNS} <= calls | own
    assert {name for name, _ in registry.REASONING_SIGNS} <= reasoning


def test_a_flag_counts_more_than_the_template() -> None:
    chat = chat_format(build_tokenizer(), QWEN3, tool_call_parser="mistral", reasoning_parser="none")
    assert str(chat) == "tool calls as mistral, reasoning left in the text"
    text = "<think>So</think>[TOOL_CALLS]f{}"
    assert parse(chat.open("", TOOLS), [text]) == [("content", "<think>So</think>"), ("call", ("f", {}))]


@pytest.mark.parametrize("parsers", [{"tool_call_parser": "none"}, {"reasoning_parser": "none"}], ids=str)
def test_half_of_harmony_may_be_switched_off(parsers: dict[str, str]) -> None:
    known = FORMATS["openai"]
    chat = chat_format(build_tokenizer(), known.template, **parsers)
    text = known.write("Why", "So", [("f", {"a": 1})])
    expected: dict[str, list[Any]] = {
        "tool_call_parser": [("reasoning", "Why"), ("content", 'So\n\n{"a": 1}')],
        "reasoning_parser": [("content", "Why\n\nSo"), ("call", ("f", {"a": 1}))],
    }
    assert parse(chat.open("", TOOLS), [text]) == expected[next(iter(parsers))]


def mistral_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose marks are special tokens, among others that are not theirs."""
    tokenizer = build_tokenizer()
    marks = ["[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]"]
    tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    return tokenizer


def test_marks_that_are_special_tokens_have_text_and_others_have_none() -> None:
    tokenizer = mistral_tokenizer()
    chat = chat_format(tokenizer, FORMATS["mistral"].template)
    text = "[THINK]Why[/THINK]So<|im_start|>[TOOL_CALLS]f<|endoftext|>[ARGS]{}"
    for with_tools, expected in [
        (True, "[THINK]Why[/THINK]So[TOOL_CALLS]f[ARGS]{}"),
        (False, "[THINK]Why[/THINK]Sof{}"),
    ]:
        skipped = chat.skipped_token_ids(with_tools)
        detokenizer = Detokenizer(tokenizer, tokenizer.encode("Hi <|im_start|>"), (), skipped)
        pieces = [detokenizer.append(token_id) for token_id in tokenizer.encode(text)]
        assert "".join(pieces) + detokenizer.flush() == expected


def test_where_no_mark_is_a_special_token_all_are_skipped() -> None:
    chat = chat_format(build_tokenizer(), QWEN3)
    assert chat.skipped_token_ids(with_tools=True) is chat.skipped_token_ids(with_tools=False) is None


def test_a_mark_that_is_a_special_token_comes_through_the_engine(
    client: OpenAI, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = server.model_manager
    template = {
        "start_anchor": "assistant\n",
        "fields": {"thinking": {"open": "<|im_start|>"}, "content": {}},
    }
    mark = manager.tokenizer.convert_tokens_to_ids("<|im_start|>")
    fields: Any = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
    fields |= {"logit_bias": {str(mark): 100}, "temperature": 0}
    assert client.chat.completions.create(**fields).choices[0].message.content == ""
    monkeypatch.setattr(manager, "chat_format", chat_format(manager.tokenizer, CHAT_TEMPLATE, template))
    message = client.chat.completions.create(**fields).choices[0].message
    assert message.content == ""
    assert (message.model_extra or {})["reasoning"] == "<|im_start|>" * 2
