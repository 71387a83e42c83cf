"""A conversation of the training text, and its token ids: the edge's own renderer makes them, so that serving looks like training."""

from dataclasses import dataclass, field
from functools import lru_cache

import orjson

from edge.conversation.harmony_render import HarmonyRenderer
from protos.ossia.v1 import inference_pb2 as inference
from services.vocabulary import CHANNEL, END, MESSAGE, START, load_vocabulary

LOW, MEDIUM, HIGH = "low", "medium", "high"


@dataclass(frozen=True)
class User:
    text: str


@dataclass(frozen=True)
class Call:
    name: str
    arguments: str  # JSON text


@dataclass(frozen=True)
class Reply:
    """One assistant turn: reasoning, then a call or an answer. `preamble` is said before the call."""

    final: str = ""
    analysis: str = ""
    call: Call | None = None
    preamble: str = ""

    def to_harmony(self) -> str:
        """What the model generates after `<|start|>assistant`."""
        parts = []
        if self.analysis:
            parts.append(f"<|channel|>analysis<|message|>{self.analysis}<|end|><|start|>assistant")
        if self.preamble:
            parts.append(f"<|channel|>commentary<|message|>{self.preamble}<|end|><|start|>assistant")
        if self.call:
            header = f" to=functions.{self.call.name}<|channel|>commentary <|constrain|>json<|message|>"
            parts.append(f"{header}{self.call.arguments}<|call|>")
        else:
            parts.append(f"<|channel|>final<|message|>{self.final}<|return|>")
        return "".join(parts)


@dataclass(frozen=True)
class Result:
    """What a function gave back."""

    name: str
    text: str


Message = User | Reply | Result


@dataclass(frozen=True)
class Tool:
    name: str
    description: str
    parameters: dict[str, object]  # JSON Schema


@dataclass
class Conversation:
    """Ends with a Reply. `skill` is the name that the evaluation counts it under."""

    skill: str
    effort: str
    date: str
    messages: list[Message]
    instructions: str = ""
    tools: list[Tool] = field(default_factory=list)
    schema: dict[str, object] | None = None  # a JSON Schema that is asked for as response format; {}: any object

    def request(self, num_messages: int) -> inference.ChatRequest:
        """The request that asks for message `num_messages`, a Reply."""
        effort = inference.ReasoningEffort.Value(f"REASONING_EFFORT_{self.effort.upper()}")
        request = inference.ChatRequest(reasoning_effort=effort, conversation_date=self.date)
        if self.instructions:
            request.messages.add(role=inference.ROLE_DEVELOPER).content.add(text=self.instructions)
        for message in self.messages[:num_messages]:
            _add(request, message)
        for tool in self.tools:
            schema = orjson.dumps(tool.parameters).decode() if tool.parameters else ""
            request.tools.add(name=tool.name, description=tool.description, parameters_json_schema=schema)
        if self.schema is not None:
            if self.schema:
                request.response_format.json_schema.name = "answer"
                request.response_format.json_schema.schema = orjson.dumps(self.schema).decode()
            else:
                request.response_format.json_object = True
        return request


def _add(request: inference.ChatRequest, message: Message) -> None:
    if isinstance(message, User):
        request.messages.add(role=inference.ROLE_USER).content.add(text=message.text)
    elif isinstance(message, Result):
        request.messages.add(role=inference.ROLE_TOOL, name=message.name).content.add(text=message.text)
    else:
        added = request.messages.add(role=inference.ROLE_ASSISTANT, reasoning=message.analysis)
        text = message.preamble if message.call else message.final
        if text:
            added.content.add(text=text)
        if message.call:
            added.tool_calls.add(name=message.call.name, arguments=message.call.arguments)


@lru_cache(maxsize=1)
def renderer() -> HarmonyRenderer:
    return HarmonyRenderer(load_vocabulary())


@dataclass(frozen=True)
class Example:
    """`prefix` is what several begin with, the system message at least; `is_target` says which of `token_ids` the model has to say."""

    skill: str
    prefix: tuple[int, ...]
    token_ids: list[int]
    is_target: list[bool]


def to_examples(family: list[Conversation]) -> list[Example]:
    """Targets are all replies since the last user message, and the texts of earlier answers that took no reasoning.

    The prefix is what the whole family begins with, before any target; of one alone it is the system message.
    """
    rendered = [_render(conversation) for conversation in family]
    marked = [_mark_targets(token_ids) for token_ids in rendered]
    if len(family) == 1:
        num_prefix = rendered[0].index(END) + 1
    else:
        num_common = next((at for at, ids in enumerate(zip(*rendered, strict=False)) if len(set(ids)) > 1), min(map(len, rendered)))
        num_prefix = min(num_common, *(is_target.index(True) for is_target in marked))
    return [
        Example(conversation.skill, tuple(token_ids[:num_prefix]), token_ids[num_prefix:], is_target[num_prefix:])
        for conversation, token_ids, is_target in zip(family, rendered, marked, strict=True)
    ]


def _render(conversation: Conversation) -> list[int]:
    *before, last = conversation.messages
    assert isinstance(last, Reply)
    prompt = renderer().render(conversation.request(len(before))).token_ids
    return prompt + load_vocabulary().encode_harmony(last.to_harmony())


def _mark_targets(token_ids: list[int]) -> list[bool]:
    """All turns since the last user message wholly, of the answers before it the text alone."""
    vocabulary = load_vocabulary()
    (assistant,), (user,), (final,) = (vocabulary.encode(word) for word in ("assistant", "user", "final"))
    last_user = max(at for at, token_id in enumerate(token_ids) if token_id == START and token_ids[at + 1] == user)
    is_target = [False] * len(token_ids)
    starts = [at for at, token_id in enumerate(token_ids) if token_id == START]
    is_going_on = False  # the turn's last message was no call and no answer
    for start, end in zip(starts, [*starts[1:], len(token_ids)], strict=True):
        if token_ids[start + 1] != assistant:
            continue
        if start > last_user:
            begin = start if is_going_on else start + 2  # the prompt ends with the turn's first `<|start|>assistant`
            is_target[begin:end] = [True] * (end - begin)
            is_going_on = token_ids[end - 1] == END
        elif token_ids[start + 2 : start + 5] == [CHANNEL, final, MESSAGE]:
            is_target[start + 5 : end - 1] = [True] * (end - start - 6)
    return is_target
