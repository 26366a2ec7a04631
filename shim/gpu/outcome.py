"""A request to the helper, and what came of it for each process."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a call for a process. `error`: why it failed; `lost`: it did not return, and may still be at work.

    `late`: because its time was over, and not because the helper was killed.
    """

    pid: int
    value: int = 0
    seconds: float = 0.0
    error: str = ""
    number: int = 0
    lost: bool = False
    late: bool = False


@dataclass(slots=True, kw_only=True)
class Pending:
    """A request under way: the processes that have not answered, and since when those that ended meanwhile are known to have."""

    request: int
    call: str
    waiting: set[int]
    done: dict[int, Outcome] = field(default_factory=dict)
    ended: dict[int, float] = field(default_factory=dict)
