"""A text in the prompt, and a question that one of its sentences answers."""

from dataclasses import dataclass

from models.nano.data.banks import read_bank
from models.nano.data.exchange import Exchange
from models.nano.data.source import Source

_BANK = read_bank("documents")
ABSENT = "The text does not say that."


@dataclass(frozen=True)
class Fact:
    entity: str
    relation: str  # an entity has at most one value of it
    sentence: str
    question: str
    value: str


def draw_document(source: Source) -> Exchange:
    count = source.rng.choice((1, 2, 3) if source.is_short else (1, 2, 3, 4, 5, 6, 8, 10))
    return make_fields(source, min(count, 8)) if source.chance(0.2) else make_facts(source, count)


def make_facts(source: Source, num_facts: int) -> Exchange:
    """`num_facts` sentences, several about the same entity or of the same relation, with filler between."""
    facts = draw_facts(source, num_facts)
    sentences = [fact.sentence for fact in facts]
    for _ in range(source.rng.randint(0, num_facts // 2)):
        sentences.insert(source.rng.randint(0, len(sentences)), source.rng.choice(_BANK["filler"]))
    document = ("\n" if source.chance(0.3) else " ").join(sentences)
    if source.chance(0.1):
        known = {(fact.entity, fact.relation) for fact in facts}
        absent = _draw_fact(source, source.rng.choice((facts[0].entity, _draw_entity(source))))
        if (absent.entity, absent.relation) not in known:
            return _compose(source, document, absent.question, ABSENT, "")
    fact = source.rng.choice(facts)
    return _compose(source, document, fact.question, fact.value, fact.sentence)


def make_fields(source: Source, num_fields: int) -> Exchange:
    """Lines of `field: value`."""
    fields = {field: _draw_value(source) for field in source.sample(_BANK["fields"], num_fields)}
    mark = source.rng.choice((": ", " = ", " is "))
    lines = [f"{field}{mark}{value}" for field, value in fields.items()]
    field = source.rng.choice(list(fields))
    question = source.choose(_BANK["field_questions"]).format(field)
    return _compose(source, "\n".join(lines), question, fields[field], f"{field}{mark}{fields[field]}.")


def _compose(source: Source, document: str, question: str, answer: str, sentence: str) -> Exchange:
    user = source.choose(_BANK["frames"]).format(d=document, q=question)
    if answer == ABSENT:
        return Exchange("document", user, answer, "I do not find it.", "I look for it in the text and do not find it.")
    return Exchange("document", user, answer, sentence, f"I look for it in the text. It says: {sentence}")


def draw_facts(source: Source, count: int) -> list[Fact]:
    entities = [_draw_entity(source) for _ in range(max(1, round(count * source.rng.choice((0.4, 0.7, 1.0)))))]
    facts: dict[tuple[str, str], Fact] = {}
    while len(facts) < count:
        fact = _draw_fact(source, source.rng.choice(entities))
        facts.setdefault((fact.entity, fact.relation), fact)
    return list(facts.values())


def _draw_fact(source: Source, entity: str) -> Fact:
    is_number = source.chance(0.5)
    value = str(source.rng.randint(2, 9999)) if is_number else _draw_entity(source) if source.chance(0.1) else source.name()
    kind = "number" if is_number else "word"
    if source.chance(0.6):
        relation = source.rng.choice(_BANK[f"{kind}_attributes"])
        statement, questions = source.rng.choice(_BANK["attribute_facts"]), _BANK["attribute_questions"]
    else:
        chosen = source.rng.choice(_BANK[f"{kind}_facts"])
        relation, questions = chosen["says"], chosen["asked"]
        statement = relation
    sentence = statement.format(e=entity, v=value, a=relation)
    return Fact(entity, relation, sentence[0].upper() + sentence[1:], source.choose(questions).format(e=entity, a=relation), value)


def _draw_entity(source: Source) -> str:
    if source.chance(0.15):
        return f"the {source.real_word().lower()}"
    return " ".join(source.name() for _ in range(source.rng.choice((1, 1, 2))))


def _draw_value(source: Source) -> str:
    return source.rng.choice((source.name, lambda: source.real_word().lower(), lambda: str(source.rng.randint(0, 9999))))()
