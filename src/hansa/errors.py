"""The error a user can mend: which key or file, what was found there, what is allowed."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError


class InputError(ValueError):
    """Input that Hansa refuses.

    Attributes:
        key: the configuration key, option or file that holds the input.
        found: what was found there, in words.
        allowed: what may stand there, in words.
    """

    def __init__(self, key: str, found: object, allowed: str) -> None:
        super().__init__(key, found, allowed)
        self.key, self.found, self.allowed = key, found, allowed

    def within(self, key: str) -> "InputError":
        """Return the error as one of the part of a configuration that a key leads to."""
        return InputError(f"{key}.{self.key}", self.found, self.allowed)

    def __str__(self) -> str:
        text = f"{self.key}: found {self.found}; allowed: {self.allowed}"
        return " ".join(text.split())


def first_line(error: Exception) -> str:
    """Return an error's first line, which may stand in a sentence; its kind where it has none."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def options_told(error: "ValidationError", name: str, kind: "type[BaseModel]") -> str:
    """Return in words which options something of a name has, and what is wrong with one of them."""
    wrong = error.errors(include_url=False)[0]
    key = ".".join(map(str, wrong["loc"]))
    known = ", ".join(kind.model_fields) or "none"
    return f"options of {name} ({known}), but {key}: {wrong['msg']}"
