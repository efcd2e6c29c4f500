"""A tokenizer in the form that the library ``transformers`` opens."""

import json
from pathlib import Path

from hansa.data.tokenizer import ByteTokenizer, library, tokenizer_from_json

_OPENED_BY = "PreTrainedTokenizerFast"  # by this name every release knows it


def write_tokenizer(form: str, context: int, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``, for ``AutoTokenizer``.

    Bytes become an encoding of 256 tokens without a single pair: the same numbers for every text.

    Args:
        form: what ``Tokenizer.as_json`` returned.
        context: most tokens of a text that the model reads.
        folder: where they go.

    Raises:
        InputError: it is no tokenizer, or the library ``tokenizers`` is missing.
    """
    own = tokenizer_from_json(form)
    inner = _of_bytes() if isinstance(own, ByteTokenizer) else own.as_json()
    (folder / "tokenizer.json").write_text(inner)
    about = {
        "tokenizer_class": _OPENED_BY,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")


def _of_bytes() -> str:
    tokenizers = library()
    vocabulary = {character: byte for byte, character in _characters().items()}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    inner.decoder = tokenizers.decoders.ByteLevel()
    return str(inner.to_str())


def _characters() -> dict[int, str]:
    """Return byte -> the character that stands for it in the library's byte-level form.

    Printed characters of Latin-1 stand for themselves, the other bytes for characters from 256 on.
    """
    printed = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printed]
    return {byte: chr(byte) for byte in printed} | {
        byte: chr(256 + place) for place, byte in enumerate(others)
    }
