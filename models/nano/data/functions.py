"""The functions that the training text declares: what they are called, how they are described and how people ask for them."""

from dataclasses import dataclass

from models.nano.data.banks import read_bank

NUMBER = "number"  # kinds of a parameter: number, name, word, text


@dataclass(frozen=True)
class Parameter:
    names: tuple[str, ...]
    kind: str
    descriptions: tuple[str, ...]


@dataclass(frozen=True)
class ResultField:
    """One of `words` under one of `keys`; a number where there are no words."""

    keys: tuple[str, ...]
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Function:
    """`topic` names what it is about, `answer` begins what is told of a result. {0} and {1} stand for the arguments."""

    topic: str
    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    requests: tuple[str, ...]
    answer: str
    results: tuple[ResultField, ...]


def _read_functions() -> list[Function]:
    functions = []
    for entry in read_bank("functions")["functions"]:
        parameters = tuple(Parameter(tuple(one["names"]), one["kind"], tuple(one["descriptions"])) for one in entry["parameters"])
        results = tuple(ResultField(tuple(one["keys"]), tuple(one.get("words", ()))) for one in entry["results"])
        texts = {name: tuple(entry[name]) for name in ("names", "descriptions", "requests")}
        functions.append(Function(topic=entry["topic"], answer=entry["answer"], parameters=parameters, results=results, **texts))
    return functions


FUNCTIONS = _read_functions()
