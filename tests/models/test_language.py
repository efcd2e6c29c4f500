import copy
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import vmap

from hansa import bundle
from hansa.errors import InputError
from hansa.models import Architecture, build, objective_of, resolved, restore
from hansa.models.language import beside_adapters, blocks
from hansa.models.task import PureTask, Task

CONTEXT, VOCABULARY = 6, 11
TINY: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
    "gpt2": {"n_embd": 8, "n_layer": 2, "n_head": 2},
}
QWEN = {
    "model_type": "qwen2",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
FAMILIES = ("llama", "gpt2")


def of(name: str, shape: tuple[int, ...] = (CONTEXT,), **options: Any) -> Architecture:
    options = {**TINY.get(name, {}), **options}
    return Architecture(name=name, shape=shape, classes=VOCABULARY, options=options)


def configured(**values: Any) -> Architecture:
    return of("transformers", config={**QWEN, **values})


def batch(size: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    text = torch.randint(VOCABULARY, (size, CONTEXT + 1), generator=rng)
    return text[:, :-1], text[:, 1:]


def task_of(architecture: Architecture) -> Task:
    return Task(build(architecture, 3), objective_of(architecture))


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_become_logits_of_every_place(name: str) -> None:
    model = build(Architecture(name=name, shape=(CONTEXT,), classes=VOCABULARY))
    assert model(batch()[0]).shape == (3, CONTEXT, VOCABULARY)
    assert sum(p.numel() for p in model.parameters()) < 200_000
    assert all(p.dtype is torch.float32 for p in model.parameters())
    assert model.training


@pytest.mark.parametrize("architecture", [*map(of, FAMILIES), configured()], ids=lambda a: a.name)
def test_logits_depend_on_what_came_before_and_nothing_else(architecture: Architecture) -> None:
    model = build(architecture)
    inputs, _ = batch(1)
    changed = inputs.clone()
    changed[0, 3] = (inputs[0, 3] + 1) % VOCABULARY
    moved = (model(inputs) - model(changed)).abs().amax(-1)[0]
    assert (moved[:3] == 0).all()
    assert (moved[3:] > 0).all()


@pytest.mark.parametrize("lora", [None, {"r": 2}])
@pytest.mark.parametrize("name", FAMILIES)
def test_initial_values_come_from_the_seed(name: str, lora: Any) -> None:
    options = {} if lora is None else {"lora": lora}
    torch.manual_seed(1)
    first = values(build(of(name, **options), 3))
    torch.manual_seed(2)
    assert same(values(build(of(name, **options), 3)), first)
    assert not same(values(build(of(name, **options), 4)), first)


@pytest.mark.parametrize("architecture", [*map(of, FAMILIES), configured()], ids=lambda a: a.name)
def test_nothing_is_random_in_training(architecture: Architecture) -> None:
    model = build(architecture).train()
    assert torch.equal(model(batch()[0]), model(batch()[0]))


def test_dropout_that_is_asked_for_is_there() -> None:
    model = build(of("gpt2", resid_pdrop=0.5)).train()
    assert not torch.equal(model(batch()[0]), model(batch()[0]))


@pytest.mark.parametrize("lora", [None, {"r": 2}])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_example_s_gradient_at_once_is_that_of_each_alone(name: str, lora: Any) -> None:
    task = task_of(of(name, **({} if lora is None else {"lora": lora})))
    # Adapters start where the gradient of one half is zero.
    params = {name: p + 0.01 for name, p in task.params.items()}
    pure, (inputs, labels) = PureTask(task), batch(4)

    def slope(x: torch.Tensor, y: torch.Tensor) -> Any:
        return pure.gradients(params, {}, (x[None], y[None]))[0]

    together = vmap(slope)(inputs, labels)
    for k in range(4):
        alone, _, _ = task.gradients(params, {}, (inputs[k : k + 1], labels[k : k + 1]))
        for name, gradient in alone.items():
            assert gradient is not None
            torch.testing.assert_close(together[name][k], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_clients_side_by_side_get_what_each_gets_alone(name: str) -> None:
    task = task_of(of(name))
    pure = PureTask(task)
    rows = [{n: p * (1 + k) for n, p in task.params.items()} for k in range(2)]
    stacked = {n: torch.stack([row[n] for row in rows]) for n in task.params}
    batches = [(*batch(seed=k), torch.tensor([1.0, 1.0, k])) for k in range(2)]
    together, _, metrics = vmap(lambda p, b: pure.gradients(p, {}, b))(
        stacked, tuple(torch.stack(part) for part in zip(*batches, strict=True))
    )
    for k in range(2):
        alone, _, own = task.gradients(rows[k], {}, batches[k])
        for entry, gradient in alone.items():
            torch.testing.assert_close(together[entry][k], gradient, rtol=1e-4, atol=1e-5)
        assert metrics["count"][k].item() == own["count"].item() == (2 + k) * CONTEXT


def test_gradients_are_those_of_plain_pytorch() -> None:
    architecture = of("llama")
    model = build(architecture, 3)
    inputs, labels = batch()
    gradients, buffers, _ = task_of(architecture).gradients(values(model), {}, (inputs, labels))
    F.cross_entropy(model(inputs).transpose(1, 2), labels).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)
    assert buffers == {}


@pytest.mark.parametrize("name", FAMILIES)
def test_constants_of_a_model_do_not_travel(name: str) -> None:
    model = build(of(name))
    assert not dict(model.named_buffers())
    assert model.state_dict().keys() >= dict(model.named_parameters()).keys()


def test_constants_go_where_the_model_goes() -> None:
    model = build(of("llama"))
    rotary = model.get_submodule("model.model.rotary_emb")
    assert rotary.inv_freq.dtype is torch.float32
    assert not rotary.inv_freq.is_meta
    copied = copy.deepcopy(model).to("meta")
    assert copied.get_submodule("model.model.rotary_emb").inv_freq.is_meta
    assert not rotary.inv_freq.is_meta
    inputs, _ = batch()
    assert torch.equal(pickle.loads(pickle.dumps(model))(inputs), model(inputs))  # noqa: S301
    assert copied(inputs.to("meta")).shape == (3, CONTEXT, VOCABULARY)


def test_tied_embeddings_count_once() -> None:
    tied, free = (task_of(of("llama", tie_word_embeddings=tie)) for tie in (True, False))
    assert free.params.keys() - tied.params.keys() == {"model.lm_head.weight"}
    shifted = {name: p + 0.01 for name, p in tied.params.items()}
    made = tied.materialise(shifted, {})
    assert made.get_parameter("model.lm_head.weight") is made.get_parameter(
        "model.model.embed_tokens.weight"
    )
    data = batch()
    expected = F.cross_entropy(made(data[0]).transpose(1, 2), data[1])
    torch.testing.assert_close(tied.loss(shifted, {}, data)[0], expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_few_steps_learn_a_text(name: str) -> None:
    task = task_of(of(name))
    text = torch.arange(CONTEXT + 1) % 3
    data = text[None, :-1], text[None, 1:]
    params = dict(task.params)
    first = task.evaluate(params, {}, data)
    for _ in range(200):
        gradients, _, _ = task.gradients(params, {}, data)
        for name, gradient in gradients.items():
            assert gradient is not None
            params[name] = params[name] - 0.5 * gradient
    last = task.evaluate(params, {}, data)
    assert last["loss"][0] < first["loss"][0] / 4
    assert last["accuracy"] == (CONTEXT, CONTEXT)


def test_blocks_of_llama_are_its_layers_in_order() -> None:
    task = task_of(of("llama", num_hidden_layers=11))
    found = blocks(task.params)
    assert list(found) == [f"model.model.layers.{k}" for k in range(11)]
    names = list(task.params)
    for block, members in found.items():
        assert members == [name for name in names if name.startswith(f"{block}.")]
        assert len(members) == 9
    outside = set(names) - {name for members in found.values() for name in members}
    assert outside == {
        "model.model.embed_tokens.weight",
        "model.model.norm.weight",
        "model.lm_head.weight",
    }


def test_blocks_of_gpt2_are_its_layers_in_order() -> None:
    found = blocks(task_of(of("gpt2")).params)
    assert list(found) == ["model.transformer.h.0", "model.transformer.h.1"]
    assert found["model.transformer.h.1"][0] == "model.transformer.h.1.ln_1.weight"
    assert {len(members) for members in found.values()} == {12}


def test_blocks_are_those_of_numbered_lists() -> None:
    names = [
        "a.layers.10.w",
        "a.layers.2.v",
        "a.layers.2.inner.layers.0.w",
        "b.blocks.0.w",
        "layer.1.w",
        "player.1.w",
        "layers.w",
        "head.weight",
    ]
    assert blocks(names) == {
        "a.layers.2": ["a.layers.2.v", "a.layers.2.inner.layers.0.w"],
        "a.layers.10": ["a.layers.10.w"],
        "b.blocks.0": ["b.blocks.0.w"],
        "layer.1": ["layer.1.w"],
    }
    assert list(blocks(names)) == ["a.layers.2", "a.layers.10", "b.blocks.0", "layer.1"]


def test_options_are_those_of_the_family() -> None:
    model = build(of("gpt2", hidden_size=12, num_attention_heads=3))
    assert model.get_parameter("model.transformer.wte.weight").shape == (VOCABULARY, 12)
    assert model.get_parameter("model.transformer.wpe.weight").shape == (CONTEXT, 12)
    model = build(of("llama", num_key_value_heads=1))
    assert model.get_parameter("model.model.layers.0.self_attn.k_proj.weight").shape == (4, 8)


@pytest.mark.parametrize(
    ("name", "key", "found", "allowed"),
    [
        ("llama", "hiden_size", "an unknown option", "hidden_size"),
        ("llama", "n_embd", "an unknown option", "num_attention_heads"),
        ("gpt2", "n_head_", "an unknown option", "n_head"),
        ("llama", "vocab_size", "what the run itself sets", "hidden_size"),
        ("gpt2", "n_positions", "what the run itself sets", "n_layer"),
        ("llama", "config", "an unknown option", "hidden_size"),
        ("transformers", "hidden_size", "an unknown option", "config, lora"),
    ],
)
def test_an_unknown_option_is_named(name: str, key: str, found: str, allowed: str) -> None:
    with pytest.raises(InputError) as caught:
        build(of(name, **{key: 3}))
    assert (caught.value.key, caught.value.found) == (f"model.options.{key}", found)
    assert allowed in caught.value.allowed


@pytest.mark.parametrize("options", [{"hidden_size": "wide"}, {"num_attention_heads": 3}])
def test_options_that_a_model_cannot_take_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"model\.options: found options that llama refuses"):
        build(of("llama", **options))


def test_a_language_model_takes_no_images() -> None:
    with pytest.raises(InputError, match=r"'llama' for inputs of shape \(1, 8, 8\)"):
        build(of("llama", (1, 8, 8)))


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"pip install hansa\[language\]"):
        build(of("llama"))


def test_a_configuration_is_a_table_a_file_or_its_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    table = values(build(configured(), 3))
    for path in (tmp_path, tmp_path / "config.json"):
        architecture = of("transformers", config=str(path))
        assert same(values(build(architecture, 3)), table)
        assert resolved(architecture) == configured()
    assert resolved(configured()) == configured()
    assert resolved(of("llama")) == of("llama")


def test_the_run_says_vocabulary_context_and_numbers() -> None:
    model: Any = build(
        configured(
            vocab_size=9999,
            torch_dtype="bfloat16",
            pad_token_id=0,
            bos_token_id=5000,
            max_position_embeddings=3,
            attention_dropout=0.25,
            use_cache=True,
            auto_map={"AutoModelForCausalLM": "someone/model--code.Model"},
            quantization_config={"quant_method": "gptq", "bits": 4},
        )
    )
    config = model.model.config
    assert config.vocab_size == VOCABULARY
    assert config.max_position_embeddings == CONTEXT
    assert config.pad_token_id is None
    assert config.attention_dropout == 0.25
    assert not config.use_cache
    assert model(batch()[0]).dtype is torch.float32
    assert model.get_parameter("model.model.embed_tokens.weight")[0].any()


def test_a_longer_context_of_a_configuration_is_kept() -> None:
    config = {"model_type": "gpt2", **TINY["gpt2"]}
    given, free = (
        build(of("transformers", config={**config, **more})) for more in ({"n_positions": 50}, {})
    )
    assert given.get_parameter("model.transformer.wpe.weight").shape == (50, 8)
    assert free.get_parameter("model.transformer.wpe.weight").shape == (CONTEXT, 8)


def test_building_leaves_the_table_alone() -> None:
    architecture = configured(rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    before = architecture.model_dump_json()
    build(architecture)
    assert architecture.model_dump_json() == before


@pytest.mark.parametrize(
    ("config", "key", "found"),
    [
        (None, "config", "nothing"),
        (3, "config", "3"),
        ({}, "config.model_type", "nothing"),
        ({"model_type": "lama"}, "config.model_type", "'lama'"),
        ({"model_type": "vit"}, "config.model_type", "'vit'"),
        (
            {"model_type": "bert", **TINY["llama"]},
            "config",
            "'bert', whose logits depend on later tokens",
        ),
    ],
)
def test_a_configuration_of_no_causal_model_is_refused(config: Any, key: str, found: str) -> None:
    with pytest.raises(InputError) as caught:
        build(of("transformers", config=config))
    assert (caught.value.key, caught.value.found) == (f"model.options.{key}", found)


@pytest.mark.parametrize("text", [None, "{", "[1]"])
def test_a_file_of_no_configuration_is_refused(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError) as caught:
        build(of("transformers", config=str(path)))
    assert caught.value.key == "model.options.config"
    assert str(path) in str(caught.value)


def test_a_file_from_elsewhere_names_no_file_here(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    with pytest.raises(InputError, match="a path in a file from elsewhere"):
        build(of("transformers", config=str(tmp_path)), trusted=())
    build(configured(), trusted=())


@pytest.mark.parametrize(
    "architecture",
    [of("llama", tie_word_embeddings=True), of("gpt2", lora={"r": 2}), configured()],
    ids=["tied", "lora", "configured"],
)
def test_a_bundle_holds_a_language_model(tmp_path: Path, architecture: Architecture) -> None:
    model = build(architecture, 3)
    made = bundle.write(
        tmp_path / "bundle",
        stage="train",
        weights=model.state_dict(),
        architecture=architecture.model_dump(mode="json"),
        config={},
        seed=3,
        data="",
        metrics={},
    )
    found = restore(bundle.read_bundle(tmp_path / "bundle"))
    assert made.digest
    assert same(values(found), values(model))


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_are_all_that_is_trained(name: str) -> None:
    architecture = of(name, lora={"r": 2, "alpha": 4})
    model, plain = build(architecture, 3), build(of(name), 3)
    task = Task(model, objective_of(architecture))
    assert task.params
    assert all(".lora_A." in name or ".lora_B." in name for name in task.params)
    assert task.params.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert list(blocks(task.params)) == list(blocks(dict(plain.named_parameters())))
    frozen = {n.replace(".base_layer", ""): p for n, p in values(model).items() if "lora_" not in n}
    assert same(frozen, values(plain))
    # B is zero at first: a model with adapters starts as the one without.
    assert torch.equal(model(batch()[0]), plain(batch()[0]))
    gradients, _, _ = task.gradients(task.params, {}, batch())
    assert any(g is not None and g.any() for n, g in gradients.items() if "lora_B" in n)


def test_an_adapter_adds_its_scaled_product() -> None:
    model: Any = build(of("llama", lora={"r": 2, "alpha": 6, "targets": ["q_proj"]}), 3)
    assert sum(p.requires_grad for p in model.parameters()) == 4
    layer = model.get_submodule("model.model.layers.1.self_attn.q_proj")
    a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
    with torch.no_grad():
        b.fill_(0.5)
    inputs = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    expected = inputs @ (layer.base_layer.weight + 6 / 2 * b @ a).T
    torch.testing.assert_close(layer(inputs), expected)


def test_weights_without_adapters_fit_a_model_with_some() -> None:
    plain, model = build(of("llama"), 4), build(of("llama", lora={"r": 2}), 3)
    adapters = {n: p.clone() for n, p in values(model).items() if ".lora_" in n}
    model.load_state_dict(beside_adapters(model, plain.state_dict()))
    assert torch.equal(model(batch()[0]), plain(batch()[0]))
    assert all(torch.equal(values(model)[name], value) for name, value in adapters.items())
    other = build(of("llama", lora={"r": 2}), 5)
    other.load_state_dict(beside_adapters(other, model.state_dict()))
    assert same(values(other), values(model))


@pytest.mark.parametrize(
    ("lora", "key", "allowed"),
    [
        ({"r": 0}, "lora.r", "a whole number from 1"),
        ({"alpha": -1}, "lora.alpha", "a number above 0"),
        ({"targets": []}, "lora.targets", "all-linear, or a list of layers"),
        ({"targets": ["q"]}, "lora.targets", "q_proj"),
        ({"targets": ["norm"]}, "lora.targets", "q_proj"),
        ({"rank": 8}, "lora.rank", "the keys r, alpha, targets"),
        (8, "lora", "the keys r, alpha, targets"),
    ],
)
def test_wrong_adapters_are_refused(lora: Any, key: str, allowed: str) -> None:
    with pytest.raises(InputError) as caught:
        build(of("llama", lora=lora))
    assert caught.value.key == f"model.options.{key}"
    assert allowed in caught.value.allowed
