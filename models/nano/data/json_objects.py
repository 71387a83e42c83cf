"""JSON on request: the keys that are named, with what the user said."""

from collections.abc import Sequence

import orjson

from models.nano.data.banks import read_bank
from models.nano.data.conversation import Conversation, User
from models.nano.data.exchange import Exchange
from models.nano.data.lists import WORDS
from models.nano.data.source import Source

_BANK = read_bank("json_objects")
_NUMBERS = (*_BANK["number_keys"], "number")


def draw_json(source: Source, effort: str, date: str) -> Conversation:
    kind = source.rng.random()
    keys: list[str] = []
    if kind < 0.1:
        exchange = make_array(source)
    else:
        exchange, keys = make_keyed(source) if kind < 0.55 else make_sentence(source)
    conversation = Conversation("json", effort, date, [User(exchange.user), exchange.reply(effort)])
    if keys and source.chance(0.4):
        properties = {key: {"type": "integer" if key in _NUMBERS else "string"} for key in keys}
        conversation.schema = {} if source.chance(0.5) else {"type": "object", "properties": properties, "required": keys}
    return conversation


def make_keyed(source: Source) -> tuple[Exchange, list[str]]:
    keys = [*source.sample(_BANK["word_keys"], source.rng.randint(1, 2)), *source.sample(_BANK["number_keys"], source.rng.randint(0, 2))]
    if source.chance(0.3):
        keys[0] = source.lower_word()
    source.rng.shuffle(keys)
    values = {key: _value(source, key) for key in keys}
    link = source.rng.choice((" is ", " = ", ": ", " "))
    said = [f"{key}{link}{value}" for key, value in values.items()]
    joined = ", ".join(said) if source.chance(0.5) or len(said) == 1 else ", ".join(said[:-1]) + " and " + said[-1]
    return _ask(source.choose(_BANK["keyed"]).format(joined), values), list(values)


def make_sentence(source: Source) -> tuple[Exchange, list[str]]:
    frame = source.rng.choice(_BANK["sentences"])
    keys = frame["keys"]
    values = {key: _value(source, key) for key in keys}
    named = ", ".join(keys[:-1]) + " and " + keys[-1]
    return _ask(source.choose(_BANK["asked"]).format(s=frame["says"].format(*values.values()), k=named), values), keys


def make_array(source: Source) -> Exchange:
    is_word = source.chance(0.6)
    items = [source.rng.choice(WORDS) if is_word else source.rng.randint(0, 99) for _ in range(source.rng.randint(2, 5))]
    return ask_array(source, items)


def ask_array(source: Source, items: Sequence[str | int]) -> Exchange:
    user = source.choose(_BANK["arrays"]).format(", ".join(map(str, items)))
    return Exchange("json", user, orjson.dumps(items).decode(), "JSON.", "The user wants a JSON array.")


def _ask(user: str, values: dict[str, str | int]) -> Exchange:
    keys = ", ".join(values)
    return Exchange("json", user, orjson.dumps(values).decode(), "JSON.", f"The user wants JSON. The keys are: {keys}.")


def _value(source: Source, key: str) -> str | int:
    if key in _NUMBERS:
        return source.rng.randint(1, 2030)
    return source.lower_word() if key in ("color", "item", "status") else source.name()
