"""The same rounds by pfl-research: its simulated backend and federated averaging."""

from typing import Any

import torch
import torch.nn.functional as F
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from work import CNN, Clock, Work, main


def run(work: Work, clock: Clock) -> dict[str, torch.Tensor]:
    """Do all rounds."""

    class Net(CNN):
        def loss(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            self.train()
            return F.cross_entropy(self(inputs), labels)

        def metrics(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
            return {}

    class Ticks(TrainingProcessCallback):
        def after_central_iteration(
            self, aggregate_metrics: Any, model: Any, *, central_iteration: int
        ) -> tuple[bool, Metrics]:
            clock.tick()
            return False, Metrics()

    asked = ((number, client) for number, cohort in enumerate(work.cohorts) for client in cohort)
    # It asks for one cohort more than there are rounds.
    asked_and_more = iter([*asked, *((0, client) for client in work.cohorts[0])])

    def dataset(user: tuple[int, int]) -> Dataset:
        number, client = user
        order = work.order(number, client)
        data = (work.images[client, order], work.labels[client, order])
        return Dataset(data, user_id=str(client))

    net = Net(*work._shape)  # type: ignore[arg-type]
    net.load_state_dict(work.initial)
    model = PyTorchModel(
        net,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(net.parameters(), lr=1.0),
    )
    users = FederatedDataset(dataset, lambda: next(asked_and_more))
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=work.rounds,
            evaluation_frequency=10**6,
            train_cohort_size=len(work.cohorts[0]),
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(training_data=users, val_data=users),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=work.lr, local_batch_size=work.batch
        ),
        callbacks=[Ticks()],
        send_metrics_to_platform=False,
    )
    return {name: tensor.detach() for name, tensor in net.state_dict().items()}


if __name__ == "__main__":
    main(run)
