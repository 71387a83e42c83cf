"""A question with its answer, and the reasoning that each effort takes."""

from dataclasses import dataclass

from models.nano.data.conversation import HIGH, LOW, MEDIUM, Reply


@dataclass(frozen=True)
class Exchange:
    """`brief` is the reasoning at medium effort, `careful` the one at high effort; at low effort there is none, or `quick`."""

    skill: str
    user: str
    final: str
    brief: str
    careful: str
    quick: str = ""

    def reply(self, effort: str) -> Reply:
        return Reply(self.final, {LOW: self.quick, MEDIUM: self.brief, HIGH: self.careful}[effort])
