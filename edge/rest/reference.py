"""What every documented field of the create calls does here: the table behind docs/api.md and the tests. `python -m edge.rest.reference`
prints the page.

A field that starts with a dash means nothing here: it is accepted and ignored. Bounds come from the table that requests are checked by.
"""

from collections.abc import Iterable, Mapping

from edge.conversation.validation import (
    LOGIT_BIAS_BOUND,
    MAX_CHARS,
    MAX_COUNTS,
    MAX_SAMPLING_COUNTS,
    MAX_SCHEMA_BYTES,
    MAX_STOP_CHARS,
    REQUEST_BOUNDS,
    SAMPLING_BOUNDS,
)
from edge.rest.body import MAX_DEPTH
from edge.rest.completion_schema import DEFAULT_MAX_TOKENS, MAX_PROMPTS

IGNORED = "-"
SAMPLING = {
    "temperature": "scales the logits; 0 always takes the likeliest token; left out: the model's default",
    "top_p": "draws from the smallest set of tokens that reaches this probability; left out: the model's default",
    "user": "carried along, never read",
    "metadata": "carried along, never read; a response gives it back",
    "top_k": "draws from so many likeliest tokens; 0: all",
    "min_p": "leaves out tokens less likely than this share of the likeliest",
    "repetition_penalty": "weakens tokens that stand in prompt or answer; 1: off",
    "min_tokens": "the model may not end its answer before so many tokens",
    "ignore_eos": "the model's own end does not end the answer",
    "stop_token_ids": "token ids that end the answer; they count as generated",
    "priority": "higher runs first",
    "cache_salt": "prefixes are shared in the cache only under the same salt",
    "timeout_s": "seconds after which the request ends with an error",
    "start_timeout_s": "seconds within which the first token must come, or the request is refused",
    "sanitize_input": "strips invisible characters and written-out control tokens from what users and tools said",
    "include_reasoning": "false leaves the reasoning out; its tokens still count",
    "conversation_date": "the date that the model is told, YYYY-MM-DD; pin it to keep a long conversation's prefix cached",
}
STOPPED = {
    **SAMPLING,
    "stream": "sends the answer as server-sent events",
    "stream_options": "`include_usage` adds a last chunk with the usage; the rest is ignored",
    "n": "how many choices to generate; 0 is 1",
    "seed": "the same request with the same seed gives the same tokens; choice i draws with seed + i",
    "stop": "texts that end the answer; they are not delivered, and match visible text only",
    "presence_penalty": "weakens tokens that were generated, once",
    "frequency_penalty": "weakens tokens that were generated, each time",
    "logit_bias": "added to a token id's logit; control tokens cannot be named",
}
CHAT = {
    "model": "which model answers: a name or an alias",
    "messages": "the conversation; every role, text parts, tool calls and results, and reasoning under `reasoning` or `reasoning_content`",
    **STOPPED,
    "max_tokens": "most tokens to generate, reasoning included; left out: the model's default",
    "max_completion_tokens": "the same under its newer name, which wins",
    "tools": "functions that may be called; tools of another type are left out",
    "tool_choice": "none, auto, required, a function by name, or `allowed_tools`",
    "parallel_tool_calls": "false: at most one call in a turn",
    "functions": "tools under their old name; the answer comes as `function_call`",
    "function_call": "their choice: none, auto, or a function by name",
    "response_format": "text, json_object, or json_schema: the answer then satisfies the schema",
    "reasoning_effort": "low, medium or high; none and minimal are low, xhigh and max are high; wins over a line `Reasoning: high` in the "
    "instructions, which wins over the model's default",
    "reasoning_level": "the same under another name",
    "logprobs": "log-probabilities of the visible tokens, before temperature, penalties and masks",
    "top_logprobs": "how many likeliest tokens come beside each",
    **dict.fromkeys(
        (
            "audio",
            "modalities",
            "moderation",
            "prediction",
            "prompt_cache_key",
            "prompt_cache_options",
            "prompt_cache_retention",
            "safety_identifier",
            "service_tier",
            "store",
            "verbosity",
            "web_search_options",
        ),
        IGNORED,
    ),
}
COMPLETIONS = {
    "model": CHAT["model"],
    "prompt": f"a text, token ids, or up to {MAX_PROMPTS} of either; the model goes on from it as it is; control tokens are refused",
    **STOPPED,
    "max_tokens": f"most tokens to generate; left out: {DEFAULT_MAX_TOKENS}",
    "logprobs": "log-probabilities of the tokens, and how many likeliest ones come beside each",
    "echo": "repeats the prompt before the answer; with `logprobs` its tokens have none",
    "suffix": "refused unless empty: the model cannot fill a gap",
    "best_of": "refused unless it equals `n`: every choice that is made is returned",
}
RESPONSES = {
    "model": CHAT["model"],
    "input": "a text, or items: messages, function calls and their outputs, reasoning, references; items of other tools are left out",
    "instructions": "the developer's message before the conversation; not carried over to the next response",
    "previous_response_id": "goes on from a stored response",
    "conversation": "goes on from the last response under this name, 1 to 128 of [A-Za-z0-9_-]; `previous_response_id` wins",
    "store": "false: the response cannot be fetched or followed later",
    "background": "answers at once; the response is fetched, followed or cancelled later",
    "stream": "sends the event protocol; the response is stored before its last event",
    **SAMPLING,
    "tools": CHAT["tools"],
    "tool_choice": CHAT["tool_choice"] + "; the choice of another tool is auto",
    "parallel_tool_calls": CHAT["parallel_tool_calls"],
    "text": "`format`: text, json_object or json_schema; `verbosity` is ignored",
    "reasoning": "`effort`, as `reasoning_effort` of a chat; `summary` is ignored: the reasoning itself is in the output",
    "max_output_tokens": "most tokens to generate, reasoning included; left out: the model's default",
    "top_logprobs": "log-probabilities of so many likeliest tokens",
    "include": "`message.output_text.logprobs` adds log-probabilities; the rest is ignored",
    "truncation": "auto: the oldest turns are left out until the rest fits",
    **dict.fromkeys(
        (
            "access_programs",
            "context_management",
            "image",
            "max_tool_calls",
            "moderation",
            "prompt",
            "prompt_cache_key",
            "prompt_cache_options",
            "prompt_cache_retention",
            "safety_identifier",
            "service_tier",
            "stream_options",
        ),
        IGNORED,
    ),
}
CALLS = {"POST /v1/chat/completions": CHAT, "POST /v1/completions": COMPLETIONS, "POST /v1/responses": RESPONSES}
BOUNDS = {
    **{name: str(bound) for name, bound in (SAMPLING_BOUNDS | REQUEST_BOUNDS).items()},
    **{name: f"at most {limit}" for name, limit in (MAX_COUNTS | MAX_SAMPLING_COUNTS).items()},
    **{name: f"at most {limit} characters" for name, limit in MAX_CHARS.items()},
    "stop": f"at most {MAX_COUNTS['stop']}, each of 1 to {MAX_STOP_CHARS} characters",
    "logit_bias": f"at most {MAX_SAMPLING_COUNTS['logit_bias']} ids, each {LOGIT_BIAS_BOUND}",
    "response_format": f"a schema of at most {MAX_SCHEMA_BYTES} bytes",
    "text": f"a schema of at most {MAX_SCHEMA_BYTES} bytes",
    "tools": f"at most {MAX_COUNTS['tools']}; names of 1 to 64 of [A-Za-z0-9_-]; a schema of at most {MAX_SCHEMA_BYTES} bytes each",
    "max_completion_tokens": str(SAMPLING_BOUNDS["max_tokens"]),
    "max_output_tokens": str(SAMPLING_BOUNDS["max_tokens"]),
}
INTRODUCTION = f"""# The API

The REST door has OpenAI's paths, and those of a few other dialects; the gRPC door has `ossia.v1.Inference`, with the same power: both make
the same request. `/openapi.json` describes every path, `/docs` shows it. This page is written by `python -m edge.rest.reference`.

A body is at most 8 MiB (`--max-body-bytes`) and {MAX_DEPTH} levels deep. A field that nobody knows is ignored. A URL in a request is never
fetched. An error has `message`, `type`, `param` and `code`, as OpenAI's clients expect, and the request's id in `x-request-id`; one that
may pass has `Retry-After`.

| path | |
| --- | --- |
| `POST /v1/chat/completions` | one turn of a conversation, whole or streamed |
| `GET /v1/chat/completions?messages=…` | the same for EventSource: fields as query parameters, `messages` as JSON or plain text |
| `POST /v1/responses` | one turn with items, and state that is kept |
| `GET`, `DELETE /v1/responses/ID`, `POST …/cancel`, `GET …/input_items` | what is kept: `--max-stored-responses`, for \
`--stored-response-ttl-s`, in Redis (`--redis-url`) or in the edge's memory |
| `POST /v1/completions` | text that goes on from a raw prompt |
| `GET /v1/models`, `GET /v1/models/NAME` | with `max_input_tokens`, `architecture`, `active_parameters`, `total_parameters` |
| `POST /tokenize`, `POST /detokenize` | a text or a conversation in token ids, and back |
| `GET /v1/health` | status, models, version, memory of this edge, open requests |
| `GET /v1/metrics` | Prometheus; the metrics port serves them too, with `/livez` and `/readyz` on a thread of their own |
| `POST /generate`, `POST /generate_stream` | as text-generation-inference has them |
| `POST /api/predict/`, `GET /api` | as a Gradio page has them |
"""


def write_page() -> str:
    tables = [
        f"## {call}\n\n| field | what it does here | bound |\n| --- | --- | --- |\n{_write_rows(fields)}" for call, fields in CALLS.items()
    ]
    return "\n".join((INTRODUCTION, *tables))


def _write_rows(fields: Mapping[str, str]) -> str:
    return "".join(f"| `{name}` | {meaning} | {BOUNDS.get(name, '')} |\n" for name, meaning in _ordered(fields))


def _ordered(fields: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    """Those without meaning come last, in one row."""
    yield from ((name, meaning) for name, meaning in fields.items() if meaning != IGNORED)
    if ignored := [name for name, meaning in fields.items() if meaning == IGNORED]:
        yield "`, `".join(ignored), "accepted and ignored"


if __name__ == "__main__":
    print(write_page(), end="")
