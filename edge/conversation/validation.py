"""What a ChatRequest must be, whichever door it came through. One table of bounds; every refusal names the field and the cure."""

import datetime
import re
from collections.abc import Iterator
from typing import NamedTuple

from protos.ossia.v1 import inference_pb2 as inference
from protos.ossia.v1 import sampling_pb2 as sampling
from services.errors import InvalidArgument, MissingField
from services.vocabulary import FIRST_CONTROL_ID, VOCAB_SIZE


class Bound(NamedTuple):
    """A number and the interval it must lie in; `is_open` leaves `low` itself out."""

    low: float
    high: float
    is_open: bool = False

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high and not (self.is_open and value == self.low)  # false for NaN

    def __str__(self) -> str:
        return f"{'above' if self.is_open else 'from'} {self.low:g} to {self.high:g}"


SAMPLING_BOUNDS = {
    "max_tokens": Bound(1, 2**31),
    "min_tokens": Bound(0, 2**31),
    "temperature": Bound(0, 2),
    "top_p": Bound(0, 1, is_open=True),
    "min_p": Bound(0, 1),
    "presence_penalty": Bound(-2, 2),
    "frequency_penalty": Bound(-2, 2),
    "repetition_penalty": Bound(0, 2, is_open=True),
    "top_logprobs": Bound(0, 20),
}
REQUEST_BOUNDS = {
    "n": Bound(0, 8),
    "priority": Bound(-100, 100),
    "start_timeout_s": Bound(0, 86_400, is_open=True),
    "timeout_s": Bound(0, 86_400, is_open=True),
}
MAX_COUNTS = {"tools": 128, "stop": 4, "metadata": 64}
MAX_SAMPLING_COUNTS = {"stop_token_ids": 64, "logit_bias": 1024}
MAX_CHARS = {"model": 256, "cache_salt": 128, "tenant": 128, "user": 1024}
MAX_STOP_CHARS = 256
MAX_SCHEMA_BYTES = 64 * 1024
LOGIT_BIAS_BOUND = Bound(-100, 100)
REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{0,128}")
FUNCTION_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
AUTHOR_NAME = re.compile(r"[^\s<|\\/>]{0,64}")  # a space or a sign of the format would read as more than a name


def check_request(request: inference.ChatRequest) -> None:
    """Raises InvalidArgument or MissingField for the first field that is wrong."""
    _check_bounds(request, REQUEST_BOUNDS)
    _check_bounds(request.sampling, SAMPLING_BOUNDS)
    for holder, counts in ((request, MAX_COUNTS), (request.sampling, MAX_SAMPLING_COUNTS)):
        for name, limit in counts.items():
            _require(len(getattr(holder, name)) <= limit, name, f"give at most {limit}")
    for name, limit in MAX_CHARS.items():
        _require(len(getattr(request, name)) <= limit, name, f"give at most {limit} characters")
    _require(REQUEST_ID.fullmatch(request.request_id) is not None, "request_id", "use at most 128 letters, digits and _.:-")
    _require(not request.conversation_date or _is_date(request.conversation_date), "conversation_date", "write it as YYYY-MM-DD")
    for at, stop in enumerate(request.stop):
        _require(0 < len(stop) <= MAX_STOP_CHARS, f"stop[{at}]", f"give 1 to {MAX_STOP_CHARS} characters")
    _check_token_ids(request.sampling)
    _check_tools(request)
    _check_format(request.response_format)
    if request.HasField("prompt"):
        _check_prompt(request)
    else:
        _check_messages(request)


def _check_bounds(holder: inference.ChatRequest | sampling.SamplingParams, bounds: dict[str, Bound]) -> None:
    for name, bound in bounds.items():
        is_set = not holder.DESCRIPTOR.fields_by_name[name].has_presence or holder.HasField(name)  # type: ignore[arg-type]  # names of the table
        _require(not is_set or bound.holds(getattr(holder, name)), name, f"give a number {bound}")


