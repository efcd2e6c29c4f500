import torch

from hansa.processes import SMALL, threads_for


def test_small_models_are_held_to_one_thread_and_others_are_not() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with threads_for(SMALL - 1):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        with threads_for(SMALL):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
