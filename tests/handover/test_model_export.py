"""Exported models open elsewhere and say what the bundle's model says, or are not there."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hansa import bundle
from hansa.bundle import Bundle
from hansa.data.tokenizer import ByteTokenizer, Tokenizer, train_bpe
from hansa.errors import InputError
from hansa.handover import export
from hansa.handover.tokenizer import write_tokenizer
from hansa.models import Architecture, build, restore
from hansa.models.masks import attach, finalise
from hansa.models.resize import channels_of
from hansa.pruning import SCORERS
from hansa.pruning.channels import prune_channels

pytestmark = pytest.mark.filterwarnings("ignore")  # what the libraries warn of is theirs


def stored(
    path: Path, architecture: Architecture, model: nn.Module | None = None, **more: Any
) -> Bundle:
    """Write a bundle of a model whose running statistics and adapters are no initial values."""
    if model is None:
        model = build(architecture, 3)
        rng = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                drawn = torch.rand(tensor.shape, generator=rng)
                if "running" in name:
                    tensor.copy_(drawn + 0.5)
                elif "lora_B" in name:
                    tensor.copy_(drawn / 10)
    return bundle.write(
        path,
        stage="train",
        weights=model.state_dict(),
        architecture=architecture.model_dump(mode="json", exclude_none=True),
        config={},
        seed=0,
        data="ab12",
        **{"metrics": {"accuracy": {"mean": 0.5}}, **more},
    )


def in_onnxruntime(folder: Path, inputs: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    return session.run(None, {"inputs": inputs.numpy()})[0]


IMAGES = {
    "mlp": Architecture(name="mlp", shape=(1, 8, 8), classes=3),
    "cnn": Architecture(name="cnn", shape=(1, 8, 8), classes=3),
    "resnet18": Architecture(name="resnet18", shape=(3, 8, 8), classes=3),
    "resnet20": Architecture(
        name="resnet20", shape=(3, 8, 8), classes=3, options={"norm": "batch"}
    ),
    "vgg16": Architecture(name="vgg16", shape=(3, 32, 32), classes=3),
    "blox": Architecture(
        name="blox", shape=(3, 16, 16), classes=3, options={"arch": 5812, "width": 4}
    ),
}


@pytest.mark.slow(8)
@pytest.mark.parametrize("name", IMAGES)
def test_an_onnx_model_says_what_the_bundle_s_says_for_any_number_of_inputs(
    tmp_path: Path, name: str
) -> None:
    found = stored(tmp_path / "b", IMAGES[name], labels=["cat", "dög", "eel"])
    told = export(tmp_path / "b", tmp_path / "o", "onnx")
    assert told["files"] == ["README.md", "model.onnx"]
    model = restore(found).eval()
    for size in (1, 2, 7):
        inputs = torch.randn(size, *IMAGES[name].shape)
        with torch.no_grad():
            expected = model(inputs).numpy()
        made = in_onnxruntime(tmp_path / "o", inputs)
        assert np.abs(made - expected).max() <= 1e-4 * max(1, np.abs(expected).max())
    held = onnx.load(tmp_path / "o" / "model.onnx")
    onnx.checker.check_model(held)
    about = {each.key: each.value for each in held.metadata_props}
    assert json.loads(about["labels"]) == ["cat", "dög", "eel"]
    assert about["hansa.bundle"] == found.digest
    assert [(each.domain, each.version) for each in held.opset_import] == [("", 18)]


def test_pruned_weights_are_zero_in_the_export_whatever_the_file_holds(tmp_path: Path) -> None:
    architecture = IMAGES["cnn"]
    model = build(architecture, 3)
    rng = torch.Generator().manual_seed(0)
    kept = {
        name: torch.rand(weight.shape, generator=rng) < 0.3
        for name, weight in model.named_parameters()
        if weight.dim() > 1
    }
    found = stored(tmp_path / "b", architecture, model, kept=kept)
    export(tmp_path / "b", tmp_path / "o", "onnx")
    inputs = torch.randn(3, *architecture.shape)
    masked = restore(found)
    finalise(attach(masked, kept))
    with torch.no_grad():
        expected = masked.eval()(inputs).numpy()
    assert np.abs(in_onnxruntime(tmp_path / "o", inputs) - expected).max() < 1e-4
    held = onnx.load(tmp_path / "o" / "model.onnx").graph.initializer
    zeros = sum(int((onnx.numpy_helper.to_array(each) == 0).sum()) for each in held)
    assert zeros >= sum(int((~mask).sum()) for mask in kept.values())
    assert "% are kept" in (tmp_path / "o" / "README.md").read_text()


def test_a_model_of_fewer_channels_is_exported(tmp_path: Path) -> None:
    architecture = IMAGES["resnet20"]
    inputs, labels = torch.randn(4, *architecture.shape), torch.tensor([0, 1, 2, 0])
    batches = [(inputs, labels)]
    slim = prune_channels(build(architecture, 3), batches, 0.5, SCORERS["snip"]()).model
    architecture = architecture.model_copy(update={"channels": channels_of(slim)})
    stored(tmp_path / "b", architecture, slim)
    export(tmp_path / "b", tmp_path / "o", "onnx")
    with torch.no_grad():
        expected = slim.eval()(inputs).numpy()
    assert np.abs(in_onnxruntime(tmp_path / "o", inputs) - expected).max() < 1e-4


TEXTS = {
    "llama": Architecture(name="llama", shape=(12,), classes=256),
    "gpt2": Architecture(name="gpt2", shape=(12,), classes=256),
    "adapters": Architecture(
        name="llama", shape=(12,), classes=256, options={"lora": {"r": 2, "alpha": 4.0}}
    ),
    "configured": Architecture(
        name="transformers",
        shape=(12,),
        classes=256,
        options={
            "config": {
                "model_type": "gpt_neox",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
            }
        },
    ),
}


@pytest.mark.slow(5)
@pytest.mark.parametrize("name", TEXTS)
def test_a_folder_of_transformers_opens_and_gives_equal_logits(tmp_path: Path, name: str) -> None:
    form = ByteTokenizer().as_json()
    found = stored(tmp_path / "b", TEXTS[name], tokenizer=form)
    export(tmp_path / "b", tmp_path / "o", "transformers")
    model = restore(found).eval()
    tokens = torch.randint(256, (3, 12), generator=torch.Generator().manual_seed(2))
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "o").eval()
    assert opened.dtype == torch.float32
    with torch.no_grad():
        expected, logits = model(tokens), opened(input_ids=tokens).logits
    assert torch.allclose(logits, expected, rtol=1e-5, atol=1e-5)
    assert not [key for key in opened.state_dict() if "lora" in key]
    text = "  Grüße,\n don't"
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "o")(text)["input_ids"]
    assert ids == ByteTokenizer().encode(text).tolist()
    head = (tmp_path / "o" / "README.md").read_text().split("---\n")[1]
    assert 'license: "unknown"' in head
    assert 'pipeline_tag: "text-generation"' in head


def test_without_adapters_logits_are_equal_to_the_last_bit(tmp_path: Path) -> None:
    found = stored(tmp_path / "b", TEXTS["llama"])
    export(tmp_path / "b", tmp_path / "o", "transformers")
    kind = transformers.AutoModelForCausalLM
    opened = kind.from_pretrained(tmp_path / "o", attn_implementation="eager").eval()
    tokens = torch.randint(256, (2, 12))
    with torch.no_grad():
        assert torch.equal(opened(input_ids=tokens).logits, restore(found).eval()(tokens))
    assert not (tmp_path / "o" / "tokenizer.json").exists()


def test_weights_are_written_as_asked(tmp_path: Path) -> None:
    stored(tmp_path / "b", TEXTS["gpt2"])
    told = export(tmp_path / "b", tmp_path / "o", "transformers", dtype="bfloat16")
    assert told["difference"] < 1e-5  # from the model as rounded
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "o")
    assert opened.dtype == torch.bfloat16


@pytest.mark.slow(12)
def test_a_language_model_in_onnx_takes_texts_of_any_length(tmp_path: Path) -> None:
    found = stored(tmp_path / "b", TEXTS["llama"])
    export(tmp_path / "b", tmp_path / "o", "onnx")
    for shape in ((1, 2), (3, 7), (2, 12)):
        tokens = torch.randint(256, shape)
        with torch.no_grad():
            expected = restore(found).eval()(tokens).numpy()
        assert np.abs(in_onnxruntime(tmp_path / "o", tokens) - expected).max() < 1e-4
    assert "at most 12 tokens" in (tmp_path / "o" / "README.md").read_text()


BPE_HERE = train_bpe("the cat sat on the mat, and the hat was the cat's\n" * 5, 300)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Tokenizer, Any]]:
    pairs: list[tuple[Tokenizer, Any]] = []
    for own in (ByteTokenizer(), BPE_HERE):
        folder = tmp_path_factory.mktemp("tokenizer")
        write_tokenizer(own.as_json(), 1000, folder)
        pairs.append((own, transformers.AutoTokenizer.from_pretrained(folder)))
    return pairs


@settings(deadline=None, max_examples=200)
@given(
    text=st.one_of(st.text(max_size=40), st.sampled_from(["the cat's hat", " \n\n  the", "<s>"]))
)
def test_a_tokenizer_in_transformers_gives_the_same_numbers_and_texts(
    opened: list[tuple[Tokenizer, Any]], text: str
) -> None:
    for own, theirs in opened:
        ids = own.encode(text).tolist()
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text


@pytest.mark.parametrize("drawn", [{"drawn": "seed"}, {"drawn": "secret"}])
def test_the_card_tells_privacy_attacks_and_lineage_and_breaks_nowhere(
    tmp_path: Path, drawn: dict[str, str]
) -> None:
    parent = stored(
        tmp_path / "a",
        TEXTS["llama"],
        privacy={"b|1": {"unit": "update", "noise": 4.0, "delta": 1e-5, "epsilon": 5.4} | drawn},
    )
    scorecard = {
        "claim": "Raises cost.",
        "threat": {"steps": 5, "examples": 10, "tokens": 80, "trials": 2, "attacks": 1},
        "chance": 0.25,
        "flags": [{"kind": "weak", "text": "few <seeds>\n# no heading"}],
        "recovery": {"unprotected": {"0": 0.9, "5": 0.95}, "safeguarded": {"0": 0.2, "5": 0.41}},
        "half": {"unprotected": 0, "safeguarded": None},
        "retained": {"unprotected": 0.8, "safeguarded": 0.75},
    }
    found = bundle.write(
        tmp_path / "b",
        stage="redteam",
        weights=parent.weights,
        architecture=parent.architecture,
        config={},
        seed=0,
        data="ab12",
        metrics={"redteam": scorecard},
        parent=parent,
    )
    export(tmp_path / "b", tmp_path / "o", "transformers", license_="apache-2.0")
    text = (tmp_path / "o" / "README.md").read_text()
    lines = text.splitlines()
    assert 'license: "apache-2.0"' in lines
    assert "differential-privacy" in text
    assert "| train: b\\|1 | epsilon 5.4, delta 1e-05, noise 4, per update |" in lines
    first = lines.index("| safeguarded | 0.20 | 0.41 | - | 0.75 |")
    assert lines[first + 1] == "| unprotected | 0.90 | 0.95 | 0 | 0.80 |"
    assert "- weak: few &lt;seeds> # no heading" in lines
    assert ("protects nobody" in text) == (drawn["drawn"] == "seed")
    assert f"| train | `{parent.digest}` |" in lines
    assert f"| redteam | `{found.digest}` |" in lines


def test_the_head_of_the_card_is_what_a_hub_reads(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    stored(tmp_path / "b", TEXTS["llama"])
    export(tmp_path / "b", tmp_path / "o", "transformers", license_="mit")
    data = hub.ModelCard.load(tmp_path / "o" / "README.md").data
    assert (data.license, data.library_name, data.pipeline_tag) == (
        "mit",
        "transformers",
        "text-generation",
    )
    assert data.tags == ["hansa", "federated-learning", "train"]


WRONG = {
    "an image model in transformers": ("mlp", {"to": "transformers"}, "--to: found 'transformers'"),
    "another form": ("mlp", {"to": "gguf"}, "--to: found 'gguf'"),
    "half a number in onnx": ("mlp", {"to": "onnx", "dtype": "float16"}, "--dtype"),
    "no licence": ("mlp", {"to": "onnx", "license_": "x\ntags: []"}, "--license"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_has_no_such_form_is_refused_and_leaves_nothing(tmp_path: Path, case: str) -> None:
    name, options, message = WRONG[case]
    stored(tmp_path / "b", IMAGES[name])
    with pytest.raises(InputError, match=message):
        export(tmp_path / "b", tmp_path / "o", **options)
    assert [each.name for each in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("to", ["onnx", "transformers"])
def test_a_model_that_says_something_else_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    architecture = IMAGES["mlp"] if to == "onnx" else TEXTS["llama"]
    stored(tmp_path / "b", architecture)
    # The package has a function of the module's name.
    monkeypatch.setattr(sys.modules["hansa.handover.export"], "difference", lambda *_: 0.01)
    with pytest.raises(InputError, match=r"differ from PyTorch's by 0\.01"):
        export(tmp_path / "b", tmp_path / "o", to)
    assert [each.name for each in tmp_path.iterdir()] == ["b"]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    stored(tmp_path / "b", IMAGES["mlp"])
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "thesis.tex").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for taken in ("o", "file", "b"):
        with pytest.raises(InputError, match="nothing is overwritten"):
            export(tmp_path / "b", tmp_path / taken, "onnx")
    assert (tmp_path / "o" / "thesis.tex").read_text() == "mine"
    assert {each.name for each in tmp_path.iterdir()} == {"b", "o", "file"}


def test_code_of_one_s_own_is_run_only_where_it_is_trusted(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "mine_handed_over.py").write_text(
        "from torch import nn\n\nclass Flat(nn.Sequential):\n    def __init__(self):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(4, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    name = "mine_handed_over:Flat"
    stored(tmp_path / "b", Architecture(name=name, shape=(1, 2, 2), classes=3))
    with pytest.raises(InputError, match="code from outside Hansa"):
        export(tmp_path / "b", tmp_path / "o", "onnx")
    assert export(tmp_path / "b", tmp_path / "o", "onnx", trusted=[name])["difference"] < 1e-4
