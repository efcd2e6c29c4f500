"""The data of a safeguard, of either kind, for the model that they are put into."""

from dataclasses import dataclass
from typing import Any

from hansa.data.tokenizer import Tokenizer, tokenizer_from_json
from hansa.errors import InputError
from hansa.safeguard.models import Loaded
from hansa.safeguard.rows import Data
from hansa.safeguard.texts import Texts, TextsOptions
from hansa.safeguard.world import World, WorldOptions


def open_data(options: WorldOptions | TextsOptions, loaded: Loaded | None) -> Data:
    """Return what a safeguard trains on and asks for, in a model's tokens.

    Args:
        options: the configuration's.
        loaded: the model, None for one that is built for the made-up world.

    Raises:
        InputError: data that cannot be read, or of tokens that are not the model's.
    """
    if isinstance(options, WorldOptions):
        world = World(options)
        if loaded is not None and loaded.architecture.classes != world.vocabulary:
            found = f"a model of {loaded.architecture.classes} tokens for a world of"
            raise InputError("data", f"{found} {world.vocabulary}", "the world it was trained on")
        return world
    if loaded is None:
        raise InputError("model.path", "nothing", "a trained model, for texts")
    if loaded.tokenizer:
        encode = _Ours(tokenizer_from_json(loaded.tokenizer))
        return Texts(options, encode, loaded.architecture.classes)
    own = loaded.own_tokenizer
    if own is None:
        allowed = "the folder of transformers that it was made from, whose tokenizer is needed"
        raise InputError("model.path", "a bundle without a tokenizer", allowed)
    return Texts(options, _Theirs(own), loaded.architecture.classes)


# Classes and no closures, so that data can be sent to other processes.
@dataclass(frozen=True)
class _Ours:
    """Encodes by a tokenizer of Hansa's."""

    tokenizer: Tokenizer

    def __call__(self, text: str) -> list[int]:
        """Return the token numbers of a text."""
        return [int(number) for number in self.tokenizer.encode(text)]


@dataclass(frozen=True)
class _Theirs:
    """Encodes by a tokenizer of ``transformers``."""

    tokenizer: Any

    def __call__(self, text: str) -> list[int]:
        """Return the token numbers of a text, without those that a model wants around it."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
