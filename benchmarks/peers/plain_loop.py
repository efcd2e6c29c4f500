"""The textbook loop: one module, one optimizer per visit, one client after another."""

import torch
import torch.nn.functional as F
from work import Clock, Work, main


def run(work: Work, clock: Clock) -> dict[str, torch.Tensor]:
    """Do all rounds."""
    model, common = work.model(), work.initial
    for number, cohort in enumerate(work.cohorts):
        total = {name: torch.zeros_like(p) for name, p in common.items()}
        for client in cohort:
            model.load_state_dict(common)
            optimizer = torch.optim.SGD(model.parameters(), lr=work.lr)
            for batch in work.order(number, client).split(work.batch):
                optimizer.zero_grad()
                logits = model(work.images[client, batch])
                F.cross_entropy(logits, work.labels[client, batch]).backward()
                optimizer.step()
            for name, tensor in model.state_dict().items():
                total[name] += tensor / len(cohort)
        common = total
        clock.tick()
    return common


if __name__ == "__main__":
    main(run)
