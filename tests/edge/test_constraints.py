"""What a request demands becomes one structure, and a schema that cannot be enforced is refused by its path."""

import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.conversation.constraints import build_constraint
from edge.conversation.schema_check import ENFORCED_FORMATS, MAX_MULTIPLE, check_parameters, check_schema
from protos.ossia.v1 import inference_pb2 as pb
from protos.ossia.v1 import sampling_pb2 as sampling
from services.errors import InvalidArgument

CITY = '{"type":"object","properties":{"city":{"type":"string"}},"required":["city"]}'
GET, NOW = pb.Tool(name="get", parameters_json_schema=CITY), pb.Tool(name="now")
CHOICE = pb.ToolChoice


def structure(**fields: object) -> sampling.HarmonyStructure | None:
    constraint = build_constraint(pb.ChatRequest(**fields))  # type: ignore[arg-type]  # a test's own words
    return None if constraint is None else constraint.harmony


def names(found: sampling.HarmonyStructure | None) -> list[str]:
    return [] if found is None else [one.name for one in found.functions]


def a_format(schema: str) -> pb.ResponseFormat:
    return pb.ResponseFormat(json_schema=pb.ResponseFormat.JsonSchema(name="place", schema=schema))


def test_nothing_asked_is_nothing_demanded() -> None:
    assert structure() is None
    assert structure(tools=[GET], tool_choice=CHOICE(mode=CHOICE.MODE_NONE)) is None
    assert structure(response_format=pb.ResponseFormat(text=True)) is None


def test_tools_hold_their_arguments_to_their_schemas_without_being_forced() -> None:
    found = structure(tools=[GET, NOW])
    assert found is not None and names(found) == ["get", "now"]
    assert json.loads(found.functions[0].parameters_json_schema) == json.loads(CITY)
    assert not found.call_required and not found.single_call and not found.final_json_schema


def test_choice_parallelism_and_format_come_together() -> None:
    found = structure(tools=[GET, NOW], tool_choice=CHOICE(mode=CHOICE.MODE_NAMED, name="now"), parallel_tool_calls=False)
    assert found is not None and names(found) == ["now"] and found.call_required and found.single_call
    both = structure(tools=[GET], response_format=a_format(CITY), parallel_tool_calls=True)
    assert both is not None and names(both) == ["get"] and both.final_json_schema and not both.call_required and not both.single_call
    required = structure(tools=[GET, NOW], tool_choice=CHOICE(mode=CHOICE.MODE_REQUIRED))
    assert required is not None and names(required) == ["get", "now"] and required.call_required
    any_object = structure(response_format=pb.ResponseFormat(json_object=True))
    assert any_object is not None and json.loads(any_object.final_json_schema) == {"type": "object"}


def test_an_internal_callers_constraint_travels_within_bounds() -> None:
    regex = sampling.Constraint(regex="a+")
    assert build_constraint(pb.ChatRequest(sampling=sampling.SamplingParams(constraint=regex))) == regex
    large = sampling.SamplingParams(constraint=sampling.Constraint(regex="a" * 70_000))
    with pytest.raises(InvalidArgument, match=r"sampling.constraint is out of bounds"):
        build_constraint(pb.ChatRequest(sampling=large))
    schema = sampling.SamplingParams(constraint=sampling.Constraint(json_schema='{"not": {}}'))
    with pytest.raises(InvalidArgument, match=r"sampling.constraint.json_schema.not: "):
        build_constraint(pb.ChatRequest(sampling=schema))


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        ({"properties": {"a": {"not": {"type": "string"}}}}, ".properties.a.not"),
        ({"properties": {"a": {"type": "array", "uniqueItems": True}}}, ".properties.a.uniqueItems"),
        ({"properties": {"a": {"items": {"anyOf": [{"type": "string"}, {"contains": {}}]}}}}, ".properties.a.items.anyOf[1].contains"),
        ({"$defs": {"x": {"if": {}, "then": {}}}, "properties": {"a": {"$ref": "#/$defs/x"}}}, ".$defs.x.if"),
        ({"properties": {"a": {"pattern": "^(?=a)b"}}}, ".properties.a"),
        ({"properties": {"a": {"$ref": "https://example.com/x"}}}, ".properties.a"),
        ({"properties": {"a": {"$ref": "#/$defs/nowhere"}}}, ".properties.a"),
        ({"properties": {"a": {"oneOf": [{"type": "string"}, {"maxLength": 3}]}}}, ".properties.a"),
        ({"type": "object", "properties": {"a": {"type": "integer", "minimum": 3, "maximum": 1}}, "required": ["a"]}, ""),
        ({"$ref": "#"}, ""),
        ({"type": "nonsense"}, ""),
        ({"x-guidance": {"lenient": True}, "properties": {"a": {"not": {}}}}, ".properties.a.not"),
        # these would take long, or much, or the process down
        ({"properties": {"a": {"const": -(2**63) + 1}}}, ".properties.a"),
        ({"properties": {"a": {"items": {"enum": [1, {"b": [-(2**63)]}]}}}}, ".properties.a.items"),
        ({"properties": {"a": {"type": "integer", "minimum": -(2**63), "maximum": 2**63}}}, ".properties.a"),
        ({"allOf": [{"pattern": f".*(a|b){{{at}}}c.*"} for at in range(40)]}, ".allOf"),
        ({"patternProperties": {f"^a{{{at}}}b": {} for at in range(300)}}, ".patternProperties"),
        ({"properties": {"a": {"type": "integer", "multipleOf": MAX_MULTIPLE + 1}}}, ".properties.a.multipleOf"),
        ({"allOf": [{"anyOf": [{"properties": {f"p{at}": {}}}, {"properties": {f"q{at}": {}}}]} for at in range(24)]}, ""),
    ],
    ids=lambda one: json.dumps(one)[:40] if isinstance(one, dict) else str(one),
)
def test_a_schema_that_cannot_be_enforced_is_refused_by_its_path(schema: dict[str, object], path: str) -> None:
    with pytest.raises(InvalidArgument, match="cannot be enforced") as refused:
        check_schema(json.dumps(schema), "schema")
    assert refused.value.param == "schema" + path


