"""Questions about Ossia, with answers from its README and docs."""

from models.nano.data.banks import read_bank
from models.nano.data.exchange import Exchange
from models.nano.data.source import Source

_BANK = read_bank("ossia")


def draw_ossia(source: Source) -> Exchange:
    answer = source.rng.choice(list(_BANK["facts"]))
    question = source.choose(_BANK["facts"][answer])
    if question.endswith("?") and source.chance(0.15):
        question = question[:-1]
    if source.chance(0.15):
        question = question.lower()
    user = source.rng.choice(_BANK["openings"]) + question + source.rng.choice(_BANK["closings"])
    return Exchange(
        "ossia", user, answer, "A question about Ossia.", "This is a question about Ossia. I know the answer from its documents."
    )
