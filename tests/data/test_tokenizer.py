import builtins
import json
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from hansa.data.tokenizer import BPE, ByteTokenizer, Tokenizer, tokenizer_from_json, train_bpe
from hansa.errors import InputError

GERMAN = "Größe, Maß und Übermut: die Füße grüßen, " * 20
RUSSIAN = "Все счастливые семьи похожи друг на друга. " * 20  # noqa: RUF001
OTHER = "a\r\n\tb  c\x00 🧑‍🚀 naïve 漢字 e\u0301"
TEXTS = {
    "german": GERMAN,
    "russian": RUSSIAN,
    "emoji": "🧑‍🚀👩🏽‍🔬🇩🇪 " * 5,
    "other": OTHER,
    "spaces": "  \n\n  leading and trailing \t ",
    "one": "x",
    "empty": "",
}


@pytest.fixture(scope="module")
def bpe() -> BPE:
    return train_bpe(GERMAN + RUSSIAN, 320)


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest, bpe: BPE) -> Tokenizer:
    return ByteTokenizer() if request.param == "bytes" else bpe


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_the_bytes_of_tokens_sum_to_those_of_the_text(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.int64
    assert tokens.ndim == 1
    assert int(tokenizer.bytes_of[torch.from_numpy(tokens)].sum()) == len(text.encode())


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_text_comes_back_as_it_was(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_token_has_its_bytes(tokenizer: Tokenizer) -> None:
    assert tokenizer.bytes_of.shape == (tokenizer.size,)
    assert tokenizer.bytes_of.dtype == torch.int64
    assert int(tokenizer.bytes_of.min()) == 1
    # Each token's bytes one by one: those that are no UTF-8 alone are counted by the letters.
    for k in range(tokenizer.size):
        text = tokenizer.decode([k])
        if "\ufffd" not in text:
            assert len(text.encode()) == int(tokenizer.bytes_of[k])


def test_bytes_are_their_own_numbers() -> None:
    assert ByteTokenizer().encode("aß").tolist() == [97, 0xC3, 0x9F]
    assert ByteTokenizer().decode([97, 0xC3]) == "a\ufffd"


def test_an_emoji_may_be_split_over_tokens(bpe: BPE) -> None:
    tokens = bpe.encode("🧑")
    assert len(tokens) == 4
    assert bpe.bytes_of[torch.from_numpy(tokens)].tolist() == [1, 1, 1, 1]
    assert bpe.decode(tokens[:2]) == "\ufffd"


def test_pairs_are_merged_in_the_order_of_their_counts() -> None:
    bpe = train_bpe("abab abab cab cab cab cd", 258)
    # "ab" occurs 7 times; once it is one token, " c" occurs 4 times and "cab" 3 times.
    assert bpe.size == 258
    assert [bpe.decode([k]) for k in (256, 257)] == ["ab", " c"]
    assert bpe.bytes_of[256:].tolist() == [2, 2]
    assert len(bpe.encode("ab")) == 1


def test_an_encoding_shortens_what_it_was_trained_on(bpe: BPE) -> None:
    assert bpe.size == 320
    assert len(bpe.encode(GERMAN)) < len(GERMAN.encode()) / 2


def test_an_encoding_ends_where_no_pair_is_left() -> None:
    assert train_bpe("ab", 300).size == 257


def test_training_twice_gives_one_encoding(bpe: BPE) -> None:
    program = (
        "import sys; from hansa.data.tokenizer import train_bpe;"
        "sys.stdout.reconfigure(encoding='utf-8');"
        "print(train_bpe(sys.argv[1], 320).as_json(), end='')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, GERMAN + RUSSIAN], capture_output=True, check=True
    )
    assert done.stdout.decode() == bpe.as_json()
    assert train_bpe(GERMAN + RUSSIAN, 320).as_json() == bpe.as_json()
    assert train_bpe(GERMAN, 320).as_json() != bpe.as_json()


def test_a_tokeniser_comes_back_from_json(tokenizer: Tokenizer) -> None:
    again = tokenizer_from_json(tokenizer.as_json())
    assert type(again) is type(tokenizer)
    assert again.as_json() == tokenizer.as_json()
    assert again.size == tokenizer.size
    assert torch.equal(again.bytes_of, tokenizer.bytes_of)
    assert again.encode(OTHER).tolist() == tokenizer.encode(OTHER).tolist()


def test_a_tokeniser_travels_to_another_process(tokenizer: Tokenizer) -> None:
    again = pickle.loads(pickle.dumps(tokenizer))  # noqa: S301
    assert again.encode(OTHER).tolist() == tokenizer.encode(OTHER).tolist()


def test_the_librarys_own_tools_open_an_encoding(bpe: BPE) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer.from_str(bpe.as_json())
    assert inner.encode(GERMAN).ids == bpe.encode(GERMAN).tolist()


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", '{"kind": "words"}'])
def test_what_is_no_tokeniser_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"^tokenizer: found"):
        tokenizer_from_json(text)


def changed(bpe: BPE, part: str, value: Any) -> str:
    held = json.loads(bpe.as_json())
    inner = held
    *path, last = part.split(".")
    for key in path:
        inner = inner[key]
    inner[last] = value
    return json.dumps(held)


@pytest.mark.parametrize(
    ("part", "value", "found"),
    [
        ("normalizer", {"type": "Lowercase"}, "something under normalizer"),
        ("pre_tokenizer", {"type": "Whitespace"}, "BPE after Whitespace"),
        ("pre_tokenizer", None, "BPE after None"),
        ("pre_tokenizer.add_prefix_space", True, "a prefix space"),
        ("model.dropout", 0.1, r"something under model\.dropout"),
        ("model.end_of_word_suffix", "</w>", r"something under model\.end_of_word_suffix"),
        (
            "added_tokens",
            [
                {
                    "id": 320,
                    "content": "<s>",
                    "special": True,
                    **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
                }
            ],
            "something under added_tokens",
        ),
        ("model.vocab.中", 320, "257 single bytes"),
        ("model.vocab.zzzz", 321, "token numbers with gaps"),
    ],
)
def test_an_encoding_that_changes_text_is_refused(
    bpe: BPE, part: str, value: Any, found: str
) -> None:
    with pytest.raises(InputError, match=f"tokenizer: found {found}"):
        tokenizer_from_json(changed(bpe, part, value))


def test_a_vocabulary_without_a_pair_is_refused() -> None:
    with pytest.raises(InputError, match=r"text\.vocabulary: found 256"):
        train_bpe("abc", 256)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, bpe: BPE) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "tokenizers":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    for ask in (lambda: train_bpe("abc", 300), lambda: tokenizer_from_json(bpe.as_json())):
        with pytest.raises(InputError, match=r"pip install hansa\[language\]"):
            ask()
    assert tokenizer_from_json('{"kind": "bytes"}').size == 256
