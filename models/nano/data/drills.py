"""Copying, and nothing else: what all the other skills rest on, so it comes first and never ends."""

import orjson

from models.nano.data.banks import read_bank
from models.nano.data.conversation import LOW, Conversation, Message, Reply, User
from models.nano.data.lists import draw_copy_request, draw_words
from models.nano.data.source import Source

QUOTED_SHARE = 0.4
_ARRAYS = read_bank("json_objects")["arrays"]


def draw_drill(source: Source, date: str) -> Conversation:
    """At low effort, so that there is no reasoning."""
    messages: list[Message] = []
    for _ in range(1 if source.is_short else source.rng.choice((1, 1, 2, 3))):
        text = draw_words(source, source.rng.randint(1, 4) if source.is_short else source.rng.randint(3, 24))
        messages += [User(draw_copy_request(source, text)), Reply(text)]
        if source.chance(QUOTED_SHARE) and (words := [word for word in text.replace(",", "").split() if not word.isdigit()]):
            messages[-2:] = _quote(source, words)
    return Conversation("drill", LOW, date, messages)


def _quote(source: Source, words: list[str]) -> list[Message]:
    """The same words in quotation marks: without the space before them, which is another id."""
    return [User(source.choose(_ARRAYS).format(", ".join(words))), Reply(orjson.dumps(words).decode())]
