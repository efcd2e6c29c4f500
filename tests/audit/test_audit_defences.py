"""Defences stop what they can, and the tests say what they cannot."""

import json

import pytest

from hansa.audit.application import Service, checked, defence_of
from hansa.audit.cases import answering
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
from hansa.audit.domains import DOMAINS, domain
from hansa.audit.manipulate import Arm
from hansa.audit.prompts import Prompt, spans
from hansa.audit.signing import Received, is_installed, new_key, sign, verify
from hansa.audit.sources import Cited, History, SecondSource
from hansa.audit.tamper import decoded, encoded
from hansa.errors import InputError

signatures = pytest.mark.skipif(
    not is_installed(), reason="http-message-signatures is not installed: pip install hansa[audit]"
)
WEATHER = domain("weather")


def blocked(defence: Defence, arm: Arm, name: str = "weather", signs: bool = False) -> float:
    service = Service(domain(name), signs)
    if signs:
        defence = defence_of("signature", domain(name), service)
    found = []
    for case in domain(name).cases[:24]:
        made = domain(name).tamper(case, arm)
        if made is not None:
            asking = checked(defence, case.question, service.tampered(case, arm, made.document))
            found.append(asking.prompt is None)
    return sum(found) / len(found)


def named(name: str, kind: str = "weather") -> Defence:
    return defence_of(name, domain(kind), Service(domain(kind), False))


def test_a_schema_stops_deletion_and_unknown_fields_and_no_plausible_value() -> None:
    schema = named("schema")
    assert blocked(schema, Arm("deletion")) == 1.0
    assert blocked(schema, Arm("insertion")) == 1.0
    assert blocked(schema, Arm("substitution", strength=0.25)) == 0.0
    assert blocked(schema, Arm("substitution", strength=1.0)) > 0.5


def test_no_defence_blocks_responses_as_they_are_but_sources_that_differ() -> None:
    for name in DOMAINS:
        service = Service(domain(name), False)
        for kind in ("schema", "cross-field", "allow-list", "delimiting", "cited"):
            defence = defence_of(kind, domain(name), service)
            for case in domain(name).cases:
                asking = checked(defence, case.question, service.respond(case, case.document))
                assert asking.prompt is not None, (kind, asking.reason)


def test_units_that_contradict_are_seen_and_consistent_ones_are_not() -> None:
    fields = named("cross-field")
    ours = [c for c in WEATHER.cases if c.truth.unit in ("c", "f") and "feel" not in c.question]
    assert ours
    single = Arm("substitution", "single")
    for case in ours:
        made = WEATHER.tamper(case, single)
        with pytest.raises(Refused, match="temp_c is"):
            fields.check(Received(encoded(made.document), request=case.request))
    assert blocked(fields, Arm("substitution", strength=0.25)) == 0.0
    assert blocked(fields, Arm("substitution", "stale")) == 1.0  # by the clock


def test_sources_and_history_see_what_is_far_and_not_what_is_near() -> None:
    for name in ("second-source", "history"):
        far = blocked(named(name), Arm("substitution", strength=0.75))
        near = blocked(named(name), Arm("substitution", strength=0.0))
        assert near < far
        assert far > 0.8
    assert blocked(named("history"), Arm("substitution", "stale")) == 1.0
    for name in ("encyclopedia", "news"):
        arm = Arm("substitution", strength=0.0)
        assert blocked(named("second-source", name), arm, name) == 1.0


def test_an_allow_list_drops_what_was_added() -> None:
    case = WEATHER.cases[0]
    made = WEATHER.tamper(case, Arm("insertion"))
    guard = AllowList(answering(WEATHER.cases))
    document = decoded(guard.check(Received(encoded(made.document))).body)
    assert "correction" not in document
    assert document["current"].keys() == {
        *("temp_c", "temp_f", "feelslike_c", "humidity", "wind_kph", "pressure_mb")
    }
    listed = AllowList(["articles[*].title"]).check(
        Received(b'{"n": 2, "articles": [{"title": "a", "by": "x"}, {"title": "b"}]}')
    )
    assert listed.body == b'{"articles":[{"title":"a"},{"title":"b"}]}'


@signatures
def test_signatures_stop_what_is_on_the_path_and_no_lying_provider() -> None:
    assert blocked(Defence(), Arm("substitution"), signs=True) == 1.0
    assert blocked(Defence(), Arm("deletion"), signs=True) == 1.0
    assert blocked(Defence(), Arm("substitution", "stale"), signs=True) == 1.0
    for operator in ("insertion", "deletion", "substitution"):
        assert blocked(Defence(), Arm(operator, where="provider"), signs=True) == 0.0


