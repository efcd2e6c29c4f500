import math

import torch
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from hansa.safeguard import losses
from hansa.safeguard.rows import Rows

ROWS = Rows.padded([([1, 2, 3, 1], 0), ([2, 2], 1)], 4)


def test_cross_entropy_counts_what_counts():
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    logs = logits.log_softmax(-1)
    # Row 0: tokens 2, 3, 1 after places 0, 1, 2; row 1: its second token alone.
    wanted = -(logs[0, 0, 2] + logs[0, 1, 3] + logs[0, 2, 1] + logs[1, 0, 2]) / 4
    torch.testing.assert_close(losses.next_token(logits, ROWS), wanted)


def test_cross_entropy_leaves_out_questions():
    rows = Rows.padded([([1, 2, 3, 1], 3)], 4)
    logits = torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        losses.next_token(logits, rows), -logits.log_softmax(-1)[0, 2, 1], rtol=1e-6, atol=1e-6
    )


def test_entropy_of_nothing_known_is_the_logarithm_of_the_vocabulary():
    assert losses.entropy(torch.zeros(2, 4, 5), ROWS).item() == torch.tensor(5.0).log().item()


def test_padding_is_left_out_unless_it_is_asked_for():
    logits = torch.zeros(2, 4, 5)
    logits[1, 2:, 0] = 100.0  # sure of one token, where there is only padding
    full = math.log(5)
    assert math.isclose(losses.entropy(logits, ROWS).item(), full, rel_tol=1e-6)
    assert math.isclose(
        losses.entropy(logits, ROWS, with_padding=True).item(), full * 6 / 8, rel_tol=1e-6
    )


def test_drift_is_the_mean_over_states_of_token_norms():
    zero = [torch.zeros(2, 4, 3) for _ in range(2)]
    moved = [torch.zeros(2, 4, 3), torch.zeros(2, 4, 3)]
    moved[1][..., 0], moved[1][..., 1] = 3.0, 4.0  # a norm of 5 at every token of one state
    moved[1][1, 2:] = 100.0  # padding
    assert losses.drift(moved, zero, ROWS).item() == 2.5
    assert losses.drift(zero, zero, ROWS).item() == 0.0
    padded = (6 * 5 + 2 * 100 * 3**0.5) / 8 / 2
    assert math.isclose(losses.drift(moved, zero, ROWS, True).item(), padded, rel_tol=1e-6)


def test_random_mapping_takes_the_absolute_cosine_of_each_tokens_own_direction():
    directions = torch.eye(5)[:, :4]  # token 4 has no direction; it stands nowhere
    tokens = ROWS.tokens
    aligned = directions[tokens]
    flipped = [aligned, -2 * aligned]
    assert abs(losses.random_mapping(flipped, ROWS, directions).item()) < 1e-6
    crossed = [aligned.roll(1, -1)] * 2
    assert losses.random_mapping(crossed, ROWS, directions).item() == 1.0


def test_steering_is_a_mean_square():
    state = torch.full((2, 4, 3), 2.0)
    state[1, 2:] = 50.0
    assert losses.steering(state, torch.zeros(3), ROWS).item() == 4.0


def test_noising_is_least_for_noise():
    rows = Rows.whole(torch.zeros(16, 16, dtype=torch.int64))
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(16, 16, 8, generator=rng)
    near = losses.noising([noise, noise], rows, torch.Generator().manual_seed(1))
    far = losses.noising([noise, noise + 3], rows, torch.Generator().manual_seed(1))
    assert near < 0.02 < 0.5 < far


def test_preference_is_dpos_loss():
    chosen, rejected = torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -1.0])
    reference = torch.tensor([-1.5, -1.0]), torch.tensor([-2.0, -2.0])
    # Margins of log ratios: (0.5 - -1) = 1.5 and (-1 - 1) = -2, times beta.
    wanted = (math.log(1 + math.exp(-0.15)) + math.log(1 + math.exp(0.2))) / 2
    found = losses.preference(chosen, rejected, reference, beta=0.1)
    assert math.isclose(found.item(), wanted, rel_tol=1e-6)


def test_log_likelihood_is_of_the_answers_alone():
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    rows = Rows.padded([([1, 2, 3, 1], 2), ([2, 4], 1)], 4)
    logs = logits.log_softmax(-1)
    wanted = torch.stack([logs[0, 1, 3] + logs[0, 2, 1], logs[1, 0, 4]])
    torch.testing.assert_close(losses.log_likelihood(logits, rows), wanted)


def test_distance_is_that_of_pytorch():
    rng = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 4, 5, generator=rng) for _ in "ab")
    rows = Rows.whole(torch.zeros(2, 4, dtype=torch.int64))
    wanted = F.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), reduction="sum", log_target=True
    )
    torch.testing.assert_close(losses.distance(student, teacher, rows), wanted / 8)


def test_cross_entropy_is_that_of_transformers(tiny_model: LlamaForCausalLM):
    tokens = torch.randint(0, 60, (3, 8), generator=torch.Generator().manual_seed(0))
    rows = Rows.whole(tokens)
    wanted = tiny_model(input_ids=tokens, labels=tokens).loss
    found = losses.run(tiny_model, rows, hidden=True)
    torch.testing.assert_close(losses.next_token(found.logits, rows), wanted)
    assert len(found.hidden) == 3  # the embeddings, and what each of two layers gives
