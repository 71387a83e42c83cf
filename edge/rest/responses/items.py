"""Items of the Responses API as messages of a conversation.

What belongs to one turn of the model stands in several items: reasoning, words, calls. They become one message again. Items of tools that
do not exist here are left out, like the tools themselves.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from edge.rest.body import explain
from edge.rest.chat_schema import Message
from protos.ossia.v1 import inference_pb2 as inference
from services.errors import InvalidArgument, MissingField

Item = dict[str, Any]


def as_items(given: object) -> list[Item]:
    """The `input` of a request as a list; a text is a user's message. Raises InvalidArgument."""
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": given}]
    if not isinstance(given, list):
        raise InvalidArgument("input: give a text or a list of items", "input")
    for at, item in enumerate(given):
        if not isinstance(item, dict):
            raise InvalidArgument(f"input[{at}]: give an object", f"input[{at}]")
    return given


def resolve_references(items: Iterable[Item], earlier: Iterable[Item]) -> list[Item]:
    """Items that only name another one become that one. Raises InvalidArgument where there is none of that name."""
    known = {item["id"]: item for item in earlier if "id" in item}
    resolved = []
    for at, item in enumerate(items):
        if _kind(item) != "item_reference":
            resolved.append(item)
        elif (found := known.get(item.get("id"))) is not None:
            resolved.append(found)
        else:
            raise InvalidArgument(
                f"input[{at}].id: no earlier item of this conversation has that id; send the item itself", f"input[{at}].id"
            )
    return resolved


def to_messages(items: Sequence[Item]) -> list[inference.Message]:
    """Raises the OssiaError of the first item that cannot be read."""
    messages: list[inference.Message] = []
    turn: inference.Message | None = None  # the model's, while its items go on
    for at, item in enumerate(items):
        kind, param = _kind(item), f"input[{at}]"
        if kind == "function_call_output":
            messages.append(_read({"role": "tool", "content": item.get("output", ""), "tool_call_id": item.get("call_id")}, param))
            turn = None
        elif kind == "message" and item.get("role") != "assistant":
            messages.append(_read(item, param))
            turn = None
        elif kind in ("message", "reasoning", "function_call"):
            if turn is None or _begins_turn(turn, kind):
                turn = inference.Message(role=inference.ROLE_ASSISTANT)
                messages.append(turn)
            turn.MergeFrom(_read_turn_part(item, kind, param))
    return [message for message in messages if message.role != inference.ROLE_ASSISTANT or message.ByteSize() > 2]


def _kind(item: Mapping[str, Any]) -> str:
    return str(item.get("type") or ("message" if "role" in item else ""))


def _begins_turn(turn: inference.Message, kind: str) -> bool:
    """Reasoning after words or calls, and words after words, belong to the next turn."""
    return bool(turn.content or turn.tool_calls) if kind == "reasoning" else kind == "message" and bool(turn.content or turn.tool_calls)


def _read_turn_part(item: Item, kind: str, param: str) -> inference.Message:
    if kind == "message":
        return _read(item, param)
    if kind == "reasoning":
        parts = [*_as_list(item.get("content")), *([] if item.get("content") else _as_list(item.get("summary")))]
        texts = [part.get("text") for part in parts if isinstance(part, dict)]
        return inference.Message(role=inference.ROLE_ASSISTANT, reasoning="\n".join(text for text in texts if isinstance(text, str)))
    for name in ("name", "call_id"):
        if not item.get(name):
            raise MissingField(f"{param}.{name}: it is missing; give it", f"{param}.{name}")
    call = {"id": item["call_id"], "function": {"name": item["name"], "arguments": item.get("arguments", "")}}
    return _read({"role": "assistant", "tool_calls": [call]}, param)


def _as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _read(message: Mapping[str, Any], param: str) -> inference.Message:
    try:
        return Message.model_validate(message).to_proto()
    except ValidationError as error:
        raise explain(error, param) from None
