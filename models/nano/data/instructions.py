"""What the developer message asks for: the language of the greeting, a word that must be there, another name."""

from dataclasses import replace

from models.nano.data.arithmetic import draw_arithmetic
from models.nano.data.banks import read_bank
from models.nano.data.conversation import Conversation, User
from models.nano.data.exchange import Exchange
from models.nano.data.ossia import draw_ossia
from models.nano.data.small_talk import draw_small_talk, make_greeting
from models.nano.data.source import Source

_BANK = read_bank("instructions")


def draw_instructed(source: Source, effort: str, date: str) -> Conversation:
    rule, exchange = source.rng.choices((_ask_language, _ask_name, _ask_word), (4, 2, 4))[0](source)
    return Conversation("instruction", effort, date, [User(exchange.user), exchange.reply(effort)], rule)


def draw_neutral(source: Source) -> str:
    """An instruction that changes nothing."""
    rule: str = source.choose(_BANK["neutral"])
    return rule


def _ask_language(source: Source) -> tuple[str, Exchange]:
    language, hello = source.rng.choice(list(_BANK["languages"].items()))
    exchange = replace(
        make_greeting(source), final=hello, brief=f"Greet in {language}.", careful=f"A greeting. The instruction says {language}."
    )
    return source.choose(_BANK["language_rules"]).format(language), exchange


def _ask_name(source: Source) -> tuple[str, Exchange]:
    name = source.name()
    final, careful = f"I am {name}.", f"The instruction says who I am: {name}."
    return source.choose(_BANK["name_rules"]).format(name), Exchange(
        "instruction", source.choose(_BANK["name_questions"]), final, final, careful
    )


def _ask_word(source: Source) -> tuple[str, Exchange]:
    word = source.name() if source.chance(0.4) else source.lower_word()
    asked = source.rng.choice((draw_small_talk, draw_small_talk, draw_ossia, draw_arithmetic))(source)
    is_end = source.chance(0.5)
    rule = source.choose(_BANK["end_rules" if is_end else "begin_rules"]).format(word)
    place = "last" if is_end else "first"
    final = f"{asked.final} {word}" if is_end else f"{word} {asked.final}"
    reminder = f"{word} comes {place}."
    return rule, replace(asked, final=final, brief=f"{asked.brief} {reminder}", careful=f"{asked.careful} The instruction: {reminder}")