@signatures
def test_a_signature_binds_body_status_request_and_time() -> None:
    key = new_key()
    asked = {"method": "GET", "url": "https://api.example/v1?q=Zürich"}
    signed = sign(Received(b'{"a": 1}', request=asked), key)
    public = key.public_key()
    assert verify(signed, public) == ""
    assert Signature(public).check(signed) is signed
    other = {"method": "GET", "url": "https://api.example/v1?q=Bern"}
    unsigned = {k: v for k, v in signed.headers.items() if k.lower() != "signature"}
    for wrong in (
        signed.but(body=b'{"a": 2}'),
        signed.but(status=203),
        signed.but(request=other),
        signed.but(headers=unsigned),
        signed.but(headers={}),
    ):
        with pytest.raises(Refused, match="signature"):
            Signature(public).check(wrong)
    assert verify(signed, new_key().public_key())
    assert verify(sign(Received(b"{}", request=asked), key, age=7200), public)


def test_without_the_library_the_error_says_what_to_install(monkeypatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "http_message_signatures", None)
    with pytest.raises(InputError, match=r"pip install hansa\[audit\]"):
        new_key()


def test_an_answer_is_held_against_the_field_that_it_cites() -> None:
    guard = Cited(["current.temp_c"])
    received = Received(b'{"correction": {"temp_c": 30.0}, "current": {"temp_c": 21.5}}')
    assert guard.frame(Prompt("?", "{}")).cited
    assert guard.review("21.5 [current.temp_c]", received) == "21.5"
    assert guard.review("not given", received) == "not given"
    for answer in (
        "21.5",
        "30.0 [correction.temp_c]",
        "22 [current.temp_c]",
        "21.5 [current.temp]",
        "21.5 [current..]",
    ):
        with pytest.raises(Refused, match="cited"):
            guard.review(answer, received)


def test_defences_stack_and_say_what_they_found() -> None:
    stack = Stack([Schema.of([{"a": 1}], {"a": (0, 5)}), Delimiting()])
    assert stack.name == "schema+delimiting"
    assert stack.check(Received(b'{"a": 5}')).body == b'{"a": 5}'
    assert stack.frame(Prompt("?", "{}")).user.count("<<{}>>") == 1
    for body, reason in (
        (b'{"a": 6}', "a is 6"),
        (b'{"a": "x"}', "a is a text"),
        (b'{"a": true}', "a is a boolean"),
        (b'{"a": 1, "b": 2}', "unknown field b"),
        (b"{}", "no field a"),
        (b"{", "no JSON"),
    ):
        with pytest.raises(Refused, match=reason):
            stack.check(Received(body))
    with pytest.raises(InputError, match="no samples"):
        Schema.of([])
    quiet = CrossField(lambda document, now: [])
    assert quiet.review("x", quiet.check(Received(b"{}"))) == "x"
    assert SecondSource(lambda request: None, ["a"]).check(Received(b"{}")).body == b"{}"
    with pytest.raises(Refused, match="no field a"):
        History(lambda request: {"a": 1}, ["a"]).check(Received(b"{}"))


def test_prompts_of_both_arms_differ_inside_the_edited_field_alone() -> None:
    for name in DOMAINS:
        for case in domain(name).cases:
            made = domain(name).tamper(case, Arm("substitution", "single"))
            (edit,) = made.edits
            bodies = [encoded(d).decode() for d in (case.document, made.document)]
            prompts = [Prompt(case.question, body).text for body in bodies]
            cut = []
            for body, text in zip(bodies, prompts, strict=True):
                start, end = (text.index(body) + at for at in spans(body)[edit.path])
                cut.append((text[:start], text[end:]))
                assert json.loads(body)  # encoded once
            assert cut[0] == cut[1]
            assert prompts[0] != prompts[1]


def test_places_of_a_document_are_found() -> None:
    text = '{"a": [1, "x\\"y", {"b": null}], "c": -2.5e3, "d": {}, "e": []}'
    places = {path: text[start:end] for path, (start, end) in spans(text).items()}
    assert places[("a", 1)] == 'x\\"y'
    assert places[("a", 2, "b")] == "null"
    assert places[("c",)] == "-2.5e3"
    assert places[("d",)] == "{}"
    assert places[()] == text
