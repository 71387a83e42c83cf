"""The body of POST /v1/responses, and what it becomes. Tools that are no functions are accepted and left out."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StrictBool

from edge.rest.chat_schema import Function, JsonSchema, choose
from edge.rest.responses.items import Item
from edge.rest.sampling_schema import EFFORTS, Count, Effort, Loose, SamplingFields
from protos.ossia.v1 import inference_pb2 as inference
from protos.ossia.v1 import sampling_pb2 as sampling

ECHOED = ("instructions", "max_output_tokens", "max_tool_calls", "previous_response_id", "prompt_cache_key", "safety_identifier", "user")
LOGPROBS = "message.output_text.logprobs"


def _as_object(name: str) -> BeforeValidator:
    return BeforeValidator(lambda value: {name: value} if isinstance(value, str) else value)


class Reasoning(Loose):
    effort: Effort | None = None


class TextFormat(Loose):
    type: Literal["text", "json_object", "json_schema"]
    name: str = "answer"
    description: str | None = None
    schema_: dict[str, object] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextOptions(Loose):
    format: TextFormat | None = None


class FunctionTool(Loose):
    """Flat, as this API has it; nested, as the chat API has it, is understood too."""

    type: str
    name: str = ""
    description: str | None = None
    parameters: dict[str, object] | None = None
    strict: bool | None = None
    function: Function | None = None

    def to_proto(self) -> inference.Tool:
        flat = Function(name=self.name, description=self.description, parameters=self.parameters, strict=self.strict)
        return (self.function or flat).to_proto()


class ToolName(Loose):
    name: str = ""


class ResponsesToolChoice(Loose):
    type: str
    name: str = ""
    mode: Literal["auto", "required"] = "auto"
    tools: list[ToolName] = Field(default=[])


class Conversation(Loose):
    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,128}$")]


class ResponsesRequest(SamplingFields):
    model: str
    input: str | list[dict[str, Any]] = Field(default=[])
    instructions: str | None = None
    previous_response_id: str | None = None
    conversation: Annotated[Conversation | None, _as_object("id")] = None
    store: StrictBool | None = None
    stream: StrictBool | None = None
    background: StrictBool | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Annotated[ResponsesToolChoice | None, _as_object("type")] = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    max_output_tokens: Count | None = None
    top_logprobs: Count | None = None
    include: list[str] | None = None
    truncation: Literal["auto", "disabled"] | None = None

    def to_proto(self, request_id: str, messages: list[inference.Message]) -> inference.ChatRequest:
        """`messages` are the whole conversation; the instructions come before it. Raises Unsupported for an impossible choice of tools."""
        if self.instructions:
            part = inference.ContentPart(text=self.instructions)
            messages = [inference.Message(role=inference.ROLE_DEVELOPER, content=[part]), *messages]
        has_logprobs = LOGPROBS in (self.include or ()) or bool(self.top_logprobs)
        request = inference.ChatRequest(
            request_id=request_id,
            model=self.model,
            messages=messages,
            tools=self._convert_tools(),
            tool_choice=self._convert_choice(),
            parallel_tool_calls=self.parallel_tool_calls,
            response_format=self._convert_format(),
            reasoning_effort=EFFORTS[self.reasoning.effort if self.reasoning else None],
            sampling=sampling.SamplingParams(
                max_tokens=self.max_output_tokens, top_logprobs=(self.top_logprobs or 0) if has_logprobs else None
            ),
        )
        return self.fill(request)

    def _convert_tools(self) -> list[inference.Tool]:
        tools = [tool.to_proto() for tool in self.tools or () if tool.type == "function"]
        if self.tool_choice is None or self.tool_choice.type != "allowed_tools":
            return tools
        allowed = {tool.name for tool in self.tool_choice.tools}
        return [tool for tool in tools if tool.name in allowed]

    def _convert_choice(self) -> inference.ToolChoice | None:
        choice = self.tool_choice
        if choice is None:
            return None
        if choice.type == "allowed_tools":
            return choose(choice.mode)
        if choice.type in ("none", "auto", "required", "function"):
            return choose(choice.type, choice.name)
        return None  # a tool that does not exist here

    def _convert_format(self) -> inference.ResponseFormat | None:
        asked = self.text.format if self.text else None
        if asked is None or asked.type == "text":
            return None
        if asked.type == "json_object":
            return inference.ResponseFormat(json_object=True)
        return JsonSchema(name=asked.name, description=asked.description, schema=asked.schema_, strict=asked.strict).to_proto()


def describe(body: ResponsesRequest, given: dict[str, Any], response_id: str, created: int, is_stored: bool) -> Item:
    """The response as it stands before anything is generated: what was asked for, as it was given."""
    return {
        "id": response_id,
        "object": "response",
        "created_at": created,
        "status": "in_progress",
        "background": bool(body.background),
        "completed_at": None,
        "conversation": {"id": body.conversation.id} if body.conversation else None,
        "error": None,
        "incomplete_details": None,
        "metadata": body.metadata or {},
        "model": body.model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        "service_tier": "default",
        "store": is_stored,
        "temperature": body.temperature,
        "text": given.get("text") or {"format": {"type": "text"}},
        "tool_choice": given.get("tool_choice") or "auto",
        "tools": given.get("tools") or [],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": body.top_p,
        "truncation": body.truncation or "disabled",
        "usage": None,
        **{name: given.get(name) for name in ECHOED},
    }
