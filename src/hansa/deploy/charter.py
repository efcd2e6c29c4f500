"""What all members of one federation share: configuration, shape of the data, who is part of it.

It lies in the Flower app that the federation's server hands to its nodes, so it holds nothing that
only one of them should know.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import tomli_w

from hansa.config import RunConfig, load, read
from hansa.data.tokenizer import ByteTokenizer, Tokenizer, tokenizer_from_json
from hansa.errors import InputError
from hansa.federation.node import Setup
from hansa.federation.tree import ROOT, Tree, name_of
from hansa.models import Architecture, build, objective_of
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
        classes: names of the classes, in the order of the model's logits; of text, the token
            numbers.
        depth: steps from here to the deepest client.
        tokenizer: of text, what its tokens stand for; nothing where they are bytes.
    """

    config: RunConfig
    path: str
    children: tuple[str, ...]
    clients: tuple[str, ...]
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    depth: int
    tokenizer: str = ""

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
        bytes_of = self.tokens.bytes_of if config.text else None
        task = Task(model, objective_of(self.architecture, bytes_of))
        task = config.method.adapted(task, config.training)
        moments = config.text is not None
        buffers, seed = config.model.buffers, config.seed
        setup = Setup(task, config.training, buffers, seed, moments=moments, robust=config.robust)
        config.method.check(setup, self.depth)
        if config.robust is not None:
            num = len(config.participation.choose(self.children, 0, self.path, 1))
            config.robust.check(num, name_of(self.path))
        return setup

    @cached_property
    def tokens(self) -> Tokenizer:
        """What cuts text into tokens."""
        return _tokens(self.tokenizer)

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
            "depth": self.depth,
            # Those of text are numbers.
            **({"tokenizer": self.tokenizer} if self.config.text else {"classes": self.classes}),
        }
        path.write_text(tomli_w.dumps({**self.config.as_dict(), "federation": about}))

    @classmethod
    def read(cls, path: Path) -> "Charter":
        """Read one.

        Raises:
            InputError: it is none.
        """
        values = read(path)
        about = values.pop("federation", {})
        try:
            config, coded = load(values), str(about.get("tokenizer", ""))
            return cls(
                config=config,
                path=str(about["path"]),
                children=tuple(map(str, about["children"])),
                clients=tuple(map(str, about["clients"])),
                shape=tuple(map(int, about["shape"])),
                classes=token_classes(coded) if config.text else tuple(map(str, about["classes"])),
                depth=int(about["depth"]),
                tokenizer=coded,
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                str(path), f"no federation ({error})", "what `deploy init` wrote"
            ) from error

    @property
    def name(self) -> str:
        """What people call it."""
        return self.config.name if self.path == ROOT else name_of(self.path)


def token_classes(coded: str) -> tuple[str, ...]:
    """Return the classes of text.

    Args:
        coded: what its tokens stand for; nothing where they are bytes.
    """
    return tuple(map(str, range(_tokens(coded).size)))


def _tokens(coded: str) -> Tokenizer:
    return tokenizer_from_json(coded) if coded else ByteTokenizer()
