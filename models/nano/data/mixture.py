"""The whole training text: which skills, how often, and how long the conversations are."""

import datetime
import random

from models.nano.data.conversation import HIGH, LOW, MEDIUM, Conversation, Message, User
from models.nano.data.documents import draw_questions, make_facts
from models.nano.data.drills import draw_drill
from models.nano.data.exchange import Exchange
from models.nano.data.exchanges import draw_exchange
from models.nano.data.instructions import draw_instructed, draw_neutral
from models.nano.data.json_objects import draw_json
from models.nano.data.small_talk import draw_recall
from models.nano.data.source import Source
from models.nano.data.tool_use import draw_tool_family

LONG_SHARE, LONG_QUESTIONS = 0.08, 20  # documents of up to 2,000 tokens
FAMILY = 4  # conversations that share their tools or their text
_SHARES = {"tools": 45, "documents": 17, "json": 6, "instructed": 7, "recall": 2, "chain": 78}
_DRILL_SHARES = {"copy": 5, "documents": 3, "tools": 2}
_FIRST_DAY, _NUM_DAYS = datetime.date(2024, 1, 1), 365 * 8


def draw_setting(rng: random.Random) -> tuple[str, str]:
    """(effort, date)"""
    date = _FIRST_DAY + datetime.timedelta(days=rng.randrange(_NUM_DAYS))
    return rng.choices((LOW, MEDIUM, HIGH), (3, 4, 3))[0], date.isoformat()


def draw_family(source: Source, effort: str, date: str, drill_share: float = 0.0) -> list[Conversation]:
    """Conversations that begin alike: with the same tools, with the same text, or one by itself."""
    is_drill = source.chance(drill_share)
    if not is_drill and not source.is_short and source.chance(LONG_SHARE):
        return [chain([one], effort, date) for one in make_facts(source, source.rng.randint(12, 80), LONG_QUESTIONS)]
    shares = _DRILL_SHARES if is_drill else _SHARES
    kind = source.rng.choices(list(shares), list(shares.values()))[0]
    if kind == "copy":
        return [draw_drill(source, date)]
    if kind == "tools":
        return draw_tool_family(source, effort, date, [None] * FAMILY)
    if kind == "documents":
        return [chain([one], effort, date) for one in draw_questions(source, FAMILY)]
    if kind == "json":
        return [draw_json(source, effort, date)]
    if kind == "instructed":
        return [draw_instructed(source, effort, date)]
    if kind == "recall":
        return [chain(draw_recall(source), effort, date)]
    count = 1 if source.is_short else source.rng.choices((1, 2, 3), (7, 2, 1))[0]
    conversation = chain([draw_exchange(source) for _ in range(count)], effort, date)
    if source.chance(0.15):
        conversation.instructions = draw_neutral(source)
    return [conversation]


def chain(exchanges: list[Exchange], effort: str, date: str) -> Conversation:
    messages: list[Message] = []
    for exchange in exchanges:
        messages += [User(exchange.user), exchange.reply(effort)]
    return Conversation(exchanges[-1].skill, effort, date, messages)
