"""Every edit touches the paths that it names, and nothing else, and can be undone."""

import json
import math
from datetime import date

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hansa.audit.domains import DOMAINS, domain, read_cases
from hansa.audit.made import MAKERS, write_fixtures
from hansa.audit.manipulate import Arm, all_arms
from hansa.audit.paths import differing, leaves, look, parse, written
from hansa.audit.plan import read_plan
from hansa.audit.tamper import (
    MISSING,
    Edit,
    add,
    delete,
    encoded,
    put,
    restored,
    splice,
    tampered,
)
from hansa.errors import InputError

ARMS = all_arms((0.0, 0.5, 1.0))
DOCUMENT = {"a": {"b": 1.5, "c.d": "red wine"}, "list": [1, {"x": None}, True]}


@pytest.mark.parametrize("name", DOMAINS)
@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_an_edit_changes_its_paths_alone_and_is_undone_from_the_log(name, arm) -> None:
    service, num = domain(name), 0
    for case in service.cases:
        made = service.tamper(case, arm)
        if made is None:
            continue
        num += 1
        log = json.loads(json.dumps([edit.as_json() for edit in made.edits]))
        edits = [Edit.from_json(entry) for entry in log]
        assert tampered(case.document, edits) == made.document != case.document
        # Equal as bytes: the order of keys, too, is that of before.
        assert encoded(restored(made.document, edits)) == encoded(case.document)
        declared = {edit.path for edit in edits}
        for path in differing(case.document, made.document):
            assert any(path == d[: len(path)] or d == path[: len(d)] for d in declared), path
        allowed = {field.path for field in (*case.fields, *case.linked)}
        if arm.action in ("value", "single", "unit") and arm.operator != "insertion":
            assert declared <= allowed
        assert {edit.operator for edit in edits} == {arm.operator}
    assert num == {"substitution unit": 35 if name == "weather" else 0}.get(arm.name, 48)


def test_fixtures_are_what_their_generator_writes(tmp_path) -> None:
    write_fixtures(tmp_path)
    for name in MAKERS:
        cases = read_cases((tmp_path / f"{name}.json").read_text(), name, name)
        assert cases == domain(name).cases
        assert len(cases) >= 40
        assert not [case.id for case in cases if domain(name).faults(case.document, None)]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_edits_of_any_document_are_undone(data) -> None:
    keys = st.text(min_size=1, max_size=4)
    scalars = st.none() | st.booleans() | st.integers() | st.text(max_size=8)
    inner = st.recursive(
        scalars, lambda x: st.lists(x, max_size=3) | st.dictionaries(keys, x, max_size=3)
    )
    document = data.draw(st.dictionaries(keys, inner, min_size=1, max_size=4))
    now, edits = document, []
    for _ in range(data.draw(st.integers(1, 4))):
        places = [(path, value) for path, value in leaves(now) if path]
        if not places:
            break
        path, value = data.draw(st.sampled_from(places))
        assert parse(written(path)) == path
        kind = data.draw(st.sampled_from(["put", "delete", "add", "splice"]))
        if kind == "splice" and isinstance(value, str):
            edit = splice(now, path, len(value) // 2, "", "new")
        elif kind == "delete":
            edit = delete(now, path)
        elif kind == "add" and "fresh" not in now:
            edit = add(now, ("fresh",), [1, {}], data.draw(st.integers(0, 4)))
        else:
            edit = put(now, path, data.draw(scalars))
        edits.append(edit)
        now = tampered(now, [edit])
    assert encoded(restored(now, edits)) == encoded(document)


def test_edits_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"unknown path 'a\.bb'.*a\.b"):
        look(DOCUMENT, parse("a.bb"))
    with pytest.raises(InputError, match=r"another value at a\.b"):
        tampered(DOCUMENT, [Edit("substitution", ("a", "b"), 2, 3)])
    with pytest.raises(InputError, match="another value"):
        splice(DOCUMENT, ("a", "c.d"), 0, "white", "red")
    with pytest.raises(InputError, match="a path that is free"):
        tampered(DOCUMENT, [Edit("insertion", ("a",), MISSING, 1)])
    with pytest.raises(InputError, match="where nothing can be added"):
        add(DOCUMENT, ("a", "b"), 1)
    for text in ("", "a..b", "a[", 'x["', 3):
        with pytest.raises(InputError, match="path such as"):
            parse(text)  # type: ignore[arg-type]


def test_false_values_go_from_plausible_to_absurd() -> None:
    weather = domain("weather")
    case = next(c for c in weather.cases if c.truth.unit == "c")
    away = []
    for strength in (0.0, 0.25, 0.5, 0.75, 1.0):
        made = weather.tamper(case, Arm("substitution", strength=strength))
        away.append(abs(made.false.value - case.truth.value))
    assert away == sorted(away)
    assert away[0] == pytest.approx(2.0)
    assert away[-1] == pytest.approx(200.0)
    made = weather.tamper(case, Arm("substitution", strength=0.25))
    current = made.document["current"]
    assert current["temp_f"] == pytest.approx(current["temp_c"] * 1.8 + 32, abs=0.2)
    single = weather.tamper(case, Arm("substitution", "single"))
    assert not weather.faults(case.document, None)
    assert not weather.faults(made.document, None)
    assert weather.faults(single.document, None)


