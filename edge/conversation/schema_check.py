"""Whether a JSON Schema can be enforced on generated text, found out before any is. Every refusal names the path and the cure.

A schema is tidied (what says nothing is dropped), held against bounds that keep its compilation short, and compiled with the worker's
limits over an alphabet of bytes. That takes a millisecond, more where it was made to, and lets other threads run meanwhile.
"""

import json
from collections.abc import Iterator
from decimal import Decimal
from functools import lru_cache
from typing import Any, NamedTuple

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from edge.conversation.tools import parse_schema
from services.errors import InvalidArgument
from services.output_grammar import LIMITS, MAX_NUMBER, has_wide_number, read_parameters, write_schema_grammar

MAX_PATTERN_PROPERTIES = 8  # of one object: each pair is compared
MAX_MEETING_PATTERNS = 5  # patterns in a schema whose parts are intersected: the cost of that doubles with each
MAX_MULTIPLE = 10_000  # of multipleOf, digits after the point counted as before it: an automaton has a state for each remainder
MAX_TRIALS = 100  # compilations of parts, to find the one at fault
MAX_REASON_CHARS = 160
# Others say how a client might show a value: by the standard they are annotations, and they are dropped.
ENFORCED_FORMATS = frozenset({"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"})
_ANNOTATIONS = frozenset({"title", "description", "default", "example", "examples", "deprecated", "readOnly", "writeOnly", "$comment"})
_ONE = ("items", "additionalProperties", "additionalItems", "not", "contains", "propertyNames", "if", "then", "else")  # a schema
_ONE_OR_MORE = ("items", "allOf", "anyOf", "oneOf", "prefixItems")  # a list of schemas
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # schemas by name
_MEETING = ("$ref", "anyOf", "oneOf", "allOf")
_CONSTRAINING = frozenset(
    {"$ref", "anyOf", "oneOf", "allOf", "enum", "const", "pattern", "properties", "patternProperties", "additionalProperties", "items"}
    | {"minLength", "maxLength", "format", "prefixItems"}
)
Json = Any  # what a JSON text says


class Fault(NamedTuple):
    path: str  # from the schema on, as in .properties.city
    reason: str


def check_parameters(text: str, param: str) -> str:
    """The schema of a function's arguments as it is enforced; empty for none. Raises InvalidArgument."""
    if not text:
        return ""
    if parse_schema(text, param).get("type", "object") != "object":
        raise InvalidArgument(f'{param}.type: arguments are an object; write "object"', f"{param}.type")
    return _check(json.dumps(read_parameters(text)), param)


def check_schema(text: str, param: str) -> str:
    """A schema as it is enforced. Raises InvalidArgument."""
    return _check(json.dumps(parse_schema(text, param)), param)


def _check(text: str, param: str) -> str:
    tidied, fault = _examine(text)
    if fault:
        path = param + fault.path
        raise InvalidArgument(f"{path}: it cannot be enforced on the output ({fault.reason}); leave it out or simplify it", path)
    return tidied


@lru_cache(maxsize=256)
def _examine(text: str) -> tuple[str, Fault | None]:
    schema = _tidy(json.loads(text))
    return json.dumps(schema, separators=(",", ":")), _find_wide_number(schema) or _find_excess(schema) or _find_fault(schema)


def _tidy(schema: Json) -> Json:
    """Drops what constrains nothing."""
    if not isinstance(schema, dict):
        return schema
    tidied = {}
    for key, value in schema.items():
        is_annotation = key == "format" and isinstance(value, str) and value not in ENFORCED_FORMATS
        if is_annotation or key in _ANNOTATIONS or (key == "uniqueItems" and value is False):
            continue
        if key in _NAMED and isinstance(value, dict):
            value = {name: _tidy(inner) for name, inner in value.items()}
        elif key in _ONE_OR_MORE and isinstance(value, list):
            value = [_tidy(inner) for inner in value]
        elif key in _ONE:
            value = _tidy(value)
        tidied[key] = value
    return tidied


def _parts(schema: Json) -> Iterator[tuple[str, Json]]:
    """The schemas directly inside of a schema, each with its path."""
    if not isinstance(schema, dict):
        return
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, dict):
            yield from ((f".{key}.{name}", inner) for name, inner in value.items())
        elif key in _ONE_OR_MORE and isinstance(value, list):
            yield from ((f".{key}[{at}]", inner) for at, inner in enumerate(value))
        elif key in _ONE and isinstance(value, dict):
            yield f".{key}", value


