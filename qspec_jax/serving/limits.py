"""What a server takes from its clients: no more than it can hold, and none longer than it can wait."""

from __future__ import annotations

import dataclasses

MAX_CHOICES = 128  # answers of one request
MAX_STOPS, MAX_STOP_LENGTH = 16, 256  # stop strings, and characters of each: all text is searched for them


@dataclasses.dataclass(frozen=True)
class Limits:
    """See the module.

    Attributes:
        max_waiting: answers that wait for a row; more are refused until there is room.
        max_body: bytes of a request.
        max_prompt_tokens: of a prompt; None for as many as a row holds.
        max_new_tokens: of an answer; None for as many as a row holds.
        request_s: seconds from a request to the end of its answer.
        body_s: seconds until a request has come.
        grace_s: seconds for what runs as the server ends.
    """

    max_waiting: int = 64
    max_body: int = 2**20
    max_prompt_tokens: int | None = None
    max_new_tokens: int | None = None
    request_s: float = 600.0
    body_s: float = 30.0
    grace_s: float = 30.0
