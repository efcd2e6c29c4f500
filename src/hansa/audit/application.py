"""The application under audit: a service that signs, an edit on the way, a defence, a target.

service --response--> (provider's lie) --signed--> (edit on the path) --> defence --> target
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from hansa.audit.cases import Case, answering
from hansa.audit.defences import (
    AllowList,
    CrossField,
    Defence,
    Delimiting,
    Refused,
    Schema,
    Signature,
    Stack,
)
from hansa.audit.domains import DOMAINS, Domain
from hansa.audit.made import FIXTURES, made_cases
from hansa.audit.manipulate import Arm
from hansa.audit.prompts import Prompt
from hansa.audit.signing import Received, new_key, sign
from hansa.audit.sources import Cited, History, SecondSource
from hansa.audit.tamper import encoded
from hansa.audit.targets import MARK, mark

SAMPLES = 60
"""Good responses that a schema is learned from."""
STALE_HOURS = 9.0


class Service:
    """A domain's service with a key of its own, in front of frozen responses."""

    def __init__(self, domain: Domain, signs: bool) -> None:
        self.domain = domain
        self.key = new_key() if signs else None
        self._signed: dict[tuple[str, float], Mapping[str, str]] = {}

    def respond(self, case: Case, document: Any, age: float = 0.0) -> Received:
        """Return what the provider sends: a body with its mark and, where it signs, signature."""
        body = encoded(document)
        received = Received(body, {MARK: mark(body)}, request=case.request)
        if self.key is None:
            return received
        # What was just signed is still as fresh as it has to be.
        known = (mark(body), age)
        if known not in self._signed:
            self._signed[known] = sign(received, self.key, age).headers
        return received.but(headers=self._signed[known])

    def tampered(self, case: Case, arm: Arm, document: Any) -> Received:
        """Return what the application gets after an arm's edits."""
        if arm.where == "provider":
            return self.respond(case, document)
        if arm.action == "stale":  # replayed as it was once sent, signature and all
            replayed = self.respond(case, document, 3600 * STALE_HOURS)
            return replayed.but(headers={**replayed.headers, MARK: mark(encoded(case.document))})
        return self.respond(case, case.document).but(body=encoded(document))


def defence_of(name: str, domain: Domain, service: Service) -> Defence:
    """Return a defence by its name in a configuration, set up for a domain.

    Schemas are learned from other responses than those that are audited, where there are others.
    """
    parts = [_single(part, domain, service) for part in name.split("+")]
    return parts[0] if len(parts) == 1 else Stack(parts)


@dataclass(frozen=True)
class Asking:
    """A response after a defence has looked at it.

    Attributes:
        prompt: what the model is asked, None where the defence refused.
        received: the response as the defence passed it on.
        reason: why it refused.
        seconds: how long the defence took.
    """

    prompt: Prompt | None
    received: Received
    reason: str
    seconds: float


def checked(defence: Defence, question: str, received: Received) -> Asking:
    """Return what a defence makes of a response."""
    start = time.perf_counter()
    reason, prompt, passed = "", None, received
    try:
        passed = defence.check(received)
        prompt = defence.frame(Prompt(question, passed.body.decode()))
    except Refused as refused:
        reason = str(refused)
    return Asking(prompt, passed, reason, time.perf_counter() - start)


def reviewed(defence: Defence, answer: str, asking: Asking) -> tuple[str, str, float]:
    """Return (answer, reason of a refusal, seconds) of a defence's look at an answer."""
    start = time.perf_counter()
    try:
        told, reason = defence.review(answer, asking.received), ""
    except Refused as refused:
        told, reason = "", str(refused)
    return told, reason, time.perf_counter() - start


def _single(name: str, domain: Domain, service: Service) -> Defence:
    paths = answering(domain.cases)

    def by_url(document: Callable[[Case], Any]) -> Callable[[Mapping[str, Any]], Any]:
        known = {(c.request.get("url"), c.request.get("time")): c for c in domain.cases}

        def fetch(request: Mapping[str, Any]) -> Any:
            case = known.get((request.get("url"), request.get("time")))
            return None if case is None else document(case)

        return fetch

    makers: dict[str, Callable[[], Defence]] = {
        "none": Defence,
        "delimiting": Delimiting,
        "schema": lambda: Schema.of(_samples(domain), domain.bounds),
        "cross-field": lambda: CrossField(domain.faults),
        "allow-list": lambda: AllowList(paths),
        "signature": lambda: Signature((service.key or new_key()).public_key()),
        "second-source": lambda: SecondSource(
            by_url(lambda case: case.other_source), paths, domain.drift
        ),
        "history": lambda: History(
            by_url(lambda case: case.last_seen), paths, domain.drift, domain.clock
        ),
        "cited": lambda: Cited(paths),
    }
    return makers[name]()


def _samples(domain: Domain) -> list[Any]:
    if domain.name in DOMAINS:
        return _made(domain.name)
    return [case.document for case in domain.cases]


@cache
def _made(name: str) -> list[Any]:
    return [case.document for case in made_cases(name, SAMPLES, FIXTURES + 1)]
