"""Copying, sorting, counting and picking: work on a list that stands in the prompt."""

from models.nano.data.banks import read_bank
from models.nano.data.exchange import Exchange
from models.nano.data.source import Source

_BANK = read_bank("lists")
WORDS, PLACES = _BANK["words"], _BANK["places"]


def draw_list_task(source: Source) -> Exchange:
    kind = source.rng.random()
    if kind < 0.25:
        return make_copy(source)
    if kind < 0.75:
        return make_sort(source)
    return source.rng.choice((make_count, make_reverse, make_pick, make_extreme))(source)


def make_copy(source: Source) -> Exchange:
    text = draw_words(source, source.rng.randint(1, 4 if source.is_short else 8))
    user = draw_copy_request(source, text)
    return Exchange("copy", user, text, "Copy the text.", "The user wants these words back. I copy them one by one.")


def make_sort(source: Source) -> Exchange:
    if source.chance(0.65):
        numbers = source.sample(range(100), source.rng.randint(2, 6))
        items, ordered = [str(number) for number in numbers], [str(number) for number in sorted(numbers)]
        steps = f"From small to large: {ordered[0]} is the smallest, {ordered[-1]} the largest."
    else:
        items = source.sample(WORDS, source.rng.randint(2, 5))
        ordered = sorted(items)
        steps = f"By the alphabet: {ordered[0]} comes first, {ordered[-1]} last."
    user = source.choose(_BANK["sort"]).format(_write(source, items))
    return Exchange("sort", user, ", ".join(ordered), "Sort the list.", steps)


def make_count(source: Source) -> Exchange:
    items = _items(source, source.rng.randint(1, 8))
    counted = ", ".join(f"{number} {item}" for number, item in enumerate(items, start=1))
    user = source.choose(_BANK["count"]).format(", ".join(items))
    return Exchange("count", user, f"{len(items)}", f"{counted}.", f"I count one by one: {counted}. That makes {len(items)}.")


def make_reverse(source: Source) -> Exchange:
    items = _items(source, source.rng.randint(2, 5))
    user = source.choose(_BANK["reverse"]).format(_write(source, items))
    return Exchange("reverse", user, ", ".join(reversed(items)), "From the end to the beginning.", f"I begin with the last, {items[-1]}.")


def make_pick(source: Source) -> Exchange:
    items = _items(source, source.rng.randint(3, 6))
    place = source.rng.randrange(min(len(items), len(PLACES)))
    name = "last" if place == len(items) - 1 or source.chance(0.2) else PLACES[place]
    picked = items[-1] if name == "last" else items[place]
    user = source.choose(_BANK["pick"]).format(name, ", ".join(items))
    counted = ", ".join(f"{number} {item}" for number, item in enumerate(items[: place + 1], start=1))
    return Exchange("pick", user, picked, f"The {name} item.", f"I count: {counted}." if name != "last" else f"The last item is {picked}.")


def make_extreme(source: Source) -> Exchange:
    numbers = source.sample(range(100), source.rng.randint(2, 6))
    is_largest = source.chance(0.5)
    name = source.rng.choice(("largest", "greatest", "biggest")) if is_largest else source.rng.choice(("smallest", "least", "lowest"))
    picked = max(numbers) if is_largest else min(numbers)
    user = source.choose(_BANK["pick"]).format(name, ", ".join(map(str, numbers))).replace(" item", " number").replace(" word", " number")
    return Exchange("pick", user, str(picked), f"The {name} number.", f"I look for the {name} number: it is {picked}.")


def draw_copy_request(source: Source, text: str) -> str:
    frame: str = source.choose(_BANK["copy"])
    return frame.format(text)


def draw_words(source: Source, count: int) -> str:
    """Words of every sort: made ones, any of the vocabulary, numbers."""
    makers = (
        source.made_word,
        source.real_word,
        source.lower_word,
        lambda: source.rng.choice(WORDS),
        lambda: str(source.rng.randint(0, 999)),
    )
    words = [source.rng.choices(makers, (3, 2, 2, 2, 1))[0]() for _ in range(count)]
    return source.rng.choices((" ", ", "), (4, 1))[0].join(words)


def _items(source: Source, count: int) -> list[str]:
    return source.sample(WORDS, count) if source.chance(0.6) else [source.lower_word() for _ in range(count)]


def _write(source: Source, items: list[str]) -> str:
    return source.rng.choices((", ", " "), (4, 1))[0].join(items)
