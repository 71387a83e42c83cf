"""A conversation to prompt token ids in the Harmony format.

    <|start|>system<|message|>…date, effort, channels…<|end|>
    <|start|>developer<|message|># Instructions …  # Tools …  # Response Formats …<|end|>
    <|start|>user<|message|>…<|end|>
    <|start|>assistant<|channel|>analysis<|message|>…<|end|>                                         kept inside a tool loop only
    <|start|>assistant to=functions.NAME<|channel|>commentary <|constrain|>json<|message|>…<|call|>
    <|start|>functions.NAME to=assistant<|channel|>commentary<|message|>…<|end|>
    <|start|>assistant<|channel|>final<|message|>…<|end|>
    <|start|>assistant                                                                               the model goes on here

What a client calls system or developer message is the developer's here: the leading ones become one message with the tools, later ones
stand where they were sent, so that the prefix before them stays as it was. Control tokens are put in as ids and all that arrived is encoded
as plain text: what looks like a control token stays text. Every message is encoded once, in time linear in its length.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from openai_harmony import Message as HarmonyMessage  # type: ignore[import-untyped]  # it ships no types
from openai_harmony import ReasoningEffort, RenderOptions, SystemContent
from openai_harmony import Role as HarmonyRole

from edge.conversation.harmony_parse import HarmonyParser
from edge.conversation.tools import render_tools
from protos.ossia.v1 import inference_pb2 as inference
from services.errors import InvalidArgument
from services.vocabulary import CALL, CHANNEL, CONSTRAIN, END, MESSAGE, RETURN, START, Vocabulary

_EFFORTS = {
    inference.REASONING_EFFORT_LOW: ReasoningEffort.LOW,
    inference.REASONING_EFFORT_MEDIUM: ReasoningEffort.MEDIUM,
    inference.REASONING_EFFORT_HIGH: ReasoningEffort.HIGH,
}
_INSTRUCTING = (inference.ROLE_SYSTEM, inference.ROLE_DEVELOPER)


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """`checkpoint_positions` are the prompt lengths worth coming back to, ascending: the ends of messages."""

    token_ids: list[int] = field(default_factory=list)
    checkpoint_positions: list[int] = field(default_factory=list)

    def append(self, token_ids: Iterable[int]) -> None:
        """One more message."""
        self.token_ids.extend(token_ids)
        self.checkpoint_positions.append(len(self.token_ids))


class HarmonyRenderer:
    """Renders requests of every conversation; holds nothing of any of them."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._encode_header = lru_cache(maxsize=1024)(lambda text: tuple(vocabulary.encode(text)))
        self._render_system = lru_cache(maxsize=64)(self._render_system_uncached)

    def render(self, request: inference.ChatRequest) -> RenderedPrompt:
        """`conversation_date` and `reasoning_effort` must be set. Raises InvalidArgument where a message cannot stand where it does."""
        prompt = RenderedPrompt()
        has_tools = bool(shown_tools(request))
        prompt.append(self._render_system(request.reasoning_effort, request.conversation_date, has_tools))
        num_leading = next((at for at, one in enumerate(request.messages) if one.role not in _INSTRUCTING), len(request.messages))
        if developer := self._compose_developer(request, request.messages[:num_leading]):
            prompt.append(self._frame("developer", developer))
        last_answer = max((at for at, one in enumerate(request.messages) if _is_answer(one)), default=-1)
        names: dict[str, str] = {}  # of the functions called so far, by call id
        for at, message in enumerate(request.messages[num_leading:], start=num_leading):
            if message.role == inference.ROLE_ASSISTANT:
                names.update((call.id, call.name) for call in message.tool_calls)
                self._append_turn(prompt, message, keeps_reasoning=at > last_answer)
            elif message.role == inference.ROLE_TOOL:
                prompt.append(self._render_result(message, names, f"messages[{at}]"))
            elif message.role == inference.ROLE_USER:
                prompt.append(self._frame(f"user:{message.name}" if message.name else "user", text_of(message)))
            else:
                prompt.append(self._frame("developer", f"# Instructions\n\n{text_of(message)}"))
        prompt.token_ids.extend((START, *self._encode_header("assistant")))
        return prompt

    def _render_system_uncached(self, effort: inference.ReasoningEffort.ValueType, date: str, has_tools: bool) -> tuple[int, ...]:
        content = SystemContent.new().with_reasoning_effort(_EFFORTS[effort]).with_conversation_start_date(date)
        options = RenderOptions(conversation_has_function_tools=has_tools)
        return tuple(self._vocabulary.harmony.render(HarmonyMessage.from_role_and_content(HarmonyRole.SYSTEM, content), options))

    def _compose_developer(self, request: inference.ChatRequest, leading: Sequence[inference.Message]) -> str:
        instructions = "\n\n".join(filter(None, map(text_of, leading)))
        tools = shown_tools(request)
        parts = [
            f"# Instructions\n\n{instructions}" if instructions else "",
            render_tools(self._vocabulary, tools) if tools else "",
            _describe_format(request.response_format),
        ]
        return "\n\n".join(filter(None, parts))

    def _append_turn(self, prompt: RenderedPrompt, message: inference.Message, keeps_reasoning: bool) -> None:
        if message.token_ids and (replayed := self._replay(message.token_ids)):
            return prompt.append(replayed)
        if message.reasoning and keeps_reasoning:
            prompt.append(self._frame("assistant", message.reasoning, "analysis"))
        text = text_of(message)
        if text or _is_answer(message):
            prompt.append(self._frame("assistant", text, "commentary" if message.tool_calls else "final"))
        for call in message.tool_calls:
            prompt.append(self._render_call(call))
        return None

    def _replay(self, token_ids: Sequence[int]) -> list[int]:
        """The turn as it was generated; empty if it is no well-formed turn, so that ids cannot bring in what text cannot.

        `<|return|>` tells the engine to stop and is stored as `<|end|>`. A turn that was cut within a message is closed.
        """
        parser = HarmonyParser(self._vocabulary)
        for token_id in token_ids:
            parser.feed(token_id)
        ends_in_body = parser.is_in_body
        parser.finish()
        if parser.num_malformed or not (ends_in_body or token_ids[-1] in (END, RETURN, CALL)):
            return []
        turn = [END if token_id == RETURN else token_id for token_id in token_ids]
        return [START, *self._encode_header("assistant"), *turn, *([END] if ends_in_body else [])]

    def _render_call(self, call: inference.ToolCall) -> list[int]:
        author, channel = self._encode_header(f"assistant to=functions.{call.name}"), self._encode_header("commentary ")
        kind = self._encode_header("json")
        return [START, *author, CHANNEL, *channel, CONSTRAIN, *kind, MESSAGE, *self._vocabulary.encode(call.arguments), CALL]

    def _render_result(self, message: inference.Message, names: dict[str, str], param: str) -> list[int]:
        name = names.get(message.tool_call_id) or message.name
        if not name:
            param, call_id = f"{param}.tool_call_id", message.tool_call_id
            raise InvalidArgument(
                f"{param}: no earlier assistant message holds a call with the id {call_id!r}; send its tool_calls too", param
            )
        return self._frame(f"functions.{name} to=assistant", text_of(message), "commentary")

    def _frame(self, author: str, text: str, channel: str = "") -> list[int]:
        header = (CHANNEL, *self._encode_header(channel)) if channel else ()
        return [START, *self._encode_header(author), *header, MESSAGE, *self._vocabulary.encode(text), END]


def shown_tools(request: inference.ChatRequest) -> Sequence[inference.Tool]:
    """The tools that the model is told of."""
    return () if request.tool_choice.mode == inference.ToolChoice.MODE_NONE else request.tools


def text_of(message: inference.Message) -> str:
    return "".join(part.text for part in message.content)


def _is_answer(message: inference.Message) -> bool:
    """A final answer, after which earlier reasoning is dropped; a turn of reasoning alone is none."""
    if message.role != inference.ROLE_ASSISTANT or message.tool_calls:
        return False
    return bool(text_of(message)) or not message.reasoning


def _describe_format(response_format: inference.ResponseFormat) -> str:
    kind = response_format.WhichOneof("kind")
    if kind == "json_object":
        return "# Response Formats\n\n## json\n\n// Any JSON object\n{}"
    if kind != "json_schema":
        return ""
    asked = response_format.json_schema
    comment = f"// {asked.description}\n" if asked.description else ""
    return f"# Response Formats\n\n## {asked.name}\n\n{comment}{asked.schema}"
