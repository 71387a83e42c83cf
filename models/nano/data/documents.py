"""A text in the prompt, and a question that one of its sentences answers."""

from dataclasses import dataclass, replace
from typing import Any

from models.nano.data.banks import read_bank
from models.nano.data.exchange import Exchange
from models.nano.data.source import Source

_BANK = read_bank("documents")
_RELATIONS = ("number_attributes", "word_attributes", "number_facts", "word_facts")
ALIKE_SHARE = 0.4  # of trained texts, which have one relation of each kind, so that only the entity tells their facts apart
UNSHARED_QUESTIONS = 4  # about one text that stands after them, so that it has to be read anew for each
ABSENT = "The text does not say that."


@dataclass(frozen=True)
class Fact:
    entity: str
    relation: str  # an entity has at most one value of it
    key: str  # the word for the relation
    sentence: str
    question: str
    value: str

    def place(self) -> str:
        """What is looked for, then the words that stand there, from the entity on."""
        if self.value == ABSENT:
            return f"{self.key}, {self.entity}: nothing."
        return f"{self.key}, {self.sentence[self.sentence.index(self.entity[1:]) - 1 :]}"


def draw_document(source: Source) -> Exchange:
    return draw_questions(source, 1)[0]


def draw_questions(source: Source, num_questions: int) -> list[Exchange]:
    """About one text, each by itself; fewer where the text has not so many facts."""
    count = source.rng.choice((1, 2, 3, 4) if source.is_short else (1, 2, 3, 4, 5, 6, 8, 10))
    return make_fields(source, min(count, 8), num_questions) if source.chance(0.15) else make_facts(source, count, num_questions)


def make_facts(source: Source, num_facts: int, num_questions: int = 1) -> list[Exchange]:
    """`num_facts` sentences, several about the same entity or of the same relation, with filler between."""
    bank = _pick_relations(source) if not source.is_held_out and source.chance(ALIKE_SHARE) else _BANK
    facts = draw_facts(source, num_facts, bank)
    sentences = [fact.sentence for fact in facts]
    for _ in range(source.rng.randint(0, num_facts // 2)):
        sentences.insert(source.rng.randint(0, len(sentences)), source.rng.choice(_BANK["filler"]))
    document = ("\n" if source.chance(0.3) else " ").join(sentences)
    frame = source.choose(_BANK["frames"])
    if frame.index("{q}") < frame.index("{d}"):
        num_questions = min(num_questions, UNSHARED_QUESTIONS)
    asked = [
        _compose(frame, document, fact.question, fact.place(), fact.value) for fact in source.sample(facts, min(num_questions, num_facts))
    ]
    if source.chance(0.13):
        known = {(fact.entity, fact.relation) for fact in facts}
        absent = _draw_fact(source, source.rng.choice((facts[0].entity, _draw_entity(source))), bank)
        if (absent.entity, absent.relation) not in known:
            absent = replace(absent, value=ABSENT)
            asked[0] = _compose(frame, document, absent.question, absent.place(), ABSENT)
    return asked


def make_fields(source: Source, num_fields: int, num_questions: int) -> list[Exchange]:
    """Lines of `field: value`."""
    fields = {field: _draw_value(source) for field in source.sample(_BANK["fields"], num_fields)}
    mark = source.rng.choice((": ", " = ", " is "))
    lines = {field: f"{field}{mark}{value}" for field, value in fields.items()}
    document = "\n".join(lines.values())
    frame = source.choose(_BANK["frames"])
    asked = source.sample(list(fields), min(num_questions, num_fields))
    questions = [source.choose(_BANK["field_questions"]).format(field) for field in asked]
    return [
        _compose(frame, document, question, f"{lines[field]}.", fields[field]) for field, question in zip(asked, questions, strict=True)
    ]


def _compose(frame: str, document: str, question: str, place: str, value: str) -> Exchange:
    """The reasoning finds the place and says its words again, so that each next word stands beside the last, up to the value."""
    brief, careful = f"I look for {place}", f"The question is about the text. I look there for {place}"
    return Exchange("document", frame.format(d=document, q=question), value, brief, careful, quick=place)


def _pick_relations(source: Source) -> dict[str, Any]:
    return _BANK | {name: source.sample(_BANK[name], 1) for name in _RELATIONS}


def draw_facts(source: Source, count: int, bank: dict[str, Any]) -> list[Fact]:
    """One or two of each entity."""
    entities = [_draw_entity(source) for _ in range(max(1, round(count * source.rng.choice((0.5, 0.75, 1.0)))))]
    facts: dict[tuple[str, str], Fact] = {}
    while len(facts) < count:
        fact = _draw_fact(source, entities[len(facts) % len(entities)], bank)
        facts.setdefault((fact.entity, fact.relation), fact)
    shuffled = list(facts.values())
    source.rng.shuffle(shuffled)
    return shuffled


def _draw_fact(source: Source, entity: str, bank: dict[str, Any]) -> Fact:
    is_number = source.chance(0.5)
    value = str(source.rng.randint(2, 9999)) if is_number else _draw_entity(source) if source.chance(0.1) else source.name()
    kind = "number" if is_number else "word"
    if source.chance(0.6):
        relation = key = source.rng.choice(bank[f"{kind}_attributes"])
        statement, questions = source.rng.choice(bank["attribute_facts"]), bank["attribute_questions"]
    else:
        chosen = source.rng.choice(bank[f"{kind}_facts"])
        relation, key, questions = chosen["says"], chosen["key"], chosen["asked"]
        statement = relation
    sentence = statement.format(e=entity, v=value, a=relation)
    return Fact(entity, relation, key, sentence[0].upper() + sentence[1:], source.choose(questions).format(e=entity, a=relation), value)


def _draw_entity(source: Source) -> str:
    if source.chance(0.15):
        return f"the {source.lower_word()}"
    return " ".join(source.name() for _ in range(source.rng.choice((1, 1, 1, 1, 2))))


def _draw_value(source: Source) -> str:
    return source.rng.choice((source.name, source.lower_word, lambda: str(source.rng.randint(0, 9999))))()
