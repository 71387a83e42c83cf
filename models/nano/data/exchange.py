"""A question with its answer, and the reasoning that each effort takes."""

from dataclasses import dataclass

from models.nano.data.conversation import HIGH, MEDIUM, Reply


@dataclass(frozen=True)
class Exchange:
    """`brief` is the reasoning at medium effort, `careful` the one at high effort; at low effort there is none."""

    skill: str
    user: str
    final: str
    brief: str
    careful: str

    def reply(self, effort: str) -> Reply:
        return Reply(self.final, {MEDIUM: self.brief, HIGH: self.careful}.get(effort, ""))