PLAN = """
seed = 3
[[tamper]]
action = "shift"
path = "current.temp_c"
unit = "c"
by = 7
follow = { "current.temp_f" = "f" }
[[tamper]]
action = "add"
path = "note"
value = "all is well"
route = "/v1/*"
[[tamper]]
action = "swap"
path = "text"
label = "DATE"
"""
RESPONSE = {"current": {"temp_c": 12.0, "temp_f": 53.6}, "text": "Closed in May 1931, May 1931."}


def test_a_plan_of_a_file_is_applied(tmp_path) -> None:
    (tmp_path / "plan.toml").write_text(PLAN)
    plan = read_plan(tmp_path / "plan.toml")
    plan.check(RESPONSE)
    made = plan.apply(RESPONSE, route="/v1/now")
    assert made.document["current"] == {"temp_c": 19.0, "temp_f": 66.2}
    assert made.document["note"] == "all is well"
    assert "May 1931" not in made.document["text"]
    assert restored(made.document, made.edits) == RESPONSE
    assert made == plan.apply(RESPONSE, route="/v1/now")
    assert "note" not in plan.apply(RESPONSE, route="/v2/now").document
    assert plan.touches("/v2/now")


@pytest.mark.parametrize(
    ("rule", "match"),
    [
        ({"action": "shout", "path": "a"}, "action"),
        ({"action": "set", "path": "a"}, "value: found nothing"),
        ({"action": "set", "path": "a..", "value": 1}, "path"),
        ({"action": "shift", "path": "a", "strength": 2}, "strength"),
        ({"action": "shift", "path": "a", "unit": "stone"}, "unit"),
        ({"action": "unit", "path": "a", "unit": "%"}, "unit"),
        ({"action": "swap", "path": "a", "label": "CAT"}, "label"),
        ({"action": "delete", "path": "a", "colour": 1}, "an unknown key"),
        ({"action": "shift", "path": "a", "by": "much"}, "by"),
        ({"action": "shift", "path": "a", "follow": {"b": "f"}}, "unit"),
        ({"action": "shift", "path": "a", "by": math.nan}, "by"),
        ({"action": "scale", "path": "a", "by": math.inf}, "by"),
        ({"action": "truncate", "path": "a", "keep": -3}, "keep"),
        ({"action": "set", "path": "a", "value": date(1931, 5, 12)}, "in quotes"),
        ({"action": "set", "path": "a", "value": math.nan}, "a value of JSON"),
        ("delete a", "a table"),
    ],
)
def test_wrong_plans_are_refused(rule, match) -> None:
    with pytest.raises(InputError, match=match):
        read_plan({"tamper": [rule]})


def test_a_plan_for_another_document_is_refused(tmp_path) -> None:
    plan = read_plan({"tamper": [{"action": "delete", "path": "current.temp"}]})
    with pytest.raises(InputError, match=r"unknown path 'current\.temp'.*current\.temp_c"):
        plan.check(RESPONSE)
    with pytest.raises(InputError, match="unknown path"):
        plan.apply(RESPONSE)
    with pytest.raises(InputError, match=r"plan\.tamper"):
        read_plan({"seed": 1})
    (tmp_path / "broken.toml").write_text("[[tamper")
    with pytest.raises(InputError, match="unreadable"):
        read_plan(tmp_path / "broken.toml")
    plan = read_plan({"tamper": [{"action": "swap", "path": "text", "old": "June"}]})
    with pytest.raises(InputError, match="'June' in the text"):
        plan.apply(RESPONSE)
    plan = read_plan({"tamper": [{"action": "shift", "path": "text"}]})
    with pytest.raises(InputError, match="a number"):
        plan.apply(RESPONSE)
    deep: list = []
    for _ in range(900):
        deep = [deep]
    for document in ({"text": math.inf}, {"text": math.nan}, {"text": 1, "deep": deep}):
        with pytest.raises(InputError, match="without end, or too deep"):
            plan.apply(document)


def test_fixtures_that_are_no_json_are_refused() -> None:
    with pytest.raises(InputError, match=r"weather\.json: found no JSON"):
        read_cases("[{", "weather", "weather.json")
    with pytest.raises(InputError, match=r"weather\.json\[0\]\.answer"):
        read_cases('[{"question": "?", "response": {}}]', "weather", "weather.json")
    entry = domain("weather").cases[0].as_json()
    entry["fields"][0]["path"] = "current.temp"
    with pytest.raises(InputError, match="unknown path"):
        read_cases(json.dumps([entry]), "weather", "weather.json")
    with pytest.raises(InputError, match="recorded:PATH"):
        domain("sport")
    with pytest.raises(InputError, match=r"nowhere\.jsonl"):
        domain("recorded:nowhere.jsonl")
