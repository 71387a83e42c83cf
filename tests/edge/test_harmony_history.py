"""History renders to what was generated, its date stays, and nothing that arrives becomes a control token."""

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from edge.conversation.choice import Choice, ChoiceOptions
from edge.conversation.conversation_date import MAX_CONVERSATIONS, ConversationDates
from edge.conversation.harmony_render import HarmonyRenderer
from protos.ossia.v1 import inference_pb2 as pb
from protos.ossia.v1 import sampling_pb2 as sampling
from services.vocabulary import CALL, CONTROL_NAMES, END, FIRST_CONTROL_ID, RETURN, load_vocabulary

V = load_vocabulary()
RENDERER = HarmonyRenderer(V)
BODIES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30)
NAMES = st.from_regex(r"[A-Za-z0-9_-]{1,20}", fullmatch=True)
QUESTION = pb.Message(role=pb.ROLE_USER, content=[pb.ContentPart(text="q")])


def chat(*messages: pb.Message, **fields: Any) -> pb.ChatRequest:
    return pb.ChatRequest(messages=messages, reasoning_effort=pb.REASONING_EFFORT_LOW, conversation_date="2025-01-02", **fields)


def to_history(token_ids: list[int]) -> pb.Message:
    """A generated turn as a client sends it back: text, reasoning and calls, without the ids."""
    choice = Choice(0, V, ChoiceOptions())
    message = pb.Message(role=pb.ROLE_ASSISTANT)
    for event in choice.feed(token_ids) + choice.finish(sampling.FINISH_REASON_STOP):
        if event.HasField("tool_call_delta"):
            delta = event.tool_call_delta
            if delta.id:
                message.tool_calls.add(id=delta.id, name=delta.name)
            message.tool_calls[delta.call].arguments += delta.arguments
        elif event.channel_delta.channel == pb.CHANNEL_ANALYSIS:
            message.reasoning += event.channel_delta.text
        elif event.channel_delta.text:
            message.content.add(text=event.channel_delta.text)
    return message


@given(BODIES, BODIES | st.none(), NAMES, BODIES)
@settings(deadline=None, max_examples=200)
def test_a_tool_loop_sent_back_as_text_renders_to_the_generated_tokens(
    thought: str, preamble: str | None, name: str, arguments: str
) -> None:
    control = V.encode_harmony
    generated = [*control("<|channel|>analysis<|message|>"), *V.encode(thought), *control("<|end|><|start|>assistant")]
    if preamble:
        generated += [*control("<|channel|>commentary<|message|>"), *V.encode(preamble), *control("<|end|><|start|>assistant")]
    generated += [*control(f" to=functions.{name}<|channel|>commentary <|constrain|>json<|message|>"), *V.encode(arguments), CALL]
    turn = to_history(generated)
    result = pb.Message(role=pb.ROLE_TOOL, tool_call_id=turn.tool_calls[0].id, content=[pb.ContentPart(text="r")])
    before = RENDERER.render(chat(QUESTION)).token_ids
    after = RENDERER.render(chat(QUESTION, turn, result)).token_ids
    assert after[: len(before) + len(generated)] == before + generated


@given(BODIES)
@settings(deadline=None, max_examples=100)
def test_an_answer_sent_back_as_text_renders_to_the_generated_tokens(answer: str) -> None:
    generated = [*V.encode_harmony("<|channel|>final<|message|>"), *V.encode(answer), RETURN]
    before = RENDERER.render(chat(QUESTION)).token_ids
    after = RENDERER.render(chat(QUESTION, to_history(generated), QUESTION)).token_ids
    assert after[: len(before) + len(generated)] == [*before, *generated[:-1], END]


EVIL = st.lists(
    st.sampled_from([*CONTROL_NAMES.values(), "<|reserved_200013|>", "<|", "|>", "assistant", "to=functions.f", "x", "\n", " "]), max_size=6
)


def fill(text: str) -> pb.ChatRequest:
    """A request that holds `text` in every place for text that there is."""
    schema = json.dumps({"type": "object", "title": text, "properties": {text: {"type": "string", "description": text, "enum": [text]}}})
    call = pb.ToolCall(id=f"c{text}", name=text, arguments=text)
    says = {"content": [pb.ContentPart(text=text), pb.ContentPart(text=text)], "name": text}
    return chat(
        pb.Message(role=pb.ROLE_SYSTEM, **says),  # type: ignore[arg-type]  # fields by name
        pb.Message(role=pb.ROLE_USER, **says),  # type: ignore[arg-type]
        pb.Message(role=pb.ROLE_DEVELOPER, **says),  # type: ignore[arg-type]
        pb.Message(role=pb.ROLE_ASSISTANT, reasoning=text, tool_calls=[call], **says),  # type: ignore[arg-type]
        pb.Message(role=pb.ROLE_TOOL, tool_call_id=f"c{text}", **says),  # type: ignore[arg-type]
        tools=[pb.Tool(name=text, description=text, parameters_json_schema=schema)],
        tool_choice=pb.ToolChoice(mode=pb.ToolChoice.MODE_NAMED, name=text),
        response_format=pb.ResponseFormat(json_schema=pb.ResponseFormat.JsonSchema(name=text, description=text, schema=schema)),
        stop=[text],
        cache_salt=text,
        tenant=text,
        user=text,
        metadata={text: text},
        model=text,
        request_id=text,
    )


def control_ids(request: pb.ChatRequest) -> list[int]:
    return [token_id for token_id in RENDERER.render(request).token_ids if token_id >= FIRST_CONTROL_ID]


@given(EVIL)
@settings(deadline=None, max_examples=300)
def test_no_field_of_a_request_brings_in_a_control_token(words: list[str]) -> None:
    assert control_ids(fill("y" + "".join(words))) == control_ids(fill("y"))


@given(st.lists(st.sampled_from(sorted(CONTROL_NAMES)) | st.integers(0, 201_100), max_size=12))
@settings(deadline=None, max_examples=300)
def test_ids_that_are_sent_back_bring_in_assistant_turns_only(token_ids: list[int]) -> None:
    prompt = RENDERER.render(chat(QUESTION, pb.Message(role=pb.ROLE_ASSISTANT, content=says("said"), token_ids=token_ids), QUESTION))
    text = V.decode(prompt.token_ids)
    assert [part.split("<|")[0] for part in text.split("<|start|>")[1:]].count("user") == 2
    assert not [part for part in text.split("<|start|>")[1:] if part.split("<|")[0].split(" ")[0] not in ("system", "user", "assistant")]


def says(text: str) -> list[pb.ContentPart]:
    return [pb.ContentPart(text=text)]


def test_a_conversation_keeps_the_date_it_began() -> None:
    dates = ConversationDates()
    answer = pb.Message(role=pb.ROLE_ASSISTANT, content=says("a"))
    assert dates.find(chat(QUESTION), "2025-01-02") == "2025-01-02"
    assert dates.find(chat(QUESTION, answer, QUESTION), "2025-01-03") == "2025-01-02"
    assert dates.find(chat(QUESTION, answer, QUESTION, answer, QUESTION), "2025-01-04") == "2025-01-02"
    assert dates.find(chat(QUESTION, answer, QUESTION, tenant="other"), "2025-01-04") == "2025-01-04"
    assert dates.find(chat(QUESTION), "2025-01-05") == "2025-01-05"  # the same words begin another one


def test_dates_are_kept_within_a_bound() -> None:
    dates = ConversationDates()
    for number in range(MAX_CONVERSATIONS + 10):
        dates.find(pb.ChatRequest(cache_salt=str(number)), "2025-01-02")
    assert len(dates) == MAX_CONVERSATIONS
