"""The configuration of a search."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hansa.errors import InputError, options_told
from hansa.search.limits import Limits
from hansa.search.priors import PRIORS, PriorOptions
from hansa.search.proxies import PROXIES
from hansa.search.searchers import SEARCHERS, Searcher
from hansa.search.tables import SMALL


class ClientOptions(BaseModel):
    """Clients whose devices differ: each trains the best model that its own device can run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    limits: dict[str, Limits] = Field(min_length=1)
    """Client -> the most that a model may cost there; what is not set is that of the search."""
    train: str | None = None
    """A configuration of ``hansa train`` that a federation's own is made of, for each model."""


class SearchOptions(BaseModel):
    """What is searched, how, and within which limits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field("search", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """What the folder is called."""
    output: str = "runs"
    """Folder that it is made in."""
    seed: int = Field(0, ge=0, lt=2**63, strict=True)
    """Everything random is derived from it."""
    by: Literal["table", "training"] = "table"
    """Whether a model's accuracy is looked up, or found by training it."""
    table: str | None = None
    """The table that is looked up, or whose latencies and models a training search keeps to:
    ``gratings16-w8``, which comes with Hansa, or a file."""
    recipe: str | None = None
    """How models are trained; by default as those of the table."""
    data: str | None = None
    """Path of the recipe's data, where it brings none."""
    searcher: str = "evolution"
    """One of ``hansa search --help``."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The searcher's own options."""
    budget: int = Field(50, ge=1, strict=True)
    """How many models are asked for."""
    limits: Limits = Limits()
    """The most that a model may cost."""
    prior: str | None = None
    """What the searcher begins with, where it can: a zero-cost proxy, or ``dna``, ``donna``,
    ``lana`` or ``supernet``."""
    priors: PriorOptions = PriorOptions()
    """How the last four are trained."""
    proxies: tuple[str, ...] = ()
    """Zero-cost proxies whose rank correlation with accuracy the report tells."""
    proxy_models: int = Field(40, ge=5, strict=True)
    """How many models of the table that is told of."""
    repeats: int = Field(20, ge=0, strict=True)
    """Searches of other seeds beside it, by the table, which tell how much was luck."""
    train: bool = True
    """Whether the model that was found is trained by its recipe before it is written."""
    clients: ClientOptions | None = None
    """For a federation of unlike devices."""

    @model_validator(mode="after")
    def _fits(self) -> "SearchOptions":
        if self.searcher not in SEARCHERS:
            raise InputError("searcher", repr(self.searcher), ", ".join(SEARCHERS))
        if unknown := [name for name in self.proxies if name not in PROXIES]:
            raise InputError("proxies", repr(unknown[0]), ", ".join(PROXIES))
        if self.prior is not None and self.prior not in (*PROXIES, *PRIORS):
            raise InputError("prior", repr(self.prior), ", ".join((*PROXIES, *PRIORS)))
        try:
            _ = self.chosen
        except ValidationError as error:
            told = options_told(error, self.searcher, SEARCHERS[self.searcher])
            raise InputError("options", "values that do not go together", told) from error
        return self

    @property
    def chosen(self) -> Searcher:
        """The searcher with its options."""
        return SEARCHERS[self.searcher].model_validate(self.options)

    @property
    def table_name(self) -> str | None:
        """The table, if one is used."""
        return self.table or (SMALL if self.by == "table" else None)
