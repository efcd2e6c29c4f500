"""Language models in a deployment: the tree that ``[nodes]`` writes out, and what each party knows.

Every leaf of the tree is a client's party, every inner node a federation's; where an inner node
has text of its own, its server trains on it. Sources of text and rules stand in the folder of the
party that they belong to, and nowhere else.
"""

from collections.abc import Mapping

from hansa.config import NodeOptions, RunConfig
from hansa.data.text import read_text
from hansa.data.tokenizer import ByteTokenizer, Tokenizer, train_bpe
from hansa.deploy.holding import check_rules
from hansa.errors import InputError
from hansa.federation.rules import Rules, inherited
from hansa.federation.tree import ROOT, Tree, name_of
from hansa.models import Architecture, resolved

_HELD = "held by its party"


def texts_of(config: RunConfig, tree: Tree) -> dict[str, str]:
    """Return path -> source of the node's text, of the nodes that have some."""
    return {
        tree.path_of(name): node.text
        for name, node in config.nodes.items()
        if node.text is not None
    }


def rules_of(config: RunConfig, tree: Tree) -> dict[str, Rules]:
    """Return path -> rules of the node, with what it takes over from those above it.

    Raises:
        InputError: rules that a deployment cannot keep.
    """
    for name, node in config.nodes.items():
        check_rules(node.rules, f"nodes.{name}.")
    return inherited(tree, {name: node.rules for name, node in config.nodes.items()})


def tokenizer_of(config: RunConfig) -> Tokenizer:
    """Return what cuts everybody's text: bytes, or what the root's text was cut into.

    Raises:
        InputError: an encoding is asked for, and the root's text cannot be read here.
    """
    if config.text is None or config.text.tokenizer == "bytes":
        return ByteTokenizer()
    root = config.nodes.get(ROOT)
    if root is None or root.text is None:
        found = "'bpe' and no text at the root, which it is trained on"
        raise InputError("text.tokenizer", found, "'bytes', or text at the root")
    text = read_text(root.text, config.text, "nodes.root.text")
    return train_bpe(text, config.text.vocabulary)


def check_inner(config: RunConfig, texts: Mapping[str, str], path: str) -> None:
    """Refuse text of a federation whose method has no use for it.

    Raises:
        InputError: it has none.
    """
    if path in texts and config.method.inner_training() is None:
        raise InputError(
            f"nodes.{name_of(path)}.text",
            f"text of an inner node with method {config.method.name!r}",
            "text at the leaves alone, or a method such as 'fedavg' or 'worldlm'",
        )


def shared(config: RunConfig, tree: Tree, path: str, classes: int) -> RunConfig:
    """Return a federation's configuration as its members may know it.

    Of the tree it names the federation and its members, without where their texts are and which
    rules they have. A model is described by values that need no file.

    Args:
        config: the whole one.
        tree: the whole tree.
        path: the federation.
        classes: tokens of the vocabulary.
    """
    if config.text is None:
        return config
    name, model = name_of(path), config.model
    nodes = {name_of(c): NodeOptions(parent=name, text=_HELD) for c in tree.children(path)}
    if path != ROOT:
        nodes[name] = NodeOptions()
    known = Architecture(
        name=model.name, options=model.options, shape=(config.text.context,), classes=classes
    )
    model = model.model_copy(update={"options": resolved(known).options})
    return config.model_copy(update={"nodes": nodes, "model": model})
