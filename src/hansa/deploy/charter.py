"""What all members of one federation share: configuration, shape of the data, who is part of it.

It lies in the Flower app that the federation's server hands to its nodes, so it holds nothing that
only one of them should know.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tomli_w

from hansa.config import RunConfig, load, read
from hansa.errors import InputError
from hansa.federation.node import Setup
from hansa.federation.tree import ROOT, Tree, name_of
from hansa.models import Architecture, build
from hansa.models.task import Task

FILE = "federation.toml"


@dataclass(frozen=True)
class Charter:
    """One federation of a deployment.

    Attributes:
        config: the configuration of its run.
        path: its place in the tree; ``root`` for the uppermost one.
        children: the paths of its members, clients and federations.
        clients: those of them that are clients.
        shape: shape of one input.
        classes: names of the classes, in the order of the model's logits.
        depth: steps from here to the deepest client.
    """

    config: RunConfig
    path: str
    children: tuple[str, ...]
    clients: tuple[str, ...]
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    depth: int

    @cached_property
    def architecture(self) -> Architecture:
        """What the model is built from."""
        model = self.config.model
        return Architecture(
            name=model.name, options=model.options, shape=self.shape, classes=len(self.classes)
        )

    @cached_property
    def setup(self) -> Setup:
        """What is the same at every node of the federation.

        Raises:
            InputError: the model or the method does not fit.
        """
        model = build(self.architecture, self.config.seed)
        config = self.config
        task = config.method.adapted(Task(model), config.training)
        setup = Setup(task, config.training, config.model.buffers, config.seed)
        config.method.check(setup, self.depth)
        return setup

    @property
    def tree(self) -> Tree:
        """The tree as the federation sees it: itself, what stands above, and its members."""
        parents: dict[str, str] = {}
        for path in (*self.children, self.path):
            names = path.split("/")
            parents |= dict(zip(names[1:], names, strict=False))
        return Tree(parents)

    def write(self, path: Path) -> None:
        """Write it as TOML that a person can read."""
        about = {
            "path": self.path,
            "children": list(self.children),
            "clients": list(self.clients),
            "shape": list(self.shape),
            "classes": list(self.classes),
            "depth": self.depth,
        }
        path.write_text(tomli_w.dumps({**self.config.as_dict(), "federation": about}))

    @classmethod
    def read(cls, path: Path) -> "Charter":
        """Read one.

        Raises:
            InputError: it is none.
        """
        values = read(path)
        about: Mapping[str, Any] = values.pop("federation", {})
        try:
            return cls(
                config=load(values),
                path=str(about["path"]),
                children=tuple(map(str, about["children"])),
                clients=tuple(map(str, about["clients"])),
                shape=tuple(map(int, about["shape"])),
                classes=tuple(map(str, about["classes"])),
                depth=int(about["depth"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                str(path), f"no federation ({error})", "what `deploy init` wrote"
            ) from error

    @property
    def name(self) -> str:
        """What people call it."""
        return self.config.name if self.path == ROOT else name_of(self.path)
