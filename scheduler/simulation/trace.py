"""Recorded traffic: what a policy needs to know of each request, and nothing that it said. One line of JSON each.

Prompts are kept as their blocks' names, so that equal beginnings stay equal and no token can be read back. An answer is kept as its length;
what a later turn shares with it stands in that turn's own names.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from scheduler.sequence import Request
from scheduler.simulation.outcome import Record
from scheduler.simulation.workload import Answer, Arrival
from scheduler.simulation.workloads import END_TOKEN_ID
from services.prefix_hash import PrefixHasher

BLOCK_SIZE = 16


def trace_line(request: Request, at_s: float, num_completion_tokens: int) -> str:
    line = {
        "at_s": at_s,
        "request_id": request.request_id,
        "tenant": request.tenant,
        "priority": request.priority,
        "num_prompt_tokens": len(request.prompt_token_ids),
        "num_completion_tokens": num_completion_tokens,
        "block_names": [name.hex() for name in request.block_names],
    }
    return json.dumps(line) + "\n"


def write_trace(records: Iterable[Record], path: Path) -> None:
    with path.open("w") as file:
        file.writelines(trace_line(one.request, one.at_s, len(one.token_ids)) for one in records)


def read_trace(path: Path) -> Iterator[Arrival]:
    """The same requests at the same times. Raises ValueError where a line is not of a trace."""
    with path.open() as file:
        for number, line in enumerate(file, 1):
            try:
                yield _arrival(json.loads(line))
            except (KeyError, TypeError, json.JSONDecodeError) as error:
                raise ValueError(f"{path}, line {number} is no recorded request: {error!r}") from None


def _arrival(line: dict[str, object]) -> Arrival:
    names, num_tokens = line["block_names"], line["num_prompt_tokens"]
    if not isinstance(names, list) or not isinstance(num_tokens, int):
        raise TypeError("block_names or num_prompt_tokens")
    prefix = PrefixHasher(b"", BLOCK_SIZE)
    prefix.hashes = [bytes.fromhex(name) for name in names]
    num_answered = max(1, int(str(line["num_completion_tokens"])))
    request = Request(
        request_id=str(line["request_id"]),
        model="recorded",
        prompt_token_ids=range(num_tokens),
        tenant=str(line["tenant"]),
        priority=int(str(line["priority"])),
        prefix=prefix,
        handle=Answer([1] * (num_answered - 1) + [END_TOKEN_ID]),
    )
    return Arrival(float(str(line["at_s"])), request)
