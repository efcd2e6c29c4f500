"""A client's own model out of its party's folder, where it stays otherwise."""

from pathlib import Path

from hansa import bundle
from hansa.deploy.charter import Charter
from hansa.deploy.mailbox import Mailbox
from hansa.deploy.party import Party
from hansa.errors import InputError
from hansa.federation.store import DiskStore
from hansa.federation.tree import name_of
from hansa.training import write_bundle

_LAST = (1 << 31) - 1  # above any round


def export(folder: Path, out: Path) -> bundle.Bundle:
    """Write the model that a client holds after the last round it took part in, with its masks.

    Args:
        folder: a client's party.
        out: the folder to make.

    Raises:
        InputError: no client's party, one that has not trained, or a method whose clients keep no
            model of their own.
    """
    party = Party.read(folder)
    settings = Mailbox(folder / "mailbox").charter
    runs = sorted((folder / "state").glob("*/states"), key=lambda place: place.stat().st_mtime)
    if party.server is not None or not settings.exists() or not runs:
        raise InputError(str(folder), "nothing trained", "the party of a client that took part")
    charter = Charter.read(settings)
    method = charter.config.method
    state = DiskStore(runs[-1], _LAST, reads_only=True).get(party.path)
    if method.scored != "trained" or not state:
        raise InputError(
            "method.name",
            f"{method.name!r}, whose clients keep no model",
            "a method that personalises; the common model is the bundle in the root's run",
        )
    module = charter.setup.task.materialise(*method.model(charter.setup, state))
    return write_bundle(
        out,
        "personalise",
        module.state_dict(),
        {"client": name_of(party.path), "scored": method.scored},
        config=charter.config,
        architecture=charter.architecture,
        data="held by the party",
        masks=method.masks(charter.setup, state),
        tokenizer=charter.tokens.as_json() if charter.config.text else "",
        labels=charter.classes,
    )
