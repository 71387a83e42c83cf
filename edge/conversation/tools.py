"""The tools of a request as the text that the developer message shows, in the namespace `functions`."""

from collections.abc import Iterator, Sequence

import orjson
from openai_harmony import DeveloperContent, HarmonyError, Message, Role, ToolDescription  # type: ignore[import-untyped]  # it ships no types

from protos.ossia.v1 import inference_pb2 as inference
from services.errors import InvalidArgument
from services.vocabulary import END, MAX_RUN_CHARS, MESSAGE, Vocabulary, has_long_run

MAX_SCHEMA_DEPTH = 64
MAX_TOOLS_BYTES = 1024 * 1024


def render_tools(vocabulary: Vocabulary, tools: Sequence[inference.Tool]) -> str:
    """The `# Tools` section. Raises InvalidArgument for a schema that is no JSON object or is too large."""
    if sum(tool.ByteSize() for tool in tools) > MAX_TOOLS_BYTES:
        raise InvalidArgument(f"tools: they are larger than {MAX_TOOLS_BYTES} bytes together; send fewer or shorter ones", "tools")
    descriptions = [_describe(tool, f"tools[{at}]") for at, tool in enumerate(tools)]
    content = DeveloperContent.new().with_function_tools(descriptions)
    try:
        token_ids = vocabulary.harmony.render(Message.from_role_and_content(Role.DEVELOPER, content))
    except (HarmonyError, ValueError) as error:
        raise InvalidArgument(f"tools: their schemas cannot be shown to the model ({error}); simplify them", "tools") from None
    return vocabulary.decode(token_ids[token_ids.index(MESSAGE) + 1 : token_ids.index(END)])


def parse_schema(text: str, param: str) -> dict[str, object]:
    """A JSON Schema that is an object, at most MAX_SCHEMA_DEPTH deep. Raises InvalidArgument naming `param`."""
    try:
        schema = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InvalidArgument(f"{param}: it is not JSON ({error}); give a JSON Schema object", param) from None
    if not isinstance(schema, dict):
        raise InvalidArgument(f"{param}: it must be a JSON Schema object", param)
    if measure_depth(schema) > MAX_SCHEMA_DEPTH:
        raise InvalidArgument(f"{param}: it is nested deeper than {MAX_SCHEMA_DEPTH} levels; make it flatter", param)
    return schema


def measure_depth(value: object) -> int:
    """How deep arrays and objects are nested, without recursion: the value may be hostile. A plain value is 0."""
    depth, level = 0, [value]
    while level := [one for one in level if isinstance(one, dict | list)]:
        depth += 1
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    return depth


def _describe(tool: inference.Tool, param: str) -> ToolDescription:
    schema = parse_schema(tool.parameters_json_schema, f"{param}.function.parameters") if tool.parameters_json_schema else None
    if has_long_run(tool.description) or any(map(has_long_run, _iterate_strings(schema))):
        raise InvalidArgument(f"{param}: it holds a word of more than {MAX_RUN_CHARS} characters; shorten it", param)
    return ToolDescription.new(tool.name, tool.description, schema)


def _iterate_strings(value: object) -> Iterator[str]:
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict):
            waiting += [*one.keys(), *one.values()]
        elif isinstance(one, list):
            waiting += one
