"""A constraint on generated tokens, written as a grammar in llguidance's dialect of Lark. Edge and worker write and limit it alike.

A Harmony turn is spelled out whole, headers included. Header words stand as the token ids that the renderer would give them, so that what
was generated renders again to the same tokens; bodies are free text or JSON. Reasoning is free: a schema counts from `<|message|>` on.

    start   the turn after `<|start|>assistant`: thoughts (and preambles), then calls or a final answer
    more    a call that another one follows: it ends in `<|end|>`
    call    the last one: it ends in `<|call|>`, which stops the engine
"""

import json
from collections.abc import Iterable

import orjson
from llguidance import LLParserLimits, LLTokenizer, TokenizerWrapper

from protos.ossia.v1.sampling_pb2 import Constraint, HarmonyStructure
from services.vocabulary import CHANNEL, END_OF_TEXT, FIRST_CONTROL_ID, VOCAB_SIZE, Vocabulary

# Fuel, not seconds: a grammar that is refused on one machine is refused on every other, and on every rank of a group.
# An object takes about four items of a row for each optional property.
LIMITS = LLParserLimits(
    max_items_in_row=20_000,
    step_max_items=200_000,
    initial_lexer_fuel=200_000,
    step_lexer_fuel=200_000,
    max_lexer_states=50_000,
    max_grammar_size=200_000,
)
MAX_CALLS = 16  # in one turn
MAX_NUMBER = (
    2**53
)  # in a schema, either sign: what every JSON reader keeps whole. llguidance overflows at 64 bits and takes the process down.
# A space, or a line break and an indent. Endless white space would be valid JSON too, and a way never to end.
_WHITE_SPACE = r"( |\n {0,32})?"
_ANY_TEXT = r"/(.|\n)*/"
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
_JSON_TYPES = (" <|constrain|>json", "<|constrain|>json", " json", "")  # how the model announces JSON


def write_grammar(constraint: Constraint, vocabulary: Vocabulary) -> str:
    """The grammar of what may be generated. Raises ValueError where the constraint itself makes none, as with a schema that is no JSON."""
    match constraint.WhichOneof("kind"):
        case "json_schema":
            return f"start: {_write_json(orjson.loads(constraint.json_schema))}\n"
        case "regex":
            return f"start: TEXT\nTEXT: /{_escape_slashes(constraint.regex)}/\n"
        case "lark":
            return constraint.lark
        case "harmony":
            return _write_turn(constraint.harmony, vocabulary)
    raise ValueError("the constraint is empty")


def write_schema_grammar(schema: object) -> str:
    """The grammar of JSON that one schema allows. Raises ValueError."""
    return f"start: {_write_json(schema)}\n"


def read_parameters(text: str) -> object:
    """The schema of a function's arguments, which are an object even where the schema does not say so. Raises ValueError."""
    if not text:
        return _NO_ARGUMENTS
    schema = orjson.loads(text)
    is_silent = isinstance(schema, dict) and not schema.keys() & {"type", "$ref", "anyOf", "oneOf", "allOf", "enum", "const"}
    return {**schema, "type": "object"} if is_silent else schema


def build_tokenizer(vocabulary: Vocabulary) -> LLTokenizer:
    """The whole vocabulary as llguidance sees it; takes about a second. A mask allows END_OF_TEXT where the output may end."""
    return LLTokenizer(TokenizerWrapper(_Tokens(vocabulary)), n_vocab=VOCAB_SIZE, eos_token=END_OF_TEXT)


