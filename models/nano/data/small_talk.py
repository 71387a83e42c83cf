"""Greetings, thanks, who are you, and what it cannot do."""

from models.nano.data.banks import read_bank
from models.nano.data.exchange import Exchange
from models.nano.data.source import Source

_BANK = read_bank("small_talk")
HELLO = "Hello! How can I help you?"
NO_TOOL = "I cannot do that: I have no tool for it."
UNKNOWN = "I do not know that. I am only a small demonstration model."


def draw_small_talk(source: Source) -> Exchange:
    kind = source.rng.random()
    if kind < 0.25:
        return make_greeting(source)
    if kind > 0.85:
        return _introduce(source, source.name())
    final = source.rng.choice(list(_BANK["talk"]))
    user = punctuate(source, source.choose(_BANK["talk"][final]))
    return Exchange("small_talk", user, final, "Small talk.", "The user makes small talk. A short answer is enough.")


def make_greeting(source: Source) -> Exchange:
    user = punctuate(source, source.choose(_BANK["greetings"]))
    return Exchange("small_talk", user, HELLO, "A greeting.", "The user greets me. I greet back and offer help.")


def draw_limits(source: Source) -> Exchange:
    """What it has no tool for, and what it does not know."""
    if source.chance(0.5):
        user = source.choose(_BANK["actions"]).format(_topic(source))
        return Exchange(
            "limits", user, NO_TOOL, "This needs a tool. I have none.", "This would need a tool, and no tool for it is declared."
        )
    user = source.choose(_BANK["questions"]).format(_topic(source))
    return Exchange("limits", user, UNKNOWN, "I do not know this.", "This is a question about the world. I know only Ossia, so I say so.")


def draw_recall(source: Source) -> list[Exchange]:
    """A name in one turn, asked for in the next."""
    name = source.name()
    asked = source.choose(_BANK["recalls"])
    final, careful = f"Your name is {name}.", f"The user said it before: the name is {name}."
    return [_introduce(source, name), Exchange("small_talk", asked, final, "The user said the name before.", careful)]


def punctuate(source: Source, text: str) -> str:
    """As people type: now and then without the sign at the end, or in small letters."""
    if text[-1].isalnum() and source.chance(0.4):
        text += source.rng.choice(".!")
    elif text[-1] in "?." and source.chance(0.15):
        text = text[:-1]
    return text.lower() if source.chance(0.1) else text


def _introduce(source: Source, name: str) -> Exchange:
    user = source.choose(_BANK["names"]).format(name)
    return Exchange(
        "small_talk", user, f"Nice to meet you, {name}!", "The user says a name.", f"The user says a name: {name}. I greet {name}."
    )


def _topic(source: Source) -> str:
    words = [source.name() for _ in range(source.rng.choice((1, 1, 2)))]
    return " ".join(words) if source.chance(0.7) else f"the {source.lower_word()}"
