"""The table of bounds is what is enforced: each border is accepted, and the next value beyond it refused by name."""

import math

import pytest

from edge.conversation.validation import (
    LOGIT_BIAS_BOUND,
    MAX_CHARS,
    MAX_COUNTS,
    MAX_SAMPLING_COUNTS,
    MAX_SCHEMA_BYTES,
    REQUEST_BOUNDS,
    SAMPLING_BOUNDS,
    Bound,
    check_request,
)
from protos.ossia.v1 import inference_pb2 as inference
from services.errors import InvalidArgument
from services.vocabulary import FIRST_CONTROL_ID, VOCAB_SIZE

NUMBERS = {
    **{("sampling", name): bound for name, bound in SAMPLING_BOUNDS.items()},
    **{("", name): bound for name, bound in REQUEST_BOUNDS.items()},
}


def make(**fields: object) -> inference.ChatRequest:
    hello = inference.Message(role=inference.ROLE_USER, content=[inference.ContentPart(text="Hi")])
    return inference.ChatRequest(model="m", messages=[hello], **fields)  # type: ignore[arg-type]


def refuses(request: inference.ChatRequest, param: str) -> bool:
    try:
        check_request(request)
    except InvalidArgument as error:
        assert error.param.startswith(param) and param in error.message
        return True
    return False


def put(holder: str, name: str, value: float) -> inference.ChatRequest | None:
    """None where the contract's type cannot hold the value."""
    request = make()
    target = request.sampling if holder else request
    is_float = target.DESCRIPTOR.fields_by_name[name].cpp_type in (5, 6)  # double, float
    try:
        setattr(target, name, value if is_float else int(value))
    except ValueError:
        return None
    return request


@pytest.mark.parametrize(("place", "bound"), NUMBERS.items(), ids=lambda one: one[1] if isinstance(one, tuple) and len(one) == 2 else "")
def test_a_number_is_accepted_to_its_borders_and_refused_beyond(place: tuple[str, str], bound: Bound) -> None:
    holder, name = place
    for value, is_inside in ((bound.low, not bound.is_open), (bound.high, True), (bound.low - 1, False), (bound.high + 1, False)):
        request = put(holder, name, value)
        assert request is None or refuses(request, name) is not is_inside, (name, value)
    for value in (math.nan, math.inf, -math.inf):
        if (holder, name) in {("sampling", "temperature"), ("sampling", "top_p"), ("", "timeout_s")}:
            request = put(holder, name, value)
            assert request is not None and refuses(request, name)


@pytest.mark.parametrize(("name", "limit"), MAX_CHARS.items())
def test_a_text_is_accepted_to_its_length(name: str, limit: int) -> None:
    for length in (limit, limit + 1):
        request = make()
        setattr(request, name, "a" * length)
        assert refuses(request, name) is (length > limit)


def test_counts_are_accepted_to_their_limits() -> None:
    for beyond in (0, 1):
        tools = [inference.Tool(name=f"f{at}") for at in range(MAX_COUNTS["tools"] + beyond)]
        assert refuses(make(tools=tools), "tools") is bool(beyond)
        assert refuses(make(stop=["a"] * (MAX_COUNTS["stop"] + beyond)), "stop") is bool(beyond)
        labels = {str(at): "" for at in range(MAX_COUNTS["metadata"] + beyond)}
        assert refuses(make(metadata=labels), "metadata") is bool(beyond)
        biased, stopped = make(), make()
        biased.sampling.logit_bias.update(dict.fromkeys(range(MAX_SAMPLING_COUNTS["logit_bias"] + beyond), 1.0))
        stopped.sampling.stop_token_ids.extend(range(MAX_SAMPLING_COUNTS["stop_token_ids"] + beyond))
        assert refuses(biased, "logit_bias") is refuses(stopped, "stop_token_ids") is bool(beyond)
        schema = '{"a":"' + "x" * (MAX_SCHEMA_BYTES - 8 + beyond) + '"}'
        assert refuses(make(tools=[inference.Tool(name="f", parameters_json_schema=schema)]), "tools[0]") is bool(beyond)


@pytest.mark.parametrize("token_id", [FIRST_CONTROL_ID - 1, FIRST_CONTROL_ID, VOCAB_SIZE - 1, VOCAB_SIZE])
def test_no_field_takes_a_control_token(token_id: int) -> None:
    biased = make()
    biased.sampling.logit_bias[token_id] = LOGIT_BIAS_BOUND.high
    raw = inference.ChatRequest(model="m", prompt=inference.RawPrompt(token_ids=[token_id]))
    assert refuses(biased, "logit_bias") is refuses(raw, "prompt") is (token_id >= FIRST_CONTROL_ID)
