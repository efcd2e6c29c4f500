"""Requests that reach their sites in this process: an engine's rounds without Flower between."""

from collections.abc import Callable, Sequence

from hansa.federation.engines.engine import RoundResult
from hansa.federation.engines.flower.exchange import Answer, LostError, Request
from hansa.federation.engines.flower.records import from_records, to_records
from hansa.federation.engines.flower.remote import RemoteEngine
from hansa.federation.engines.flower.site import Site


class Direct:
    """Carries requests to sites in this process, by way of Flower's records and back."""

    name = "direct"

    def __init__(self, sites: dict[str, Site]) -> None:
        self.sites, self.away = sites, set[str]()
        self.spoil: dict[tuple[str, int], Callable[[Answer], Answer]] = {}
        self.requests: list[Request] = []
        self._answers: dict[str, Answer] = {}
        self._lost: dict[str, LostError] = {}

    def present(self, children: Sequence[str]) -> list[str]:
        return [child for child in children if child not in self.away]

    def send(self, request: Request) -> str:
        self.requests.append(request)
        again = from_records(Request, to_records(request))
        answer = from_records(Answer, to_records(self.sites[request.path].answer(again)))
        ticket = str(len(self.requests))
        if request.kind == "train" and (request.path, request.round) in self.spoil:
            try:
                answer = self.spoil[request.path, request.round](answer)
            except LostError as error:
                self._lost[ticket] = error
        self._answers[ticket] = answer
        return ticket

    def take(self, ticket: str, until: float) -> Answer:
        if ticket in self._lost:
            raise self._lost.pop(ticket)
        return self._answers.pop(ticket)


def rounds(engine: RemoteEngine, last: int = 3, first: int = 1) -> list[RoundResult]:
    return [engine.round(number) for number in range(first, last + 1)]


def late(answer: Answer) -> Answer:
    raise LostError("late", "no answer by the deadline")