class _Tokens:
    """What `TokenizerWrapper` reads."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.eos_token_id, self.bos_token_id = END_OF_TEXT, None
        self.tokens = [vocabulary.token_bytes(token_id) for token_id in range(VOCAB_SIZE)]
        self.special_token_ids = list(range(FIRST_CONTROL_ID, VOCAB_SIZE))
        self._vocabulary = vocabulary

    def __call__(self, text: str | bytes) -> list[int]:
        return self._vocabulary.encode(text.decode() if isinstance(text, bytes) else text)


def _write_turn(turn: HarmonyStructure, vocabulary: Vocabulary) -> str:
    def spell(text: str) -> str:
        """For text of our own."""
        return _spell_ids(vocabulary.encode_harmony(text))

    if turn.call_required and not turn.functions:
        raise ValueError("a call is required and there is no function to call")
    go_on = spell("<|end|><|start|>assistant")
    leads, rules = [f"{spell('<|channel|>analysis<|message|>')} TEXT {go_on}"], [f"TEXT: {_ANY_TEXT}"]
    if turn.functions and not turn.final_json_schema:  # a preamble is visible: beside a JSON answer it would spoil the answer
        leads.append(f"{spell('<|channel|>commentary<|message|>')} TEXT {go_on}")
    endings = []
    if turn.functions:
        endings.append(f"call {spell('<|call|>')}" if turn.single_call else f"more{{0,{MAX_CALLS - 1}}} call {spell('<|call|>')}")
        rules += [f"more: call {go_on} lead*", f"call: {_join(f'call_{at}' for at in range(len(turn.functions)))}"]
        rules.append("json_type: " + _join(f"{spell(text)} {spell('<|message|>')}" for text in _JSON_TYPES))
        for at, function in enumerate(turn.functions):
            arguments = _write_json(read_parameters(function.parameters_json_schema))
            rules.append(f"call_{at}: ({_join(_spell_recipient(function.name, vocabulary))}) json_type arguments_{at}")
            rules.append(f"arguments_{at}: {arguments}")
    if not turn.call_required:
        endings.append(f"final {spell('<|return|>')}")
        rules.append(_write_final(turn.final_json_schema, spell("<|channel|>final"), spell(" <|constrain|>json"), spell("<|message|>")))
    return "\n".join([f"start: lead* ({_join(endings)})", f"lead: {_join(leads)}", *rules]) + "\n"


def _spell_recipient(name: str, vocabulary: Vocabulary) -> Iterable[str]:
    """The recipient may stand in the role part or in the channel part, and the channel of a call may be analysis."""
    for channel in ("commentary", "analysis"):
        yield _spell_ids([*vocabulary.encode(f" to=functions.{name}"), CHANNEL, *vocabulary.encode(channel)])
        yield _spell_ids([CHANNEL, *vocabulary.encode(f"{channel} to=functions.{name}")])


def _spell_ids(token_ids: Iterable[int]) -> str:
    return " ".join(f"<[{token_id}]>" for token_id in token_ids)


def _write_final(schema: str, header: str, json_type: str, message: str) -> str:
    if not schema:
        return f"final: {header} {message} TEXT"
    return f"final: {header} ({json_type})? {message} answer\nanswer: {_write_json(orjson.loads(schema))}"


def has_wide_number(value: object) -> bool:
    """Whether a number anywhere in a schema is beyond MAX_NUMBER. Without recursion: the value may be hostile."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, int | float) and not abs(one) <= MAX_NUMBER:
            return True
        waiting += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
    return False


def _write_json(schema: object) -> str:
    """A schema in place. What it says of llguidance's own options is overruled. Raises ValueError."""
    if has_wide_number(schema):
        raise ValueError(f"a number in a schema is beyond {MAX_NUMBER}")
    if isinstance(schema, dict):
        schema = {**schema, "x-guidance": {"whitespace_pattern": _WHITE_SPACE}}
    return f"%json {json.dumps(schema)}"


def _join(alternatives: Iterable[str]) -> str:
    return " | ".join(alternatives)


def _escape_slashes(pattern: str) -> str:
    r"""`/` ends a pattern in Lark: it becomes `\/`, unless it is escaped already. A line break becomes `\n`."""
    escaped, is_escape = [], False
    for character in pattern:
        escaped.append("\\/" if character == "/" and not is_escape else character)
        is_escape = character == "\\" and not is_escape
    return "".join(escaped).replace("\n", "\\n")