def test_what_says_nothing_is_dropped_and_the_rest_kept() -> None:
    said = {
        "type": "object",
        "properties": {
            "uniqueItems": {"type": "array", "uniqueItems": False},
            "n": {"format": "int32", "type": "integer", "default": 2**63, "title": "N"},
        },
    }
    kept = {"type": "object", "properties": {"uniqueItems": {"type": "array"}, "n": {"type": "integer"}}}
    assert json.loads(check_schema(json.dumps(said), "schema")) == kept
    for name in ENFORCED_FORMATS:
        held = {"type": "string", "format": name}
        assert json.loads(check_schema(json.dumps(held), "schema")) == held


@pytest.mark.parametrize(
    "schema",
    [
        {"$defs": {"tree": {"properties": {"next": {"$ref": "#/$defs/tree"}}}}, "$ref": "#/$defs/tree"},
        {"type": "object", "properties": {f"p{at}": {"type": "string"} for at in range(1200)}},
        {"enum": [f"value {at}" for at in range(4000)]},
        {"type": "array", "items": {"type": "string", "maxLength": 100_000}, "maxItems": 100_000},
        {"allOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}], "$defs": {"a": {"type": "object"}, "b": {"properties": {"c": {}}}}},
    ],
    ids=["recursive", "wide", "enum", "long", "allOf"],
)
def test_large_and_recursive_schemas_are_enforced(schema: dict[str, object]) -> None:
    assert check_schema(json.dumps(schema), "schema")


def test_arguments_are_an_object() -> None:
    assert check_parameters("", "tools[0]") == ""
    assert check_parameters("{}", "tools[0]") == '{"type":"object"}'
    with pytest.raises(InvalidArgument, match=r"tools\[0\].type"):
        check_parameters('{"type":"string"}', "tools[0]")
    with pytest.raises(InvalidArgument, match="not JSON"):
        check_schema("{", "schema")


WORDS = ("type", "format", "items", "properties", "$defs", "$ref", "allOf", "anyOf", "oneOf", "not", "enum", "const", "pattern", "minimum")
WORDS += (
    "multipleOf",
    "maxLength",
    "required",
    "patternProperties",
    "additionalProperties",
    "prefixItems",
    "x-guidance",
    "uniqueItems",
    "$id",
)
PLAIN = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text(max_size=5)
LEAVES = PLAIN | st.sampled_from(("object", "string", "array", "number", "date", "#", "#/$defs/a", "^a+$", "(", "lenient"))
KEYS = st.sampled_from(WORDS) | st.text(max_size=3)
SCHEMAS = st.dictionaries(
    KEYS,
    st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12),
    max_size=5,
)


@given(SCHEMAS)
@settings(deadline=None, max_examples=150)
def test_any_json_is_enforced_or_refused(schema: dict[str, object]) -> None:
    for check in (check_schema, check_parameters):
        with contextlib.suppress(InvalidArgument):
            assert json.loads(check(json.dumps(schema), "schema")) is not None
