"""Secrets stay out of logs, results and reports.

Known as secret are values of environment variables and of headers whose names say so, user and
password in a URL, and parameters of a URL that are named like a key. What is known is replaced
wherever it stands, in any text.
"""

import logging
import os
import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any
from urllib.parse import quote, quote_plus, unquote, urlsplit

HIDDEN = "[secret]"
_NAME = re.compile(
    r"(?:^|[^a-z])(?:api ?key|key|token|secret|passw(?:or)?d|pwd|auth|authorization|credential|"
    r"cookie|session ?id|sig|bearer|appid)s?(?:$|[^a-z])",
    re.IGNORECASE,
)
_HEADERS = frozenset(
    ("authorization", "proxy-authorization", "cookie", "set-cookie", "x-api-key", "api-key")
)
_IN_URL = re.compile(r"([?&][^=&#\s\"']+)=([^&#\s\"'<>]+)")
_USER = re.compile(r"(\w+://)[^/\s@\"']+@")
_BEARER = re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9._~+/=-]{6,}", re.IGNORECASE)
_LEAST = 6
"""Characters below which a value is no secret that could be hidden without hiding words."""


@cache
def is_secret_name(name: str) -> bool:
    """Tell whether a variable, header or parameter of this name holds a secret."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)
    return name.lower() in _HEADERS or bool(_NAME.search(f" {spaced.lower()} ".replace("_", " ")))


class Redactor:
    """Takes secrets out of texts.

    Args:
        secrets: values that are known to be secret.
        environment: variables, of which those whose names say so are secret; by default the
            process's own.
    """

    def __init__(
        self, secrets: Iterable[str] = (), environment: Mapping[str, str] | None = None
    ) -> None:
        self._known: set[str] = set()
        self._ordered: list[str] = []
        variables = os.environ if environment is None else environment
        for name, value in variables.items():
            if is_secret_name(name) and not os.path.isabs(value):
                self.learn(value)
        for secret in secrets:
            self.learn(secret)

    def learn(self, secret: str) -> None:
        """Remember a secret, as it is and as a URL writes it."""
        for form in (secret.strip(), quote(secret.strip(), safe=""), quote_plus(secret.strip())):
            if len(form) >= _LEAST:
                self._known.add(form)
        # The longest first, so that none is cut by one that is part of it.
        self._ordered = sorted(self._known, key=len, reverse=True)

    def learn_headers(self, headers: Mapping[str, str]) -> None:
        """Remember the secrets among headers, with and without their scheme."""
        for name, value in headers.items():
            if is_secret_name(name):
                self.learn(value)
                self.learn(value.partition(" ")[2])

    def learn_url(self, url: str) -> None:
        """Remember the secrets in a URL: user, password, and parameters named like a key."""
        try:
            parts = urlsplit(url)
        except ValueError:  # no URL, which others say
            return
        for each in (parts.username, parts.password):
            if each:
                self.learn(unquote(each))
        for name, value in re.findall(r"(?:^|&)([^=&]+)=([^&]*)", parts.query):
            if is_secret_name(unquote(name)):
                self.learn(unquote(value))

    def text(self, text: str) -> str:
        """Return a text without secrets."""
        for secret in self._ordered:
            text = text.replace(secret, HIDDEN)
        if "=" in text:
            text = _IN_URL.sub(_parameter, text)
        if "@" in text:
            text = _USER.sub(rf"\1{HIDDEN}@", text)
        return _BEARER.sub(rf"\1 {HIDDEN}", text) if " " in text else text

    def values(self, values: Any) -> Any:
        """Return JSON values without secrets; what a key named like one holds is hidden whole."""
        if isinstance(values, str):
            return self.text(values)
        if isinstance(values, Mapping):
            return {
                self.text(str(key)): HIDDEN
                if isinstance(value, str) and is_secret_name(str(key))
                else self.values(value)
                for key, value in values.items()
            }
        if isinstance(values, list | tuple):
            return [self.values(value) for value in values]
        return values


class Hide(logging.Filter):
    """A filter of log records that takes secrets out of their messages."""

    def __init__(self, redactor: Redactor) -> None:
        super().__init__()
        self._redactor = redactor

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrite a record; none is dropped."""
        record.msg, record.args = self._redactor.text(record.getMessage()), ()
        if record.exc_info:
            formatted = logging.Formatter().formatException(record.exc_info)
            record.msg += "\n" + self._redactor.text(formatted)
            record.exc_info, record.exc_text = None, None
        return True


def _parameter(match: re.Match[str]) -> str:
    name = match[1][1:]
    return f"{match[1]}={HIDDEN}" if is_secret_name(unquote(name)) else match[0]