def _check_token_ids(params: sampling.SamplingParams) -> None:
    for token_id in params.stop_token_ids:
        _require(token_id < VOCAB_SIZE, "stop_token_ids", f"give ids under {VOCAB_SIZE}")
    for token_id, bias in params.logit_bias.items():
        _require(token_id < FIRST_CONTROL_ID, "logit_bias", f"give token ids under {FIRST_CONTROL_ID}: control tokens keep their weight")
        _require(LOGIT_BIAS_BOUND.holds(bias), f"logit_bias.{token_id}", f"give a number {LOGIT_BIAS_BOUND}")


def _check_tools(request: inference.ChatRequest) -> None:
    names = [tool.name for tool in request.tools]
    for at, tool in enumerate(request.tools):
        _require_name(tool.name, f"tools[{at}].function.name")
        _require(
            names.index(tool.name) == at, f"tools[{at}].function.name", f"give each function a name of its own; {tool.name!r} is taken"
        )
        size = len(tool.parameters_json_schema.encode())
        _require(size <= MAX_SCHEMA_BYTES, f"tools[{at}].function.parameters", f"keep it under {MAX_SCHEMA_BYTES} bytes")
    choice = request.tool_choice
    if choice.mode in (inference.ToolChoice.MODE_REQUIRED, inference.ToolChoice.MODE_NAMED):
        _require(bool(names), "tool_choice", "send the tools that it chooses from, or leave it out")
    if choice.mode == inference.ToolChoice.MODE_NAMED:
        _require(choice.name in names, "tool_choice", f"name one of the tools; {choice.name!r} is none of them")


def _check_format(asked: inference.ResponseFormat) -> None:
    if asked.WhichOneof("kind") == "json_schema":
        _require_name(asked.json_schema.name, "response_format.json_schema.name")
        is_short = len(asked.json_schema.schema.encode()) <= MAX_SCHEMA_BYTES
        _require(is_short, "response_format.json_schema.schema", f"keep it under {MAX_SCHEMA_BYTES} bytes")


def _check_messages(request: inference.ChatRequest) -> None:
    if not request.messages:
        raise MissingField("messages: it is empty; give at least one message", "messages")
    for at, message in enumerate(request.messages):
        for param in _missing_fields(message, f"messages[{at}]"):
            raise MissingField(f"{param}: it is missing; give it", param)
        _require(
            AUTHOR_NAME.fullmatch(message.name) is not None,
            f"messages[{at}].name",
            "use at most 64 characters, no space and none of <|\\/>",
        )
        for index, call in enumerate(message.tool_calls):
            _require_name(call.name, f"messages[{at}].tool_calls[{index}].function.name")


def _check_prompt(request: inference.ChatRequest) -> None:
    is_alone = not (request.messages or request.tools or request.response_format.WhichOneof("kind"))
    _require(is_alone, "prompt", "send it without messages, tools and response_format")
    for token_id in request.prompt.token_ids:
        _require(token_id < FIRST_CONTROL_ID, "prompt", f"give token ids under {FIRST_CONTROL_ID}: control tokens cannot be sent")


def _missing_fields(message: inference.Message, param: str) -> Iterator[str]:
    if message.role == inference.ROLE_UNSPECIFIED:
        yield f"{param}.role"
    if not message.content and message.role != inference.ROLE_ASSISTANT:
        yield f"{param}.content"
    if message.role == inference.ROLE_TOOL and not (message.tool_call_id or message.name):
        yield f"{param}.tool_call_id"


def _require_name(name: str, param: str) -> None:
    _require(FUNCTION_NAME.fullmatch(name) is not None, param, "use 1 to 64 letters, digits, _ and -")


def _require(holds: bool, param: str, cure: str) -> None:
    if not holds:
        raise InvalidArgument(f"{param} is out of bounds: {cure}", param)


def _is_date(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
