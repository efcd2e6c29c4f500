"""A client's answers, and the process that gives them: ``python -m hansa.deploy.member FOLDER``."""

import hashlib
import json
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError

from hansa.data.clients import Client
from hansa.data.federate import DataOptions, federate
from hansa.deploy.charter import Charter
from hansa.deploy.mailbox import Mailbox
from hansa.deploy.options import own_data
from hansa.deploy.party import Party, tell
from hansa.errors import InputError, first_line
from hansa.federation.engines.flower.exchange import Answer
from hansa.federation.engines.flower.site import LeafWorker, Site
from hansa.federation.federation import check_batches, check_model
from hansa.federation.leaf import Leaf
from hansa.federation.tree import name_of


class ClientSite:
    """A client's answers. Its data are read once for each run, as named in the configuration.

    Args:
        charter: the federation it is a member of.
        path: the client.
        folder: where its states lie.
        data: what it holds; its share of the run's data by default.

    Raises:
        InputError: data that cannot be used, or that do not fit the federation's model.
    """

    def __init__(
        self, charter: Charter, path: str, folder: Path, data: DataOptions | None = None
    ) -> None:
        client = _client(charter, path, folder, data)
        leaf = Leaf(charter.config.method, charter.setup, charter.config.seed)
        self.answer = Site(path, folder, LeafWorker(path, client, leaf)).answer


def work(folder: Path) -> None:
    """Answer what comes into a client's mailbox, until the process is ended.

    Args:
        folder: the party's.

    Raises:
        InputError: a party's folder in which something is wrong.
    """
    torch.set_num_threads(1)
    party, mailbox = Party.read(folder), Mailbox(folder / "mailbox")
    data = own_data(party.data, "data.")
    site, held = None, b""
    tell(folder, "worker", state="running", what="nothing asked of it yet")
    for request in mailbox.requests():
        if request is None:
            continue
        tell(folder, "worker", state="running", what=f"{request.kind}, round {request.round}")
        try:
            if site is None or mailbox.charter.read_bytes() != held:
                held = mailbox.charter.read_bytes()
                site = ClientSite(Charter.read(mailbox.charter), party.path, folder / "state", data)
            answer = site.answer(request)
        except Exception as error:  # its parent hears of it, and the next request may do better
            answer = Answer(party.path, request.round, "refused", first_line(error))
        mailbox.reply(request, answer)
        done = "" if answer.status == "ok" else f": {answer.error}"
        what = f"{request.kind} of round {request.round} {answer.status}{done}"
        tell(folder, "worker", state="running", what=what)


def _client(charter: Charter, path: str, folder: Path, data: DataOptions | None) -> Client:
    """Return what a client holds, kept in a file between the processes of one run.

    Raises:
        InputError: data that cannot be used, or that do not fit the federation's model.
    """
    options = charter.config.data if data is None else data
    run = [path, charter.config.name, charter.config.seed]
    about = json.dumps([*run, options.model_dump(mode="json")])
    place = folder / f"data-{hashlib.sha256(about.encode()).hexdigest()[:16]}.safetensors"
    try:
        return Client.load(place)
    except (FileNotFoundError, SafetensorError):
        client = _read(charter, path, options, own=data is not None)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for old in folder.glob("data-*.safetensors"):
        old.unlink()
    client.save(place)
    return client


def _read(charter: Charter, path: str, options: DataOptions, own: bool) -> Client:
    """Read a client's data.

    Raises:
        InputError: data that cannot be used, or that do not fit the federation's model.
    """
    found = federate(options, charter.config.seed)
    if (found.shape, found.classes) != (charter.shape, charter.classes):
        raise InputError(
            f"data of {name_of(path)}",
            f"inputs of shape {found.shape} in the classes {', '.join(found.classes)}",
            f"shape {charter.shape} and the classes {', '.join(charter.classes)}",
        )
    name = next(iter(found.clients)) if own else name_of(path)
    if name not in found.clients or (own and len(found.clients) > 1):
        raise InputError(
            f"data of {name_of(path)}", ", ".join(list(found.clients)[:3]), "the data of one client"
        )
    client = found.clients[name]
    check_model(charter.setup.task.module, {name: client})
    check_batches(charter.setup.task.module, {name: client}, charter.config.training.batch_size)
    return client


if __name__ == "__main__":
    work(Path(sys.argv[1]))
