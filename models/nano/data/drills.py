"""Copying, and nothing else: what all the other skills rest on, so it comes first and never ends."""

from models.nano.data.conversation import LOW, Conversation, Message, Reply, User
from models.nano.data.json_objects import ask_array
from models.nano.data.lists import draw_copy_request, draw_words
from models.nano.data.source import Source

QUOTED_SHARE = 0.4  # as a JSON array: in quotation marks words have no space before them, which is another id


def draw_drill(source: Source, date: str) -> Conversation:
    """At low effort, so that there is no reasoning."""
    messages: list[Message] = []
    for _ in range(1 if source.is_short else source.rng.choice((1, 1, 2, 3))):
        text = draw_words(source, source.rng.randint(1, 4) if source.is_short else source.rng.randint(3, 24))
        asked, reply = draw_copy_request(source, text), Reply(text)
        if source.chance(QUOTED_SHARE) and (words := [word for word in text.replace(",", "").split() if not word.isdigit()]):
            exchange = ask_array(source, words)
            asked, reply = exchange.user, exchange.reply(LOW)
        messages += [User(asked), reply]
    return Conversation("drill", LOW, date, messages)
