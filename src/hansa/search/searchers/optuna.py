"""Optuna as a searcher: its samplers, and its storage, by which several machines share a study."""

import os
import platform
from typing import Any, ClassVar, Literal

import numpy as np

from hansa.errors import InputError, first_line
from hansa.search.searchers.base import Search, Searcher
from hansa.search.spaces import Floats, Ints, Space
from hansa.seeding import derive


class Optuna(Searcher):
    """A study of Optuna, in memory or in a storage."""

    name: ClassVar[str] = "optuna"

    sampler: Literal["tpe", "random", "gp"] = "tpe"
    """Which of Optuna's samplers."""
    storage: str | None = None
    """Where the study is kept, such as ``sqlite:///study.db`` or a database that several machines
    reach: all that name it and the study share what they know."""
    study: str = "hansa"
    """The study's name in its storage."""

    def begin(
        self, space: Space, candidates: Ints, seed: int, prior: Floats | None = None
    ) -> Search:
        """Begin a search, or join the study of this name."""
        return _StudySearch(self, space, candidates, seed)


class _StudySearch(Search):
    def __init__(self, options: Optuna, space: Space, candidates: Ints, seed: int) -> None:
        super().__init__(space, candidates, seed)
        try:
            import optuna
        except ImportError as error:
            raise InputError(
                "searcher", "optuna without the library", "pip install hansa[search]"
            ) from error
        self._optuna = optuna
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # Machines that share a study and begin at once must not all try the same.
        whose = f"{platform.node()}:{os.getpid()}" if options.storage else ""
        draws = derive(seed, "optuna", whose) % 2**32
        makers: dict[str, Any] = {
            "tpe": lambda: optuna.samplers.TPESampler(seed=draws),
            "random": lambda: optuna.samplers.RandomSampler(seed=draws),
            "gp": lambda: optuna.samplers.GPSampler(seed=draws),
        }
        try:
            self._study = optuna.create_study(
                storage=options.storage,
                study_name=options.study,
                sampler=makers[options.sampler](),
                direction="maximize",
                load_if_exists=True,
            )
        except Exception as error:  # of the sampler's libraries, or of any database
            found = f"{options.storage or options.sampler} ({first_line(error)})"
            raise InputError("options.storage", found, "a storage of Optuna's") from error
        choices = optuna.distributions.CategoricalDistribution
        self._slots: dict[str, Any] = {
            f"slot{k}": choices(tuple(range(n))) for k, n in enumerate(space.sizes)
        }
        self._trials: dict[int, Any] = {}
        self._seen = 0
        self._take_notice()

    @property
    def shared(self) -> int:
        """How many finished trials the study holds, whoever made them."""
        return len(self._finished())

    def propose(self) -> int:
        """Return what the sampler would try, or where that may not be asked the most alike."""
        self._take_notice()
        trial = self._study.ask(self._slots)
        position = self._position(trial)
        if not self._may_ask(position):
            # Not a bad model but none that may be asked, which a sampler need not learn from.
            wished = np.array([trial.params[name] for name in self._slots])
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
            position = self._most_alike(wished)
            choices = self.space.split(self.candidates[[position]])[0].tolist()
            self._study.enqueue_trial(dict(zip(self._slots, choices, strict=True)))
            trial = self._study.ask(self._slots)
            position = self._position(trial)  # or somebody else's, from the shared queue
        if not self._may_ask(position):
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
            return self.random()
        self._trials[position] = trial
        return position

    def _most_alike(self, choices: Ints) -> int:
        """Return the open candidate that differs in the fewest slots, a random one of equals."""
        open_ = np.flatnonzero(self.is_open)
        alike = (self.space.split(self.candidates[open_]) == choices).sum(1)
        return int(self.rng.choice(open_[alike == alike.max()]))

    def _position(self, trial: Any) -> int:
        """Return where a trial's model stands among the candidates, -1 where it does not."""
        model = self.space.number([trial.params[name] for name in self._slots])
        return int(self.positions(np.array([model]))[0])

    def _may_ask(self, position: int) -> bool:
        return position >= 0 and bool(self.is_open[position])

    def learn(self, position: int, score: float) -> None:
        """Tell the study."""
        if (trial := self._trials.pop(position, None)) is not None:
            self._study.tell(trial, score)
            self._seen += 1

    def _take_notice(self) -> None:
        """Learn what others that share the study have found."""
        finished = self._finished()
        if len(finished) == self._seen:
            return
        for trial in finished:
            if any(name not in trial.params for name in self._slots):
                found = "a study of another space"
                raise InputError("options.study", found, "a new name")
            position = self._position(trial)
            if position >= 0 and position not in self._trials:
                self.tell(int(self.candidates[position]), trial.value)
        self._seen = len(finished)

    def _finished(self) -> list[Any]:
        complete = (self._optuna.trial.TrialState.COMPLETE,)
        return list(self._study.get_trials(deepcopy=False, states=complete))
