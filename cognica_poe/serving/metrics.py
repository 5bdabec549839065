"""Counts of a running server in Prometheus' form."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from cognica_poe.serving.answers import Answer, Piece
from cognica_poe.serving.batching import Scheduler

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics")


class Metrics:
    """What is counted; every server has numbers of its own."""

    def __init__(self, scheduler: Scheduler):
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("poe_requests", "Requests by path and status.", ["path", "status"], registry=registry)
        self.prompt = Counter("poe_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.tokens = Counter("poe_new_tokens", "Tokens generated.", registry=registry)
        self.proposed = Counter("poe_proposed_drafts", "Drafts proposed.", registry=registry)
        self.accepted = Counter("poe_accepted_drafts", "Drafts accepted.", registry=registry)
        self.first = Histogram("poe_first_token_seconds", "Time to the first token.", registry=registry)
        rows = Gauge("poe_rows_in_use", "Rows that decode.", registry=registry)
        rows.set_function(lambda: scheduler.in_use)
        waiting = Gauge("poe_requests_waiting", "Answers that wait for a row.", registry=registry)
        waiting.set_function(scheduler.waiting.qsize)

    def answered(self, path: str, status: int) -> None:
        """A request was answered; paths that are not served count together."""
        self.requests.labels(path if path in PATHS else "other", str(status)).inc()

    def watch(self, answers: Sequence[Answer]) -> Callable[[int, Piece], None]:
        """A function to be told of the pieces of these answers, which were submitted now."""
        began, seen = time.perf_counter(), set()
        self.prompt.inc(sum(answer.request.lengths[0] for answer in answers))

        def note(number: int, piece: Piece) -> None:
            self.tokens.inc(len(piece.tokens))
            self.proposed.inc(piece.facts.get("proposed", 0))
            self.accepted.inc(piece.facts.get("accepted", 0))
            if number not in seen:
                seen.add(number)
                self.first.observe(time.perf_counter() - began)

        return note

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        return generate_latest(self.registry)
