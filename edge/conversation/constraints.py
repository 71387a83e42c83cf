"""What the request demands of the output, as one structure that the worker's grammar enforces. Nothing is enforced here.

Tools, tool_choice, parallel_tool_calls and response_format make one HarmonyStructure together: they hold for the same turn. A turn is left
free only where nothing can go wrong in it: no tool is shown and no format is asked for.
"""

from contextlib import suppress

from edge.conversation.harmony_render import shown_tools
from edge.conversation.schema_check import check_parameters, check_schema
from edge.conversation.validation import MAX_SCHEMA_BYTES, check_request
from protos.ossia.v1 import inference_pb2 as inference
from protos.ossia.v1 import sampling_pb2 as sampling
from services.errors import InvalidArgument, OssiaError

_ANY_OBJECT = '{"type":"object"}'
_FORCING = (inference.ToolChoice.MODE_REQUIRED, inference.ToolChoice.MODE_NAMED)


def has_schemas(request: inference.ChatRequest) -> bool:
    """Whether `build_constraint` has something to compile."""
    return bool(request.tools) or request.response_format.HasField("json_schema") or request.sampling.HasField("constraint")


def compile_schemas(request: inference.ChatRequest) -> None:
    """Compiles on the caller's thread what `build_constraint` then finds done. Refuses nothing: that comes in its turn."""
    with suppress(OssiaError):
        check_request(request)
        build_constraint(request)


def build_constraint(request: inference.ChatRequest) -> sampling.Constraint | None:
    """None where anything may come. Raises InvalidArgument for a schema that cannot be enforced, naming its path."""
    if request.sampling.HasField("constraint"):
        return _check_given(request.sampling.constraint)
    final_json_schema = _read_final_schema(request.response_format)
    name = request.tool_choice.name if request.tool_choice.mode == inference.ToolChoice.MODE_NAMED else ""
    shown = shown_tools(request)
    functions = [
        sampling.HarmonyStructure.Function(
            name=tool.name, parameters_json_schema=check_parameters(tool.parameters_json_schema, f"tools[{at}].function.parameters")
        )
        for at, tool in enumerate(shown)
        if not name or tool.name == name
    ]
    if not (functions or final_json_schema):
        return None
    structure = sampling.HarmonyStructure(
        final_json_schema=final_json_schema,
        functions=functions,
        call_required=request.tool_choice.mode in _FORCING,
        single_call=request.HasField("parallel_tool_calls") and not request.parallel_tool_calls,
    )
    return sampling.Constraint(harmony=structure)


def _read_final_schema(asked: inference.ResponseFormat) -> str:
    match asked.WhichOneof("kind"):
        case "json_schema":
            return check_schema(asked.json_schema.schema, "response_format.json_schema.schema")
        case "json_object":
            return _ANY_OBJECT if asked.json_object else ""
    return ""


def _check_given(constraint: sampling.Constraint) -> sampling.Constraint:
    """An internal caller's own constraint travels as it is, within the bounds of any schema."""
    if constraint.ByteSize() > MAX_SCHEMA_BYTES:
        raise InvalidArgument(f"sampling.constraint is out of bounds: keep it under {MAX_SCHEMA_BYTES} bytes", "sampling.constraint")
    if constraint.HasField("json_schema"):
        return sampling.Constraint(json_schema=check_schema(constraint.json_schema, "sampling.constraint.json_schema"))
    return constraint
