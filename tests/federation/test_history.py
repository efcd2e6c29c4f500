"""The ledger's figure for papers on sparse training, beside the bytes."""

from dataclasses import replace

from hansa.federation.history import History, tables_of
from hansa.federation.wire import csr_size
from support import engine, made, run


def test_the_ledger_holds_both_counts_of_an_upload() -> None:
    federation = engine(made("zerofl"))
    results = run(federation, 2)
    history = History(tables_of(result) for result in results)
    visits = [visit for result in results for visit in result.visits]
    ledger = history.table("ledger")
    assert ledger["csr"].to_pylist() == [visit.csr for visit in visits]
    assert ledger["up"].to_pylist() == [visit.up for visit in visits]
    assert history.summary()["bytes"]["csr"] == sum(visit.csr for visit in visits) > 0


def test_a_dense_upload_counts_whole() -> None:
    federation = engine(made("fedavg"))
    for visit in run(federation, 1)[0].visits:
        assert visit.csr == 4 * sum(p.numel() for p in federation.setup.task.params.values())
    assert csr_size(federation.state()) == visit.csr
    assert all(visit.csr == 0 for visit in run(engine(made("local")), 1)[0].visits)


def test_the_summary_names_who_was_excluded() -> None:
    (result,) = run(engine(made("fedavg")), 1)
    assert "excluded" not in History([tables_of(result)]).summary()
    visits = tuple(
        replace(visit, fate="excluded", up=0) if visit.path == "root/c1" else visit
        for visit in result.visits
    )
    odd = [tables_of(replace(result, number=number, visits=visits)) for number in (1, 2)]
    assert History(odd).summary()["excluded"] == {"c1": 2}
