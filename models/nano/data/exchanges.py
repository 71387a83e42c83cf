"""One exchange of any of the skills that take no more than a user's message."""

from collections.abc import Callable

from models.nano.data.arithmetic import draw_arithmetic
from models.nano.data.documents import draw_document
from models.nano.data.exchange import Exchange
from models.nano.data.lists import draw_list_task
from models.nano.data.ossia import draw_ossia
from models.nano.data.small_talk import draw_limits, draw_small_talk
from models.nano.data.source import Source

_SHARES: dict[Callable[[Source], Exchange], float] = {
    draw_small_talk: 10,
    draw_ossia: 60,
    draw_arithmetic: 44,
    draw_list_task: 56,
    draw_document: 2,
    draw_limits: 8,
}
_BESIDE_TOOLS: dict[Callable[[Source], Exchange], float] = {draw_small_talk: 4, draw_ossia: 3, draw_arithmetic: 2, draw_list_task: 1}


def draw_exchange(source: Source, beside_tools: bool = False) -> Exchange:
    """`beside_tools`: what is answered without a call although tools are declared."""
    shares = _BESIDE_TOOLS if beside_tools else _SHARES
    return source.rng.choices(list(shares), list(shares.values()))[0](source)
