"""A client's answers, and the process that gives them: ``python -m hansa.deploy.member FOLDER``."""

import sys
from pathlib import Path

import torch

from hansa.deploy.charter import Charter
from hansa.deploy.holding import Holding
from hansa.deploy.mailbox import Mailbox
from hansa.deploy.party import Party, tell
from hansa.errors import first_line
from hansa.federation.engines.flower.exchange import Answer
from hansa.federation.engines.flower.site import LeafWorker, Site, largest
from hansa.federation.leaf import Leaf


class ClientSite:
    """A client's answers. Its data are read once for each run, as named in the configuration.

    Args:
        charter: the federation it is a member of.
        holding: what it holds.

    Raises:
        InputError: data that cannot be used, or that do not fit the federation's model.
    """

    def __init__(self, charter: Charter, holding: Holding) -> None:
        client, config = holding.client(charter), charter.config
        leaf = Leaf(config.method, holding.setup(charter), config.seed)
        path = holding.path
        worker, most = LeafWorker(path, client, leaf), largest(leaf.setup.task)
        self.answer = Site(path, holding.folder, worker, max_bytes=most).answer


def work(folder: Path) -> None:
    """Answer what comes into a client's mailbox, until the process is ended.

    Args:
        folder: the party's.

    Raises:
        InputError: a party's folder in which something is wrong.
    """
    torch.set_num_threads(1)
    party, mailbox = Party.read(folder), Mailbox(folder / "mailbox")
    holding = Holding.of(party, folder)
    site, held = None, b""
    tell(folder, "worker", state="running", what="nothing asked of it yet")
    for request in mailbox.requests():
        if request is None:
            continue
        tell(folder, "worker", state="running", what=f"{request.kind}, round {request.round}")
        try:
            if site is None or mailbox.charter.read_bytes() != held:
                held = mailbox.charter.read_bytes()
                site = ClientSite(Charter.read(mailbox.charter), holding)
            answer = site.answer(request)
        except Exception as error:  # its parent hears of it, and the next request may do better
            answer = Answer(party.path, request.round, "refused", first_line(error))
        mailbox.reply(request, answer)
        done = "" if answer.status == "ok" else f": {answer.error}"
        what = f"{request.kind} of round {request.round} {answer.status}{done}"
        tell(folder, "worker", state="running", what=what)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
