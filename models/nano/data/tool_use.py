"""Conversations with declared tools: choose, call, use the result, call again, or say that none fits."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import orjson

from models.nano.data.banks import read_bank
from models.nano.data.conversation import HIGH, LOW, MEDIUM, Call, Conversation, Message, Reply, Result, Tool, User
from models.nano.data.exchanges import draw_exchange
from models.nano.data.functions import FUNCTIONS, NUMBER, Function, ResultField
from models.nano.data.small_talk import NO_TOOL
from models.nano.data.source import Source, is_callable_alike

ODD_TOOL_NAMES, ODD_PARAMETER_NAMES = (0.3, 0.12), (0.45, 0.1)  # shares in training and in the evaluation
EFFORTS = (LOW, MEDIUM, HIGH)
KINDS = {"call": 42, "result": 16, "two_calls": 13, "refusal": 15, "talk": 14}
_BANK, _NAMES = read_bank("tool_use"), read_bank("names")
_EXTRAS: tuple[tuple[str, dict[str, object]], ...] = (
    ("unit", {"type": "string", "enum": ["celsius", "fahrenheit"]}),
    ("format", {"type": "string", "enum": ["short", "long"]}),
    ("limit", {"type": "integer", "description": "At most so many"}),
    ("language", {"type": "string", "description": "The language of the answer"}),
)


@dataclass(frozen=True)
class Declared:
    """A function under the names that it has in this conversation."""

    function: Function
    tool: Tool
    parameter_names: tuple[str, ...]

    def named(self) -> str:
        """By topic and name, with the names of what it takes: so that a call repeats words that stand together already.

        Not its declaration to the letter: they all begin with the same words, so that copying strays into another tool's.
        """
        return f"{self.function.topic} {self.tool.name} ({', '.join(self.parameter_names)})"


@dataclass(frozen=True)
class Task:
    """A request for one function, the call it takes, and what comes of it."""

    declared: Declared
    request: str
    call: Call
    result: str
    answer: str


@dataclass(frozen=True)
class Toolbox:
    """What conversations of one family share."""

    declared: list[Declared]
    instructions: str
    preamble: str  # "" where no preamble is asked for

    def reasoning(self, effort: str, asked: Sequence[Declared]) -> str:
        """What each tool is for, then what is asked for: so that whether a tool fits is seen by whether its topic stands there already."""
        is_served = all(one in self.declared for one in asked)
        tools = ", ".join(f"{one.function.topic} {one.tool.name}" for one in self.declared)
        wanted = ", ".join(one.named() if is_served else f"{one.function.topic} none" for one in asked)
        brief = f"Tools: {tools}. Asked: {wanted}."
        if effort == LOW:
            return brief
        if effort == MEDIUM:
            return f"{brief} {'I call it.' if is_served else 'No tool fits.'}"
        return f"I look at what each tool is for. {brief} {'A tool fits, so I call it.' if is_served else 'No tool fits, so I say so.'}"


def draw_tool_use(source: Source, effort: str, date: str, kind: str | None = None) -> Conversation:
    return draw_tool_family(source, effort, date, [kind])[0]


def draw_tool_family(source: Source, effort: str, date: str, kinds: Sequence[str | None]) -> list[Conversation]:
    """A conversation of each kind, None for any, with the same tools."""
    counts = (1, 1, 2, 2, 3) if source.is_short else (1, 2, 2, 3, 3, 4, 5)
    declared = [declare(source, function) for function in source.sample(FUNCTIONS, source.rng.choice(counts))]
    toolbox = Toolbox(declared, source.choose(_BANK["rules"]), "")
    if source.chance(0.08):
        toolbox = Toolbox(declared, source.choose(_BANK["preamble_rules"]), _BANK["preambles"][0])
    return [_draw_with(source, toolbox, effort, date, kind or source.rng.choices(list(KINDS), list(KINDS.values()))[0]) for kind in kinds]


def _draw_with(source: Source, toolbox: Toolbox, effort: str, date: str, kind: str) -> Conversation:
    declared = toolbox.declared
    messages: list[Message] = []
    if source.is_short:
        pass
    elif source.chance(0.15):
        messages += _use_tools(source, toolbox, [draw_task(source, source.rng.choice(declared))], effort)
    elif source.chance(0.1):
        messages += _talk(source, effort)
    if kind == "refusal":
        messages += _refuse(source, toolbox, effort)
    elif kind == "talk":
        messages += _talk(source, effort)
    else:
        tasks = [draw_task(source, source.rng.choice(declared))]
        if kind == "two_calls":
            tasks.append(draw_task(source, tasks[0].declared if source.chance(0.4) else source.rng.choice(declared)))
        messages += _use_tools(source, toolbox, tasks, effort)[: 2 if kind == "call" else None]
    return Conversation(f"tool_{kind}", effort, date, messages, toolbox.instructions, [one.tool for one in declared])


def _use_tools(source: Source, toolbox: Toolbox, tasks: list[Task], effort: str) -> list[Message]:
    messages: list[Message] = [User(_ask(source, source.choose(_BANK["joints"]).join(task.request for task in tasks)))]
    analysis = toolbox.reasoning(effort, [task.declared for task in tasks])
    for task, following in zip(tasks, [*tasks[1:], None], strict=True):
        messages += [Reply(analysis=analysis, call=task.call, preamble=toolbox.preamble), Result(task.call.name, task.result)]
        if following:
            analysis = f"Next: {following.declared.named()}."
    told = {MEDIUM: "I have the result.", HIGH: "The tool has answered. I tell the user what it says."}.get(effort, "")
    return [*messages, Reply(" ".join(task.answer for task in tasks), told)]


def _refuse(source: Source, toolbox: Toolbox, effort: str) -> list[Message]:
    names = {one.function.names for one in toolbox.declared}
    missing = declare(source, source.rng.choice([one for one in FUNCTIONS if one.names not in names]))
    return [User(_ask(source, draw_task(source, missing).request)), Reply(NO_TOOL, toolbox.reasoning(effort, [missing]))]


def _ask(source: Source, request: str) -> str:
    """The request by itself, or after an opening, some of which are any word."""
    kind = source.rng.random()
    if kind < 0.4:
        return request
    opening: str = source.choose(_BANK["openings"]) if kind < 0.9 else f"{source.real_word().capitalize()}: "
    is_name = request.startswith("I ")
    return opening + (request[0].lower() + request[1:] if opening and not is_name else request)


def _talk(source: Source, effort: str) -> list[Message]:
    exchange = draw_exchange(source, beside_tools=True)
    return [User(exchange.user), exchange.reply(effort)]


def declare(source: Source, function: Function) -> Declared:
    """Under one of its names, or under one that says nothing, so that the declaration has to be read; parameters too."""
    name = _make_name(source) if source.chance(ODD_TOOL_NAMES[source.is_held_out]) else source.rng.choice(function.names)
    parameter_names = tuple(
        source.lower_word() if source.chance(ODD_PARAMETER_NAMES[source.is_held_out]) else source.rng.choice(parameter.names)
        for parameter in function.parameters
    )
    if len(set(parameter_names)) < len(parameter_names):
        parameter_names = tuple(parameter.names[0] for parameter in function.parameters)
    properties: dict[str, object] = {}
    for parameter, called in zip(function.parameters, parameter_names, strict=True):
        description = {"description": source.choose(parameter.descriptions)} if source.chance(0.5) else {}
        properties[called] = {"type": "integer" if parameter.kind == NUMBER else "string"} | description
    if source.chance(0.2):
        extra, schema = source.rng.choice(_EXTRAS)
        properties.setdefault(extra, schema)
    parameters: dict[str, object] = {"type": "object", "properties": properties, "required": list(parameter_names)}
    return Declared(function, Tool(name, source.choose(function.descriptions), parameters), parameter_names)


def draw_task(source: Source, declared: Declared) -> Task:
    function = declared.function
    values = [_draw_argument(source, parameter.kind, parameter.names[0]) for parameter in function.parameters]
    arguments = orjson.dumps(dict(zip(declared.parameter_names, values, strict=True))).decode()
    result, told = _draw_result(source, function.results)
    request, answer = source.choose(function.requests).format(*values), f"{function.answer.format(*values)}: {told}."
    return Task(declared, request, Call(declared.tool.name, arguments), result, answer)


def _draw_argument(source: Source, kind: str, name: str) -> str | int:
    if kind == NUMBER:
        return source.rng.randint(2, 99) if source.chance(0.8) else source.rng.randint(100, 9999)
    if kind == "name":
        if source.chance(0.3):
            bank: list[str] = _NAMES["cities" if name in ("city", "from", "to", "address") else "first_names"]
            return source.choose(bank)
        return " ".join(source.name() for _ in range(source.rng.choice((1, 1, 1, 2))))
    if kind == "word":
        return source.lower_word() if source.chance(0.8) else source.lower_name()
    return " ".join(source.lower_word() for _ in range(source.rng.randint(1, 4)))


def _draw_result(source: Source, fields: tuple[ResultField, ...]) -> tuple[str, str]:
    """(what the function gives back, what is told of it)"""
    values: dict[str, str | int | float] = {}
    for field in fields:
        key = source.lower_word() if source.chance(0.15) else source.rng.choice(field.keys)
        values[key] = _draw_result_value(source, field)
    if source.chance(0.25):
        text = source.rng.choice((" and ", ", ")).join(f"{value} {key}" for key, value in values.items())
        return text, text
    told = ", ".join(f"{key} {value}" for key, value in values.items())
    return json.dumps(values) if source.chance(0.5) else orjson.dumps(values).decode(), told


def _draw_result_value(source: Source, field: ResultField) -> str | int | float:
    if field.words:
        word = source.rng.choice(field.words) if source.chance(0.6) else source.lower_word()
        return f"{source.lower_word()} {word}" if source.chance(0.1) else word
    return source.rng.randint(0, 999) if source.chance(0.85) else source.rng.randint(1, 999) / 10


def _make_name(source: Source) -> str:
    while True:
        words = [source.lower_word() for _ in range(source.rng.choice((1, 2)))]
        name = source.lower_name() if source.chance(0.4) else "_".join(words)
        if is_callable_alike(name):
            return name