def _walk(schema: Json, path: str = "") -> Iterator[tuple[str, dict[str, Json]]]:
    """A schema and all inside of it. Its depth is bounded before."""
    if isinstance(schema, dict):
        yield path, schema
        for part_path, part in _parts(schema):
            yield from _walk(part, path + part_path)


def _find_wide_number(schema: Json) -> Fault | None:
    """Compiling it would overflow."""
    if not has_wide_number(schema):
        return None
    path = max((path for path, part in _walk(schema) if has_wide_number(part)), key=len)  # the innermost
    return Fault(path, f"a number beyond {MAX_NUMBER}")


def _find_excess(schema: Json) -> Fault | None:
    """What would take too long to compile, by its form alone."""
    patterns: set[str] = set()
    meeting = None
    for path, part in _walk(schema):
        by_pattern = part.get("patternProperties")
        if isinstance(by_pattern, dict):
            patterns |= by_pattern.keys()
            if len(by_pattern) > MAX_PATTERN_PROPERTIES:
                return Fault(f"{path}.patternProperties", f"more than {MAX_PATTERN_PROPERTIES} patterns")
        if isinstance(part.get("pattern"), str):
            patterns.add(part["pattern"])
        if "multipleOf" in part and _count_multiple(part["multipleOf"]) > MAX_MULTIPLE:
            return Fault(f"{path}.multipleOf", f"more than {MAX_MULTIPLE}, digits after the point included")
        if meeting is None and (key := _meets(part)):
            meeting = f"{path}.{key}"
    if meeting is not None and len(patterns) > MAX_MEETING_PATTERNS:
        return Fault(meeting, f"more than {MAX_MEETING_PATTERNS} patterns in a schema whose parts are intersected")
    return None


def _count_multiple(value: Json) -> int:
    """0.25 → 25; 0 for what is no number, which the compiler refuses."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return 0
    return int("".join(map(str, Decimal(str(value)).as_tuple().digits)) or 0)


def _meets(schema: dict[str, Json]) -> str | None:
    """The keyword by which the schema is intersected with another, if it is."""
    combining = next((key for key in _MEETING if key in schema), None)
    if combining == "allOf" and isinstance(schema["allOf"], list) and len(schema["allOf"]) > 1:
        return combining
    return combining if combining and len(schema.keys() & _CONSTRAINING) > 1 else None


def _find_fault(schema: Json) -> Fault | None:
    """Compiles the whole; where that fails, goes down as long as a part fails for the same reason."""
    reason = _compile(schema)
    if reason is None:
        return None
    definitions = {key: schema[key] for key in ("$defs", "definitions") if isinstance(schema, dict) and key in schema}
    path, at, trials = "", schema, MAX_TRIALS
    while True:
        found = None
        for part_path, part in _parts(at):
            trials -= 1
            if trials >= 0 and _compile({**part, **definitions} if isinstance(part, dict) else part) == reason:
                found = part_path, part
                break
        if found is None:
            return Fault(path + _name_keyword(at, reason), reason)
        path, at = path + found[0], found[1]


def _name_keyword(schema: Json, reason: str) -> str:
    """`.not` where the reason names that keyword of the schema."""
    named = [key for key in schema if f'"{key}"' in reason] if isinstance(schema, dict) else []
    return f".{named[0]}" if named else ""


def _compile(schema: Json) -> str | None:
    """Why no text satisfies the schema, or none can be made to; None: it can be enforced."""
    matcher = LLMatcher(_byte_tokenizer(), write_schema_grammar(schema), log_level=0, limits=LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if not matcher.is_error():
        return None
    message = matcher.get_error()
    if "failed to compile JSON schema:" in message:
        message = message.split("failed to compile JSON schema:", 1)[1].split("\n   1 |", 1)[0]
        message = message.replace("Unimplemented keys:", "no support for").split(". Enable")[0]
        return " ".join(message.split())[:MAX_REASON_CHARS]
    return "no value satisfies it" if matcher.stop_reason().startswith("NoExtension") else "it is too complex"


@lru_cache(maxsize=1)
def _byte_tokenizer() -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(_Bytes()), n_vocab=len(_Bytes.tokens), eos_token=_Bytes.eos_token_id, slices=[])


class _Bytes:
    """One token for each byte, and one for the end."""

    tokens = (*(bytes([value]) for value in range(256)), b"<end>")
    special_token_ids = (256,)
    eos_token_id, bos_token_id = 256, None

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)
