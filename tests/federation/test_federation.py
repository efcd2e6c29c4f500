import pytest
import torch

import hansa
from hansa.federation.tree import Tree
from support import clients, net


def federation(**options: object) -> hansa.Federation:
    training = hansa.Training(lr=0.1, batch_size=3)
    return hansa.Federation(net(), clients(), hansa.FedSelect(rate=0.2), training, **options)  # type: ignore[arg-type]


def test_history_is_one_table_row_per_client_round_and_metric() -> None:
    history = federation().run(3, score_every=2)
    assert history.num_rounds == 3
    assert history.scored("test", "accuracy").keys() == {2, 3}
    assert history.table("ledger").num_rows == 9
    up, down = history.bytes()[1]
    assert up == sum(history.table("ledger")["up"].to_pylist()[:3])
    assert down > 0


def test_summary_reports_the_last_and_the_validation_chosen_round() -> None:
    history = federation().run(4)
    metrics = history.summary()["metrics"]
    means = {
        number: sum(row.values()) / len(row)
        for number, row in history.scored("validation", "accuracy").items()
    }
    best = max(means.values())
    chosen = min(number for number, mean in means.items() if mean == best)
    test = history.scored("test", "accuracy")
    assert metrics["accuracy_chosen"]["round"] == chosen
    assert metrics["accuracy_chosen"]["mean"] == pytest.approx(sum(test[chosen].values()) / 3)
    assert metrics["accuracy"]["mean"] == pytest.approx(sum(test[4].values()) / 3)


def test_a_client_s_model_is_the_one_that_was_scored() -> None:
    ran = federation()
    history = ran.run(3)
    inputs, labels = clients()["c1"].batch("test")
    with torch.no_grad():
        correct = (ran.model_of("c1")(inputs).argmax(1) == labels).float().mean().item()
    assert correct == pytest.approx(history.scored("test", "accuracy")[3]["c1"])


def test_unknown_nodes_and_trees_that_do_not_fit_are_named() -> None:
    with pytest.raises(hansa.InputError, match="'c9'; allowed: one of c0, c1, c2, root"):
        federation().model_of("c9")
    with pytest.raises(hansa.InputError, match="c0, c1, c2"):
        federation(tree=Tree.flat(["x", "c0", "c1", "c2"]).flat(["x"]))


def test_the_worst_tenth_is_the_mean_of_the_worst_clients() -> None:
    from hansa.federation.history import spread

    values = [0.1 * k for k in range(11)]
    assert spread(values)["worst_tenth"] == pytest.approx(0.05)
    assert spread(values, higher_is_better=False)["worst_tenth"] == pytest.approx(0.95)
    assert spread(values)["std"] == pytest.approx((110 / 12) ** 0.5 * 0.1 * (120 / 110) ** 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buffers": "avg"}, "buffers: found 'avg'; allowed: averaged or local"),
        ({"on_failure": "Stop"}, "on_failure: found 'Stop'; allowed: stop or drop"),
    ],
)
def test_options_outside_their_words_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(hansa.InputError, match=message):
        federation(**options)


def test_models_that_do_not_fit_the_data_are_named() -> None:
    small = torch.nn.Linear(4, 2)
    with pytest.raises(hansa.InputError, match="labels of c0: found up to 2; allowed: 0 to 1"):
        hansa.Federation(small, clients(), hansa.FedAvg())
    with pytest.raises(hansa.InputError, match="on c0's data"):
        hansa.Federation(torch.nn.Linear(5, 3), clients(), hansa.FedAvg())
    with pytest.raises(hansa.InputError, match="found no trainable parameters"):
        hansa.Federation(torch.nn.Linear(4, 3).requires_grad_(False), clients(), hansa.FedAvg())
    with pytest.raises(hansa.InputError, match="a method such as FedAvg"):
        hansa.Federation(torch.nn.Linear(4, 3), clients(), hansa.FedAvg)  # type: ignore[arg-type]


def test_a_batch_of_one_under_batchnorm_is_refused_before_the_run() -> None:
    model = net(torch.nn.BatchNorm1d(6))
    with pytest.raises(hansa.InputError, match=r"training.batch_size: found 3, which leaves c0"):
        hansa.Federation(model, clients(), hansa.FedAvg(), hansa.Training(batch_size=3))


def test_a_newcomer_must_be_new_and_have_test_data() -> None:
    data = clients(3)
    federation = hansa.Federation(net(), data, hansa.FedSelect())
    federation.run(2)
    late = clients(4)["c3"]
    found = federation.onboard("late", late)
    assert found.after["accuracy"][1] == late.count("test")
    with pytest.raises(hansa.InputError, match="name: found 'c0'"):
        federation.onboard("c0", late)
    untested = hansa.Client.of(late.batch("train"), test=(torch.zeros(0, 4), torch.zeros(0)))
    with pytest.raises(hansa.InputError, match="client: found no test data"):
        federation.onboard("late", untested)
    odd = hansa.Client.of(
        (torch.zeros(2, 9), torch.zeros(2)), test=(torch.zeros(2, 9), torch.zeros(2))
    )
    with pytest.raises(hansa.InputError, match="on late's data"):
        federation.onboard("late", odd)


def test_newcomers_need_others_before_them_and_a_flat_tree() -> None:
    rules = hansa.Participation(newcomers=3)
    with pytest.raises(hansa.InputError, match=r"participation.newcomers: found 3; allowed: fewer"):
        hansa.Federation(net(), clients(3), hansa.FedAvg(), participation=rules)
    tree = hansa.Tree.grouped(clients(4), 2)
    with pytest.raises(hansa.InputError, match="found a tree of federations"):
        hansa.Federation(net(), clients(4), hansa.FedAvg(), participation=rules, tree=tree)


def test_masks_can_be_read() -> None:
    federation = hansa.Federation(net(), clients(3), hansa.FedSelect(rate=0.5, limit=0.5))
    federation.run(2)
    masks = federation.masks_of("c0")
    assert masks.keys() == dict(net().named_parameters()).keys()
    assert int(masks["body.weight"].sum()) == 12
    assert federation.masks_of("root") == {}
    with pytest.raises(hansa.InputError, match="name: found 'c7'"):
        federation.masks_of("c7")
