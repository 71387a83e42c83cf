"""Sums, differences and small products, with the steps in the reasoning."""

from models.nano.data.banks import read_bank
from models.nano.data.exchange import Exchange
from models.nano.data.source import Source

_BANK = read_bank("arithmetic")


def draw_arithmetic(source: Source) -> Exchange:
    kind = source.rng.random()
    if kind < 0.65:
        return make_sum(source)
    return make_difference(source) if kind < 0.88 else make_product(source)


def make_sum(source: Source) -> Exchange:
    a, b = source.pair(10, 99) if source.chance(0.85) else source.pair(0, 20)
    brief, careful = _add_up(a, b)
    return _ask(source, "addition", "sums", a, b, f"{a} + {b} = {a + b}", brief, careful)


def make_difference(source: Source) -> Exchange:
    a, b = sorted(source.pair(0, 99), reverse=True)
    tens, ones = b - b % 10, b % 10
    brief = f"{a} - {tens} = {a - tens}. {a - tens} - {ones} = {a - b}."
    careful = f"{b} is {tens} and {ones}. {brief} Check: {a - b} + {b} = {a}."
    return _ask(source, "subtraction", "differences", a, b, f"{a} - {b} = {a - b}", brief, careful)


def make_product(source: Source) -> Exchange:
    a, b = source.pair(0, 12)
    brief = f"{a} * {b} = {a * b}."
    careful = f"{b} is {b // 2} and {b - b // 2}. {a} * {b // 2} = {a * (b // 2)}. {a} * {b - b // 2} = {a * (b - b // 2)}. {brief}"
    return _ask(source, "product", "products", a, b, f"{a} * {b} = {a * b}", brief, careful)


def _add_up(a: int, b: int) -> tuple[str, str]:
    ones, tens = a % 10 + b % 10, a - a % 10 + b - b % 10
    steps = f"{a % 10} + {b % 10} = {ones}. {a - a % 10} + {b - b % 10} = {tens}. {tens} + {ones} = {a + b}."
    split = f"{a} is {a - a % 10} and {a % 10}. {b} is {b - b % 10} and {b % 10}."
    return steps, f"{split} {steps} So {a} + {b} = {a + b}."


def _ask(source: Source, skill: str, forms: str, a: int, b: int, final: str, brief: str, careful: str) -> Exchange:
    form = source.rng.choice(_BANK[forms]).format(a, b)
    return Exchange(skill, source.choose(_BANK["frames"]).format(form), final, brief, careful)
