"""Cases of the made-up world, and a model that reads them."""

import json

import pytest

from hansa.audit.domains import domain
from hansa.audit.manipulate import Arm
from hansa.audit.tamper import encoded
from hansa.auditing import audit
from hansa.data.made_examples import ATTRIBUTES, make
from hansa.errors import InputError


def test_cases_are_what_a_reading_model_was_trained_on() -> None:
    held = domain("made:lab?num=12&seed=3")
    assert (held.name, len(held.cases)) == ("lab", 12)
    for case, one in zip(held.cases, make("lab", 12, 3, "records", "read"), strict=True):
        assert f"{case.question}\n{encoded(case.document).decode()}" == one.question
        assert case.truth.value == one.answer
        assert case.older != case.document
        assert case.last_seen == case.other_source == case.document
    assert len({case.request["url"] for case in held.cases}) == 12


def test_false_values_are_other_attributes() -> None:
    held = domain("made:policy?num=20")
    for case in held.cases:
        made = held.tamper(case, Arm("substitution"), seed=1)
        assert made is not None
        assert made.false is not None
        assert made.false.value in set(ATTRIBUTES["policy"]) - {case.truth.value}
        assert made.document["status"] == made.false.value


def test_an_audit_of_them_is_calibrated(tmp_path) -> None:
    made = audit(
        {
            "output": str(tmp_path),
            "domains": ["made:drug?num=40", "made:lab?num=40"],
            "defences": ["schema", "second-source", "history"],
            "target": {"kind": "trusting"},
        }
    )
    assert made.summary["calibration"]["holds"]
    assert made.summary["verdict"] == "informative"
    assert made.summary["clean_accuracy_by_domain"] == {"drug": 1.0, "lab": 1.0}
    arms = made.summary["defences"]["second-source"]["arms"]
    assert arms["substitution 0.25"]["adopted"] == 0.0
    lines = (tmp_path / "audit" / "results.jsonl").read_text().splitlines()
    assert {json.loads(line)["domain"] for line in lines} == {"drug", "lab"}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("made:", "'made:'"),
        ("made:law", "'made:law'"),
        ("made:all", "'made:all'"),
        ("made:lab?size=3", "size=3"),
        ("made:lab?num=0", "num=0"),
        ("made:lab?seed=x", "seed=x"),
        ("mode:lab", "'mode:lab'"),
    ],
)
def test_a_wrong_name_is_refused(name: str, found: str) -> None:
    with pytest.raises(InputError, match="domains") as error:
        domain(name)
    assert found in str(error.value)
