"""The documented fields: every one is in the table, does what the table says, and all of them at once are accepted."""

from pathlib import Path
from typing import Any, get_type_hints

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params
from pydantic import BaseModel

from edge.rest.chat_schema import ChatCompletionRequest
from edge.rest.completion_schema import CompletionRequest
from edge.rest.reference import CALLS, CHAT, IGNORED, RESPONSES, write_page
from edge.rest.responses.schema import ResponsesRequest
from tests.edge.scripted_scheduler import MODEL, stand

PAGE = Path(__file__).parent.parent.parent / "docs" / "api.md"
FUNCTION: Any = {"name": "get", "description": "d", "parameters": {"type": "object", "properties": {}}, "strict": True}
SCHEMA: Any = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": False}
SHARED: Any = {
    "model": MODEL,
    "temperature": 0.5,
    "top_p": 0.5,
    "user": "ann",
    "metadata": {"a": "b"},
    "top_k": 5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "min_tokens": 1,
    "ignore_eos": False,
    "stop_token_ids": [5],
    "priority": 1,
    "cache_salt": "s",
    "timeout_s": 60,
    "start_timeout_s": 30,
    "sanitize_input": False,
    "include_reasoning": True,
    "conversation_date": "2026-01-02",
}
STOPPED: Any = {
    **SHARED,
    "stream": False,
    "stream_options": {"include_usage": True, "include_obfuscation": False},
    "n": 2,
    "seed": 7,
    "stop": ["zzz"],
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "logit_bias": {"5": 1},
}
IGNORED_VALUES: Any = {
    "access_programs": {"cyber": "standard"},
    "audio": {"voice": "alloy", "format": "mp3"},
    "context_management": [{"type": "compaction", "compact_threshold": 1000}],
    "image": {"context_compression": "auto"},
    "max_tool_calls": 3,
    "modalities": ["text"],
    "moderation": {"model": "m"},
    "prediction": {"type": "content", "content": "x"},
    "prompt": {"id": "pmpt_1"},
    "prompt_cache_key": "k",
    "prompt_cache_options": {"mode": "implicit"},
    "prompt_cache_retention": "24h",
    "safety_identifier": "s",
    "service_tier": "auto",
    "store": True,
    "stream_options": {"include_obfuscation": False},
    "verbosity": "low",
    "web_search_options": {},
}
BODIES: dict[str, Any] = {
    "POST /v1/chat/completions": {
        **{name: IGNORED_VALUES[name] for name, meaning in CHAT.items() if meaning == IGNORED},
        **STOPPED,
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 50,
        "max_completion_tokens": 60,
        "tools": [{"type": "function", "function": FUNCTION}, {"type": "custom", "custom": {"name": "c"}}],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "functions": [FUNCTION],
        "function_call": "auto",
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}},
        "reasoning_effort": "high",
        "reasoning_level": "low",
        "logprobs": True,
        "top_logprobs": 1,
    },
    "POST /v1/completions": {**STOPPED, "prompt": "Hi", "max_tokens": 50, "logprobs": 1, "echo": True, "suffix": "", "best_of": 2},
    "POST /v1/responses": {
        **{name: IGNORED_VALUES[name] for name, meaning in RESPONSES.items() if meaning == IGNORED},
        **SHARED,
        "input": "Hi",
        "instructions": "Be brief.",
        "previous_response_id": None,
        "conversation": "conv_1",
        "store": True,
        "background": False,
        "stream": False,
        "tools": [{"type": "function", **FUNCTION}, {"type": "web_search"}],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}, "verbosity": "low"},
        "reasoning": {"effort": "high", "summary": "auto"},
        "max_output_tokens": 50,
        "top_logprobs": 1,
        "include": ["message.output_text.logprobs", "reasoning.encrypted_content"],
        "truncation": "auto",
    },
}
KINDS: list[tuple[str, Any, type[BaseModel]]] = [
    ("POST /v1/chat/completions", chat_create_params, ChatCompletionRequest),
    ("POST /v1/completions", completion_create_params, CompletionRequest),
    ("POST /v1/responses", response_create_params, ResponsesRequest),
]


def documented(module: Any) -> set[str]:
    """Every field that OpenAI's client can send in a create call."""
    names = [name for name in vars(module) if name.endswith(("CreateParamsNonStreaming", "CreateParamsStreaming"))]
    assert names
    return {field for name in names for field in get_type_hints(getattr(module, name), vars(module))}


@pytest.mark.parametrize(("call", "module", "kind"), KINDS, ids=lambda value: value if isinstance(value, str) else "")
def test_the_table_has_every_documented_field_and_tells_the_truth(call: str, module: Any, kind: type[BaseModel]) -> None:
    table = CALLS[call]
    assert documented(module) <= table.keys()
    assert {name for name, meaning in table.items() if meaning != IGNORED} == set(kind.model_fields)


@pytest.mark.parametrize("call", CALLS)
async def test_every_field_at_once_is_accepted(call: str) -> None:
    body = BODIES[call]
    assert body.keys() == CALLS[call].keys()
    async with stand() as it, it.http() as http:
        if call.endswith("responses"):
            before = await http.post("/v1/responses", json={"model": MODEL, "input": "First"})
            body = {**body, "previous_response_id": before.json()["id"]}
        got = await http.post(call.removeprefix("POST "), json=body)
        streamed = await http.post(call.removeprefix("POST "), json={**body, "stream": True})
    assert (got.status_code, streamed.status_code) == (200, 200), (got.text, streamed.text)
    assert "Hello there." in got.text


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == write_page(), "run `python -m edge.rest.reference > docs/api.md`"
