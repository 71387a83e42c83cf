"""The body of POST /v1/chat/completions, with OpenAI's names, and what it becomes: one ChatRequest.

Fields of OpenAI's that mean nothing here (`store`, `service_tier`, `modalities`, …) and fields that nobody knows are accepted and ignored;
tools that are no functions are left out. `functions` and `function_call` are tools under their old names, and are answered under them.
"""

from typing import Annotated, Literal

import orjson
from pydantic import BeforeValidator, Field, model_validator

from edge.rest.sampling_schema import EFFORTS, Count, Effort, Loose, StoppedSamplingFields
from protos.ossia.v1 import inference_pb2 as inference
from protos.ossia.v1 import sampling_pb2 as sampling
from services.errors import Unsupported

CHOICE_MODES = {
    "none": inference.ToolChoice.MODE_NONE,
    "auto": inference.ToolChoice.MODE_AUTO,
    "required": inference.ToolChoice.MODE_REQUIRED,
}
TEXT_PARTS = ("text", "input_text", "output_text")


def _as_parts(value: object) -> object:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class ContentPart(Loose):
    type: str
    text: str = ""
    refusal: str = ""  # an assistant's, from an earlier answer

    @model_validator(mode="after")
    def _check(self) -> "ContentPart":
        if self.type not in (*TEXT_PARTS, "refusal"):
            raise ValueError(f"parts of type {self.type!r} cannot be read by this model; send text parts")
        if self.type in TEXT_PARTS and "text" not in self.model_fields_set:
            raise ValueError("a text part needs its text; give it")
        return self


Content = Annotated[list[ContentPart] | None, BeforeValidator(_as_parts)]


class CalledFunction(Loose):
    name: str
    arguments: str = ""


class ToolCall(Loose):
    id: str = ""
    function: CalledFunction | None = None


class Message(Loose):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content = None
    name: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    function_call: CalledFunction | None = None
    tool_call_id: str | None = None

    def to_proto(self) -> inference.Message:
        calls = [(call.id, call.function) for call in self.tool_calls or () if call.function is not None]
        if self.function_call is not None:
            calls.append(("", self.function_call))
        return inference.Message(
            role=inference.ROLE_TOOL if self.role == "function" else inference.Role.Value(f"ROLE_{self.role.upper()}"),
            content=[inference.ContentPart(text=part.text or part.refusal) for part in self.content or ()],
            name=self.name or "",
            reasoning=self.reasoning or self.reasoning_content or "",
            tool_calls=[inference.ToolCall(id=call_id, name=called.name, arguments=called.arguments) for call_id, called in calls],
            tool_call_id=self.tool_call_id or "",
        )


class Function(Loose):
    name: str
    description: str | None = None
    parameters: dict[str, object] | None = None
    strict: bool | None = None

    def to_proto(self) -> inference.Tool:
        parameters = "" if self.parameters is None else write_json(self.parameters)
        return inference.Tool(
            name=self.name, description=self.description or "", parameters_json_schema=parameters, strict=bool(self.strict)
        )


class Tool(Loose):
    type: str
    function: Function | None = None

    @model_validator(mode="after")
    def _check(self) -> "Tool":
        if self.type == "function" and self.function is None:
            raise ValueError("a tool of type 'function' needs its function; give it")
        return self


class FunctionName(Loose):
    name: str


class NamedTool(Loose):
    function: FunctionName | None = None


class AllowedTools(Loose):
    mode: Literal["auto", "required"]
    tools: list[NamedTool]


def _as_choice(value: object) -> object:
    return {"type": value} if isinstance(value, str) else value


class NamedChoice(Loose):
    """`"auto"` and its kin as a string, a function by name, or some of the tools."""

    type: str
    function: FunctionName | None = None
    allowed_tools: AllowedTools | None = None


def _as_legacy_choice(value: object) -> object:
    return {"name": "", "mode": value} if isinstance(value, str) else value


class LegacyChoice(Loose):
    name: str
    mode: Literal["none", "auto"] | None = None


class JsonSchema(Loose):
    name: str
    description: str | None = None
    schema_: dict[str, object] | None = Field(default=None, alias="schema")
    strict: bool | None = None

    def to_proto(self) -> inference.ResponseFormat:
        schema = inference.ResponseFormat.JsonSchema(
            name=self.name, description=self.description or "", schema=write_json(self.schema_ or {}), strict=bool(self.strict)
        )
        return inference.ResponseFormat(json_schema=schema)


class ResponseFormat(Loose):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check(self) -> "ResponseFormat":
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("the type 'json_schema' needs json_schema; give it")
        return self

    def to_proto(self) -> inference.ResponseFormat:
        if self.type == "text":
            return inference.ResponseFormat()
        return inference.ResponseFormat(json_object=True) if self.json_schema is None else self.json_schema.to_proto()


class StreamOptions(Loose):
    include_usage: bool | None = None


class ChatCompletionRequest(StoppedSamplingFields):
    model: str
    messages: list[Message]
    stream_options: StreamOptions | None = None
    tools: list[Tool] | None = None
    tool_choice: Annotated[NamedChoice | None, BeforeValidator(_as_choice)] = None
    parallel_tool_calls: bool | None = None
    functions: list[Function] | None = None
    function_call: Annotated[LegacyChoice | None, BeforeValidator(_as_legacy_choice)] = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Effort | None = None
    reasoning_level: Effort | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Count | None = None

    @property
    def is_legacy(self) -> bool:
        """The caller knows calls by their old name."""
        return bool(self.functions) and not self.tools

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def to_proto(self, request_id: str) -> inference.ChatRequest:
        """Raises Unsupported for a choice of tools that cannot be made."""
        request = inference.ChatRequest(
            request_id=request_id,
            model=self.model,
            messages=[message.to_proto() for message in self.messages],
            tools=self._convert_tools(),
            tool_choice=self._convert_choice(),
            parallel_tool_calls=False if self.is_legacy else self.parallel_tool_calls,
            response_format=self.response_format.to_proto() if self.response_format else None,
            reasoning_effort=EFFORTS[self.reasoning_effort or self.reasoning_level],
            sampling=sampling.SamplingParams(
                max_tokens=self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens,
                top_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            ),
        )
        return self.fill(request)

    def _convert_tools(self) -> list[inference.Tool]:
        functions = self.functions or () if self.is_legacy else [tool.function for tool in self.tools or () if tool.function is not None]
        choice = self.tool_choice
        if choice is not None and choice.allowed_tools is not None:
            allowed = {tool.function.name for tool in choice.allowed_tools.tools if tool.function is not None}
            functions = [function for function in functions if function.name in allowed]
        return [function.to_proto() for function in functions]

    def _convert_choice(self) -> inference.ToolChoice | None:
        choice = self.tool_choice
        if self.is_legacy and self.function_call is not None:
            return choose(self.function_call.mode, self.function_call.name)
        if choice is None:
            return None
        if choice.allowed_tools is not None:
            return choose(choice.allowed_tools.mode)
        return choose(choice.type, choice.function.name if choice.function else "")


def choose(mode: str | None, name: str = "") -> inference.ToolChoice:
    """Raises Unsupported for a mode that is not known."""
    if name:
        return inference.ToolChoice(mode=inference.ToolChoice.MODE_NAMED, name=name)
    if known := CHOICE_MODES.get(mode or ""):
        return inference.ToolChoice(mode=known)
    raise Unsupported('tool_choice: give "none", "auto", "required" or a function by name', "tool_choice")


def write_json(value: dict[str, object]) -> str:
    return orjson.dumps(value).decode()
