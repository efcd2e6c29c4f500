import pytest
import torch
from torch import nn

from hansa.safeguard.edits import edit, noised, pruned, quantised
from hansa.safeguard.redteam_options import Edit


def test_rows_are_rounded_to_even_steps_of_their_own() -> None:
    # Three bits: seven steps from -3 to 3; of the first row they are 1, of the second 2.
    weight = torch.tensor([[3.0, 1.4, -0.6, 0.2], [6.0, -3.1, 2.9, 0.9], [0.0, 0.0, 0.0, 0.0]])
    wanted = torch.tensor([[3.0, 1.0, -1.0, 0.0], [6.0, -4.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(quantised(weight, 3), wanted)


def test_the_smallest_entries_go() -> None:
    weight = torch.tensor([[0.5, -0.1], [0.3, -2.0]])
    assert torch.equal(pruned(weight, 0.5), torch.tensor([[0.5, 0.0], [0.0, -2.0]]))
    assert torch.equal(pruned(torch.ones(2, 2), 0.25), torch.tensor([[0.0, 1.0], [1.0, 1.0]]))


def test_noise_is_of_the_weights_own_size() -> None:
    weight = 3 * torch.randn(400, 500, generator=torch.Generator().manual_seed(0))
    noise = noised(weight, 0.1, torch.Generator().manual_seed(1)) - weight
    assert float(noise.std()) == pytest.approx(0.3, rel=0.02)


def test_matrices_are_edited_and_nothing_else() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    model[0].bias.data.fill_(0.123)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    edit(model, Edit(name="p", kind="prune", amount=0.5), torch.Generator())
    changed = {name for name, value in model.state_dict().items() if (value != before[name]).any()}
    assert changed == {"0.weight"}
    assert int((model[0].weight == 0).sum()) == 6


def test_merging_goes_a_share_of_the_way() -> None:
    model, other = nn.Linear(2, 1), nn.Linear(2, 1)
    for parameter, start, end in zip(model.parameters(), (1.0, 2.0), (5.0, 4.0), strict=True):
        parameter.data.fill_(start)
        name = "weight" if parameter.dim() > 1 else "bias"
        getattr(other, name).data.fill_(end)
    how = Edit(name="m", kind="merge", amount=0.25)
    edit(model, how, torch.Generator(), dict(other.named_parameters()))
    assert model.weight.tolist() == [[2.0, 2.0]]
    assert model.bias.tolist() == [2.5]
