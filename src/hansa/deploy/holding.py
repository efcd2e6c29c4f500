"""What one party holds and nobody else needs to know: its data or text, and its rules."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hansa.config import explain
from hansa.data.clients import Client
from hansa.data.federate import DataOptions, federate
from hansa.data.text import TextOptions, pack, read_text
from hansa.deploy.charter import Charter
from hansa.deploy.party import Party
from hansa.errors import InputError
from hansa.federation.federation import check_batches, check_model, check_private
from hansa.federation.node import Setup
from hansa.federation.releases import FILE as RELEASES
from hansa.federation.releases import Releases
from hansa.federation.rules import Rules
from hansa.federation.tree import name_of


@dataclass(frozen=True)
class Holding:
    """What a party holds.

    Attributes:
        path: its place in the tree.
        folder: where its states lie.
        data: its images; its share of the run's data where there is none.
        text: source of its text, where a language model is trained; None for no text.
        rules: what holds at it and nowhere else.
    """

    path: str
    folder: Path
    data: DataOptions | None = None
    text: str | None = None
    rules: Rules = field(default_factory=Rules)

    @classmethod
    def of(cls, party: Party, folder: Path) -> "Holding":
        """Return what a party holds.

        Args:
            party: its settings.
            folder: the party's.

        Raises:
            InputError: a key of them is wrong.
        """
        data, rules = own_data(party.data, "data."), own_rules(party.rules, "rules.")
        return cls(party.path, folder / "state", data, party.text, rules)

    def setup(self, charter: Charter) -> Setup:
        """Return what is the same at every node, and what holds here alone.

        Raises:
            InputError: rules of privacy that the party cannot keep.
        """
        setup = ruled(charter, self.path, self.rules, "rules.")
        return replace(setup, releases=self.releases())

    def releases(self) -> Releases | None:
        """Return where a private party counts what it lets out; made where there is nothing yet.

        Raises:
            InputError: it cannot be kept any further; see ``Releases``.
        """
        privacy = self.rules.privacy
        return None if privacy is None else Releases(self.folder / RELEASES, privacy)

    def client(self, charter: Charter) -> Client:
        """Return what the party holds, kept in a file between the processes of one run.

        Raises:
            InputError: data that cannot be used, or that do not fit the federation's model.
        """
        config = charter.config
        options = config.text or self.data or config.data
        of_text = [self.text, charter.tokenizer, config.training.batch_size] if config.text else []
        run = [self.path, config.name, config.seed]
        about = json.dumps([*run, options.model_dump(mode="json"), *of_text])
        digest = hashlib.sha256(about.encode()).hexdigest()[:16]
        place = self.folder / f"data-{digest}.safetensors"
        try:
            return Client.load(place)
        except (FileNotFoundError, ValueError, KeyError):
            client = self._text(charter, config.text) if config.text else self._images(charter)
        task, name = charter.setup.task, name_of(self.path)
        check_model(task.module, {name: client}, task.objective)
        check_batches(task.module, {name: client}, config.training.batch_size)
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for old in self.folder.glob("data-*.safetensors"):
            old.unlink()
        client.save(place)
        return client

    def _text(self, charter: Charter, options: TextOptions) -> Client:
        name = name_of(self.path)
        if self.text is None:
            raise InputError("text", "nothing", f"the text of {name}, which every client needs")
        texts = {name: read_text(self.text, options)}
        size = charter.config.training.batch_size
        return pack(texts, options, charter.tokens, size)[name]

    def _images(self, charter: Charter) -> Client:
        options = self.data or charter.config.data
        found = federate(options, charter.config.seed)
        if (found.shape, found.classes) != (charter.shape, charter.classes):
            raise InputError(
                f"data of {name_of(self.path)}",
                f"inputs of shape {found.shape} in the classes {', '.join(found.classes)}",
                f"shape {charter.shape} and the classes {', '.join(charter.classes)}",
            )
        own = self.data is not None
        name = next(iter(found.clients)) if own else name_of(self.path)
        if name not in found.clients or (own and len(found.clients) > 1):
            raise InputError(
                f"data of {name_of(self.path)}",
                ", ".join(list(found.clients)[:3]),
                "the data of one client",
            )
        return found.clients[name]


def ruled(charter: Charter, path: str, rules: Rules, key: str) -> Setup:
    """Return the setup of a federation in which a node's own rules hold.

    Args:
        charter: the federation in which the node trains.
        path: the node.
        rules: its own.
        key: where they stand, for errors.

    Raises:
        InputError: a model or method that cannot be trained as privately as they want it.
    """
    setup = replace(charter.setup, rules={} if rules == Rules() else {path: rules})
    if setup.at(path).privacy is not None:
        check_private(f"{key}privacy", charter.config.method)
    return setup


def own_data(values: Mapping[str, Any] | None, key: str) -> DataOptions | None:
    """Return a client's own data, nothing where it has none.

    Raises:
        InputError: a key of it is wrong.
    """
    if values is None:
        return None
    try:
        return DataOptions.model_validate({**values, "clients": 1})
    except ValidationError as error:
        raise explain(error, DataOptions, values, key) from error


def own_rules(values: Mapping[str, Any] | None, key: str) -> Rules:
    """Return a node's own rules.

    Raises:
        InputError: a key of them is wrong, or they are none that a deployment can keep.
    """
    try:
        rules = Rules.model_validate(values or {})
    except ValidationError as error:
        raise explain(error, Rules, values or {}, key) from error
    check_rules(rules, key)
    return rules


def check_rules(rules: Rules, key: str) -> None:
    """Refuse rules that a deployment cannot keep.

    Raises:
        InputError: they simulate what is real there.
    """
    asked = rules.participation
    if asked is not None and (asked.failure_rate or asked.deadline is not None):
        raise InputError(
            f"{key}participation",
            "simulated failures or a simulated deadline",
            "neither in a deployment, where both are real; see deploy.deadline",
        )
