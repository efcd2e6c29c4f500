"""Cases about the made-up world of ``hansa.data.made_examples``, for models that know it.

A question about an entity, and a small table that states its attribute: what a model reads that
was trained on ``made:DOMAIN?form=read``.
"""

import json
from urllib.parse import parse_qsl

from hansa.audit.cases import Case, Field
from hansa.audit.domains import Domain
from hansa.audit.draws import stream
from hansa.audit.matching import Value
from hansa.audit.names import pool
from hansa.audit.tamper import put
from hansa.data.made_examples import ATTRIBUTES, DOMAINS, FIELDS, make
from hansa.data.made_examples import Domain as Kind
from hansa.errors import InputError

_NOW = 1767225600
"""Seconds since 1970 of the first request."""


def records(rest: str) -> Domain:
    """Return the domain that ``DOMAIN?num=48&seed=0`` names.

    Raises:
        InputError: an unknown domain or option, a number that is none.
    """
    name, _, query = rest.partition("?")
    options = {"num": "48", "seed": "0"}
    given = dict(parse_qsl(query, keep_blank_values=True))
    kind = next((kind for kind in DOMAINS if kind == name), None)
    if kind is None or not given.keys() <= options.keys():
        allowed = f"made:DOMAIN?num=48&seed=0, of {', '.join(DOMAINS)}"
        raise InputError("domains", repr(f"made:{rest}"), allowed)
    options |= given
    for key, value in options.items():
        if not value.isdecimal() or len(value) > 6 or int(value) < (key == "num"):
            raise InputError("domains", f"{key}={value}", "a whole number")
    num, seed = int(options["num"]), int(options["seed"])
    names = {**pool(stream(seed, "names", kind)), "text": ATTRIBUTES[kind]}
    read = make(kind, num, seed, "records", "read")
    return Domain(
        kind, [_case(kind, k, seed, one.question) for k, one in enumerate(read)], names=names
    )


def _case(kind: Kind, number: int, seed: int, asked: str) -> Case:
    question, _, body = asked.partition("\n")
    document = json.loads(body)
    entity, attribute = (document[key] for key in FIELDS[kind])
    path = (FIELDS[kind][1],)
    others = [other for other in ATTRIBUTES[kind] if other != attribute]
    earlier = stream(seed, "earlier", kind, number).choice(others)
    return Case(
        id=f"{kind}-{number:03d}",
        domain=kind,
        question=question,
        request={
            "method": "GET",
            "url": f"https://records.example/v1/{kind}/{entity}",
            "time": _NOW + 60 * number,
        },
        document=document,
        fields=(Field(path, "text"),),
        truth=Value("text", attribute),
        earlier=(put(document, path, earlier),),
        earlier_value=Value("text", earlier),
        history=(),
        second=(),
    )
