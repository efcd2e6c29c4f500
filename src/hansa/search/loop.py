"""One search: ask for a model, find out how good it is, tell."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from hansa.search.recipes import Recipe
from hansa.search.searchers.base import Search
from hansa.search.table import Table
from hansa.search.training import Curves
from hansa.seeding import numpy_generator


@dataclass(frozen=True)
class Answer:
    """What asking for a model gave.

    Attributes:
        model: its number.
        validation: accuracy on validation data in one run, by which it is chosen.
        test: accuracy on test data, by which it is told of; of a table, the mean over seeds.
        seconds: what training took, or by a table would have taken.
    """

    model: int
    validation: float
    test: float
    seconds: float


def pursue(
    search: Search,
    answer: Callable[[int], Answer],
    budget: int,
    watch: Callable[[int], None] = lambda done: None,
) -> list[Answer]:
    """Ask for up to ``budget`` models and return the answers in their order.

    Args:
        search: what chooses the models, and learns from the answers.
        answer: finds out.
        budget: how many at most; fewer where there are no more candidates.
        watch: called with how many are done.
    """
    answers: list[Answer] = []
    while len(answers) < budget and (model := search.ask()) is not None:
        found = answer(model)
        search.tell(model, found.validation)
        answers.append(found)
        watch(len(answers))
    return answers


def looked_up(table: Table, seed: int) -> Callable[[int], Answer]:
    """Return what answers by a table: each model by one of its runs, drawn once."""

    def answer(model: int) -> Answer:
        known = table.seeds_of(model)
        drawn = known[numpy_generator(seed, "answer", model).integers(len(known))]
        return Answer(
            model,
            table.validation_accuracy(model, drawn),
            table.test_accuracy(model),
            table.train_seconds(model, drawn),
        )

    return answer


def answered(model: int, curves: Curves, recipe: Recipe) -> Answer:
    """Return what a run of a recipe says of a model."""
    at = curves.best_epoch
    validation = curves.validation_correct[at] / recipe.validation
    return Answer(model, validation, curves.test_correct[at] / recipe.test, curves.seconds)


def best_of(answers: Iterable[Answer]) -> Answer:
    """Return the answer of the best validation accuracy, the first among equals."""
    return max(answers, key=lambda answer: answer.validation)


def incumbents(answers: Sequence[Answer]) -> list[Answer]:
    """Return the best by validation so far, after each answer."""
    curve: list[Answer] = []
    for answer in answers:
        better = not curve or answer.validation > curve[-1].validation
        curve.append(answer if better else curve[-1])
    return curve
