import pytest
import torch
from tiny_world import WORLD, tiny

from hansa.errors import InputError
from hansa.safeguard.measure import score
from hansa.safeguard.rows import Pool, Rows, check_disjoint
from hansa.safeguard.world import World, WorldOptions


def test_parts_of_the_restricted_table_are_disjoint_and_whole():
    parts = [set(part.tolist()) for part in WORLD.parts.values()]
    assert [len(part) for part in parts] == [9, 5, 5, 5]  # rounded shares of 24
    assert sorted(e for part in parts for e in part) == list(range(24))


def test_a_fact_is_the_same_wherever_it_stands():
    entities = torch.tensor([[3, 5, 3]])
    relations = torch.tensor([[1, 0, 1]])
    row = WORLD.rows("restricted", entities, relations).tokens[0]
    assert row[:2].tolist() == [0, 3]
    assert torch.equal(row[2:6], row[10:14])
    assert not torch.equal(row[2:6], row[6:10])
    neutral = WORLD.rows("restricted", entities, relations, "neutral").tokens[0]
    assert neutral[1] == 4
    assert torch.equal(row[2:], neutral[2:])


def test_every_fact_is_asked_for_once():
    for topic, num in (("retained", 24), ("restricted", 5), ("attacker", 5)):
        questions = WORLD.questions()[topic]
        asked = questions.places >= 0
        assert int(asked.sum()) == num * 2
        at = questions.places.clamp(min=0)
        rows = questions.rows.tokens
        pairs = torch.stack([rows.gather(1, (at - 1).clamp(min=0)), rows.gather(1, at)], -1)[asked]
        assert len({tuple(pair.tolist()) for pair in pairs}) == num * 2
        answers = questions.candidates.gather(-1, questions.answers.unsqueeze(-1)).squeeze(-1)
        assert torch.equal(rows.gather(1, at + 1)[asked], answers[asked])


class _Oracle(torch.nn.Module):
    """Says the next token of the row itself, and where it is asked to the worst."""

    def __init__(self, wrong=0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.wrong = wrong

    def forward(self, input_ids, attention_mask):
        following = input_ids.roll(-1, 1)
        logits = torch.nn.functional.one_hot(following, WORLD.vocabulary).float()
        logits[..., self.wrong] += 2.0  # likelier than all, and no candidate
        return type("Output", (), {"logits": logits})


def test_scores_tell_choices_from_what_is_said():
    questions = WORLD.questions()["restricted"]
    found = score(_Oracle(), questions)
    assert (found.choice, found.said, found.count) == (1.0, 0.0, 10)


def test_a_model_that_knows_nothing_is_right_by_chance():
    found = score(tiny(), WORLD.questions()["retained"])
    assert 0.05 < found.choice < 0.5  # 1 in 4
    assert found.said < 0.2


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_broken_model_knows_nothing(value):
    class Broken(_Oracle):
        def forward(self, input_ids, attention_mask):
            logits = torch.full((*input_ids.shape, WORLD.vocabulary), value)
            return type("Output", (), {"logits": logits})

    found = score(Broken(), WORLD.questions()["restricted"])
    assert (found.choice, found.said) == (0.0, 0.0)


def test_candidates_that_are_not_there_are_never_chosen():
    questions = WORLD.questions()["restricted"]
    fewer = questions.candidates.clone()
    fewer[..., 1:] = -1  # one candidate is left, right where the answer is the first
    kept = type(questions)(questions.rows, questions.places, fewer, questions.answers * 0)
    assert score(_Oracle(), kept).choice == 1.0


def test_draws_are_of_their_generator():
    source = WORLD.source("attacker")
    first, again = (source.draw(5, torch.Generator().manual_seed(2)).tokens for _ in "ab")
    assert torch.equal(first, again)
    other = source.draw(5, torch.Generator().manual_seed(3)).tokens
    assert not torch.equal(first, other)


def test_texts_that_parts_share_are_refused():
    rows = Rows.padded([([1, 2, 3], 0), ([4, 5], 0)], 4)
    other = Rows.padded([([4, 5], 0)], 6)  # the same text in a wider row
    with pytest.raises(InputError, match="1 texts that adversary and evaluation share"):
        check_disjoint({"adversary": rows, "evaluation": other})
    check_disjoint({"adversary": rows, "evaluation": Rows.padded([([4, 5, 6], 0)], 4)})


def test_pools_draw_their_rows():
    rows = Rows.whole(torch.arange(6).view(3, 2))
    drawn = Pool(rows).draw(50, torch.Generator().manual_seed(0))
    assert {tuple(row.tolist()) for row in drawn.tokens} == {(0, 1), (2, 3), (4, 5)}


def test_clients_hold_parts_of_what_the_defender_has():
    world = World(WORLD.options.model_copy(update={"clients": 2}))
    first = world._first_entity + world.options.entities
    seen = []
    for client in world.clients().values():
        for split, part in (("train", "adversary"), ("validation", "held_out")):
            entities = {int(t) - first for t in client.batch(split)[0].flatten() if t >= first}
            assert entities <= set(world.parts[part].tolist())
            seen.append(entities)
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[3]
    with pytest.raises(InputError, match=r"data\.clients.*at most 5"):
        World(WORLD.options.model_copy(update={"clients": 6})).clients()


@pytest.mark.parametrize("shares", [(0.5, 0.5, 0.0), (0.9, 0.05, 0.05)])
def test_worlds_without_a_part_are_refused(shares):
    with pytest.raises(ValueError, match="shares"):
        WorldOptions(entities=16, shares=shares)
