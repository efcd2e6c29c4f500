"""The demonstration's reader and local models as targets."""

import pytest
import torch

from hansa import bundle
from hansa.audit.domains import DOMAINS, domain
from hansa.audit.local import FromBundle, Pointing, Transformers
from hansa.audit.prompts import Prompt
from hansa.audit.reader import NONE, ReaderOptions, read
from hansa.audit.reader_training import train
from hansa.audit.signing import Received
from hansa.audit.tamper import encoded
from hansa.audit.targets import Asked
from hansa.auditing import audit
from hansa.data.tokenizer import ByteTokenizer
from hansa.errors import InputError
from hansa.models.build import Architecture, build

TINY = ReaderOptions(width=16, layers=1, heads=2, cases=24, steps=4, batch=4)


@pytest.fixture(scope="module")
def reader():
    return train(TINY)


def prompts(num=4):
    cases = [case for name in DOMAINS for case in domain(name).cases[:num]]
    return [Prompt(case.question, encoded(case.document).decode()) for case in cases]


def test_training_gives_the_same_reader_and_it_is_kept(reader, tmp_path) -> None:
    assert train(TINY).digest == reader.digest
    assert train(ReaderOptions(**{**vars(TINY), "seed": 1})).digest != reader.digest
    reader.save(tmp_path)
    again = read(tmp_path)
    assert again.options == TINY
    assert again.answer(prompts()) == reader.answer(prompts())
    (tmp_path / "reader.json").write_text("{}")
    with pytest.raises(InputError, match=r"target\.path"):
        read(tmp_path)


def test_a_reader_says_nothing_that_is_not_in_the_prompt(reader) -> None:
    asked = prompts()
    one_by_one = [reader.answer([prompt])[0] for prompt in asked]
    assert reader.answer(asked, batch=5) == one_by_one  # padding changes nothing
    assert all(told == NONE or told in p.user for told, p in zip(one_by_one, asked, strict=True))
    cited = reader.answer([prompt.but(cited=True) for prompt in asked])
    assert all(told == NONE or told.endswith("]") for told in cited)


def test_values_and_names_are_in_no_vocabulary(reader) -> None:
    held = set(reader.vocabulary)
    for name in DOMAINS:
        for case in domain(name).cases:
            if case.truth.kind in ("person", "place"):
                assert not held & set(str(case.truth.value).split())
    assert not [word for word in held if word[0].isdigit() or word.startswith("-")]


def test_an_untrained_reader_is_not_concluded_about(reader, tmp_path) -> None:
    reader.save(tmp_path / "reader")
    target = {"kind": "reader", "path": str(tmp_path / "reader")}
    values = {"output": str(tmp_path), "cases": 4, "strengths": [], "defences": ["none"]}
    made = audit({**values, "target": target})
    assert made.summary["verdict"] == "no conclusion"
    assert "are needed" in made.summary["why"]
    assert made.summary["target"]["name"] == Pointing(reader).name


def asked(text):
    case = domain("weather").cases[0]
    return Asked(Prompt(text, "{}"), case, Received(b"{}"))


def test_a_bundle_answers(tmp_path) -> None:
    options = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    options["num_attention_heads"] = 2
    architecture = Architecture(name="llama", options=options, shape=(40,), classes=256)
    model = build(architecture, seed=0)
    bundle.write(
        tmp_path / "bundle",
        stage="train",
        weights=model.state_dict(),
        architecture=architecture.model_dump(mode="json"),
        config={},
        seed=0,
        data="",
        metrics={},
        tokenizer=ByteTokenizer().as_json(),
    )
    target = FromBundle(tmp_path / "bundle", max_tokens=5)
    first, second = target.answer([asked("How warm?"), asked("How warm?")])
    assert first == second
    with pytest.raises(InputError, match="a context of 40"):
        target.answer([asked("How warm is it in a town of a name that is long?")])
    with pytest.raises(InputError):
        FromBundle(tmp_path)


def test_a_folder_of_transformers_answers(tmp_path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "warm": 1}, "<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")  # noqa: S106
    fast.save_pretrained(tmp_path)
    config = transformers.LlamaConfig(
        vocab_size=2,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    target = Transformers(tmp_path, max_tokens=3)
    (told,) = target.answer([asked("How warm?")])
    assert isinstance(told, str)
    with pytest.raises(InputError, match="a context of 128"):
        target.answer([asked("warm " * 200)])
    with pytest.raises(InputError, match=r"target\.path"):
        Transformers(tmp_path / "nowhere")
