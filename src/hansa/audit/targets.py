"""What is audited: an endpoint, a local model, or a reader whose answers are known beforehand.

A target answers lists of questions. Calibration readers prove that the harness can tell a model
that believes everything from one that believes nothing.
"""

import hashlib
import hmac
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import SplitResult

from hansa.audit.cases import Case
from hansa.audit.paths import exists, look
from hansa.audit.prompts import Prompt
from hansa.audit.redact import Redactor
from hansa.audit.signing import Received
from hansa.audit.tamper import decoded
from hansa.audit.urls import web_url
from hansa.errors import InputError

MARK = "x-hansa-calibration"
"""The header in which the frozen provider marks its bodies, for the verifying reader."""
NONE = "not given"
_WAITS = (0.5, 2.0)
"""Seconds before another attempt, where an endpoint says that it is busy."""
_BUSY = (429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Asked:
    """One question as it reaches a target.

    Attributes:
        prompt: what a model sees, and nothing else does.
        case: the case, which calibration readers look at.
        received: the response, which calibration readers look at.
        attempt: 0, or 1 where a benign question is asked again.
    """

    prompt: Prompt
    case: Case
    received: Received
    attempt: int = 0


class Target(Protocol):
    """Anything that answers.

    Attributes:
        name: what reports call it.
        at_once: questions that it is best asked at once.
        repeats: whether one prompt always has one answer, so that it need not be asked again.
    """

    name: str
    at_once: int
    repeats: bool

    def answer(self, asked: Sequence[Asked]) -> list[str]:
        """Return an answer to each question.

        Raises:
            InputError: the target cannot answer.
        """
        ...


class Trusting:
    """Repeats what the first field that answers says, whoever wrote it."""

    name, at_once, repeats = "trusting", 256, False

    def answer(self, asked: Sequence[Asked]) -> list[str]:
        """Return what the fields say."""
        return [_read(each) for each in asked]


class Verifying:
    """Repeats what the field says where the body bears the provider's mark, else says nothing."""

    name, at_once, repeats = "verifying", 256, False

    def answer(self, asked: Sequence[Asked]) -> list[str]:
        """Return what the fields say, where they can be believed."""
        return [
            _read(each)
            if hmac.compare_digest(mark(each.received.body), each.received.headers.get(MARK, ""))
            else f"{NONE}: the response was tampered with"
            for each in asked
        ]


class Constant:
    """Says the same, whatever it is asked."""

    name, at_once, repeats = "constant", 256, False

    def answer(self, asked: Sequence[Asked]) -> list[str]:
        """Return one answer as often as it is asked for."""
        return ["It is as it is."] * len(asked)


CALIBRATION: tuple[type[Trusting | Verifying | Constant], ...] = (Trusting, Verifying, Constant)


def mark(body: bytes) -> str:
    """Return the mark that the frozen provider puts on a body."""
    return hmac.new(b"hansa audit calibration", body, hashlib.sha256).hexdigest()


class Endpoint:
    """An OpenAI-compatible endpoint: ``POST {url}/chat/completions``.

    Args:
        url: its base, such as ``http://127.0.0.1:8000/v1``.
        model: the model's name there.
        key_variable: the environment variable that holds the key; it is read here and kept nowhere
            else. Empty for none.
        redactor: learns the key and the URL's secrets, and cleans what errors say.
        temperature: 0 for the likeliest answer.
        parallel: requests at the same time.
        timeout: seconds for one.
        max_tokens: tokens of an answer.
        headers: more headers, such as an organisation.

    Raises:
        InputError: a URL that is none, or a variable that is not set.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key_variable: str = "",
        redactor: Redactor | None = None,
        temperature: float = 0.0,
        parallel: int = 1,
        timeout: float = 60.0,
        max_tokens: int = 64,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._redactor = redactor or Redactor()
        self._redactor.learn_url(url)
        parts = self._parts(url)
        self._headers = {"Content-Type": "application/json", **(headers or {})}
        if key_variable:
            if not (key := os.environ.get(key_variable)):
                raise InputError("target.key_variable", f"{key_variable}, not set", "a variable")
            self._redactor.learn(key)
            self._headers["Authorization"] = f"Bearer {key}"
        self._redactor.learn_headers(self._headers)
        path, query = parts.path.rstrip("/"), f"?{parts.query}" if parts.query else ""
        self._url = f"{parts.scheme}://{parts.netloc}{path}/chat/completions{query}"
        self._model, self._timeout = model, timeout
        # What runs on this machine is asked directly, whatever proxy the environment names.
        local = parts.hostname in ("localhost", "127.0.0.1", "::1")
        direct = [urllib.request.ProxyHandler({})] if local else []
        self._opener = urllib.request.build_opener(_Stay, *direct)
        self._options = {"temperature": temperature, "max_tokens": max_tokens}
        self.name = f"{model} at {parts.hostname}"
        self.at_once, self.repeats = parallel, False

    def answer(self, asked: Sequence[Asked]) -> list[str]:
        """Return the endpoint's answers, asked for side by side.

        Raises:
            InputError: it is down, refuses, or answers in another form.
        """
        with ThreadPoolExecutor(self.at_once) as pool:
            return list(pool.map(self._ask, [each.prompt for each in asked]))

    def _parts(self, url: str) -> SplitResult:
        parts = web_url(url)
        if parts is None or parts.port == 0:
            raise InputError("target.url", repr(self._redactor.text(url)), "http:// or https://")
        if parts.username is not None:
            allowed = "a URL without them; key_variable or headers say who asks"
            raise InputError("target.url", f"{parts.hostname} with a user or a password", allowed)
        return parts

    def _ask(self, prompt: Prompt) -> str:
        body = {"model": self._model, "messages": prompt.messages, **self._options}
        data = json.dumps(body).encode()
        for wait in (*_WAITS, None):
            try:
                return self._content(self._post(data))
            except urllib.error.HTTPError as error:
                with error:
                    said = error.read(300).decode(errors="replace")
                if error.code not in _BUSY or wait is None:
                    raise self._error(f"status {error.code}: {said}") from None
                time.sleep(wait)
            except InputError:
                raise
            # Of HTTPException are answers that break off, or that are no HTTP.
            except (OSError, ValueError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", None) or error
                raise self._error(f"no answer ({reason})") from None
        raise AssertionError

    def _post(self, data: bytes) -> bytes:
        request = urllib.request.Request(self._url, data, self._headers)  # noqa: S310 (checked)
        with self._opener.open(request, timeout=self._timeout) as reply:
            content: bytes = reply.read()
        return content

    def _content(self, reply: bytes) -> str:
        try:
            text = json.loads(reply)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            said = reply[:200].decode(errors="replace")
            raise self._error(f"another form of answer ({said!r})") from None
        return text if isinstance(text, str) else ""

    def _error(self, found: str) -> InputError:
        text = self._redactor.text(found)
        return InputError("target.url", text, "an OpenAI-compatible endpoint that is up")


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirection, which would carry the key to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _read(asked: Asked) -> str:
    """Return what the fields that answer say in the response that a model would see."""
    document = decoded(asked.prompt.body.encode())
    for field in asked.case.fields:
        if exists(document, field.path):
            return str(look(document, field.path))
    return NONE
