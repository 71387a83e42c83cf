"""Copying and looking up, and nothing else: what all the other skills rest on, so it comes first and never ends."""

from models.nano.data.conversation import LOW, Conversation, Message, Reply, User
from models.nano.data.documents import draw_facts
from models.nano.data.lists import draw_copy_request, draw_words
from models.nano.data.source import Source


def draw_drill(source: Source, date: str) -> Conversation:
    """At low effort, so that there is no reasoning."""
    messages = _look_up_often(source) if source.chance(0.4) else _copy_long(source)
    return Conversation("drill", LOW, date, messages)


def _copy_long(source: Source) -> list[Message]:
    messages: list[Message] = []
    for _ in range(1 if source.is_short else source.rng.choice((1, 1, 2, 3))):
        text = draw_words(source, source.rng.randint(1, 4) if source.is_short else source.rng.randint(3, 24))
        messages += [User(draw_copy_request(source, text)), Reply(text)]
    return messages


def _look_up_often(source: Source) -> list[Message]:
    facts = draw_facts(source, source.rng.randint(1, 3) if source.is_short else source.rng.randint(2, 8))
    asked = source.sample(facts, 1 if source.is_short else min(len(facts), 4))
    document = ("\n" if source.chance(0.3) else " ").join(fact.sentence for fact in facts)
    messages: list[Message] = [User(f"{document}\n\n{asked[0].question}"), Reply(asked[0].value)]
    for fact in asked[1:]:
        messages += [User(fact.question), Reply(fact.value)]
    return messages
