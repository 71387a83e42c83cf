"""Who calls, what they may do, and what became of one call. Values only: where they come from is in `keys` and `jwt`."""

from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple

INFERENCE, METRICS, ADMIN = "inference", "metrics", "admin"  # an admin may do everything, also in another tenant's name
ROLES = (INFERENCE, METRICS, ADMIN)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a tenant may use; 0: no limit; None: what others may. The day's tokens come back evenly over the day."""

    requests_per_second: float | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None


@dataclass(frozen=True, slots=True)
class Caller:
    """`subject` names the key or the person in the audit log; No tenant: nobody was asked."""

    subject: str
    tenant: str
    roles: frozenset[str]
    limits: Limits = Limits()

    def may(self, role: str) -> bool:
        return role in self.roles or ADMIN in self.roles


class Bucket(NamedTuple):
    """Something that is used up and comes back: `capacity` at most, `rate_per_s` of it each second."""

    kind: str  # requests or tokens
    span: str  # second, minute or day
    capacity: float
    rate_per_s: float


class Standing(NamedTuple):
    """What is left of a bucket after a call took its share."""

    bucket: Bucket
    level: float

    @property
    def reset_s(self) -> float:
        """Until the bucket is full again."""
        return max(0.0, (self.bucket.capacity - self.level) / self.bucket.rate_per_s)


@dataclass(slots=True)
class Admission:
    """One call that was let in. Filled while it runs, read when it ends."""

    caller: Caller
    address: str
    standings: dict[str, Standing] = field(default_factory=dict)  # by kind, of the bucket with the least left
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def owner(self) -> str:
        """Whose limits count."""
        return self.caller.tenant or f"address:{self.address}"

    def note(self, standings: Iterable[Standing]) -> None:
        """Keeps, of each kind, the bucket that is nearest to empty."""
        for one in standings:
            known = self.standings.get(one.bucket.kind)
            if known is None or one.level / one.bucket.capacity < known.level / known.bucket.capacity:
                self.standings[one.bucket.kind] = one

    def headers(self) -> list[tuple[str, str]]:
        """OpenAI's x-ratelimit-* headers."""
        found = []
        for kind, one in self.standings.items():
            found.append((f"x-ratelimit-limit-{kind}", f"{one.bucket.capacity:.0f}"))
            found.append((f"x-ratelimit-remaining-{kind}", f"{max(0, int(one.level))}"))
            found.append((f"x-ratelimit-reset-{kind}", f"{one.reset_s:.3f}s"))
        return found


# The admission of the call that the running task serves; None: nobody is asked who they are.
current_admission: ContextVar[Admission | None] = ContextVar("current_admission", default=None)
