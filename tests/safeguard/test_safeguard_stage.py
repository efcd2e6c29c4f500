import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM

from hansa.bundle import read_bundle
from hansa.errors import InputError
from hansa.models.build import restore
from hansa.redteam import redteam
from hansa.safeguard.loop import descend
from hansa.safeguard.models import layers_of, load_model, width_of
from hansa.safeguard.phases import TAR
from hansa.safeguard_config import load
from hansa.safeguarding import safeguard
from tampering import SMALL, tar

PHASE = {"steps": 3, "warm_up": 1, "batch_size": 4, "lr": 1e-3}
TAMPER = tar(PHASE)


def world(tmp_path, **more):
    return {
        "name": "small",
        "output": str(tmp_path),
        "model": {"options": SMALL},
        "data": {"entities": 24, "relations": 2, "values": 4, "facts": 3},
        "phases": [{"kind": "pretrain", **PHASE}, {"kind": "random_mapping", **PHASE}, TAMPER],
        "controls": {
            "entropy": {"after": 2, "phases": [{"kind": "max_entropy", **PHASE}]},
            "never": {"phases": [{"kind": "pretrain", "tables": ["retained"], **PHASE}]},
        },
        **more,
    }


def test_models_are_made_once_and_told_apart(tmp_path):
    made = safeguard(world(tmp_path))
    told = json.loads((made.path / "models.json").read_text())
    assert set(told["roles"]) == {"unprotected", "before", "safeguarded", "entropy", "never"}
    digests = {role: read_bundle(made.path / path).digest for role, path in told["roles"].items()}
    assert len(set(digests.values())) == 5
    assert digests["safeguarded"] == made.bundle.digest
    # Start, pre-training, mapping, TAR; entropy and never beside them.
    assert len(list((made.path / "models").iterdir())) == 6
    assert not list(made.path.rglob("checkpoint.safetensors"))
    lineage = [step["digest"] for step in made.bundle.lineage]
    assert lineage[1:3] == [digests["unprotected"], digests["before"]]
    # 3 steps of 2 plain ones each, then TAR's: (2 x 2 + 2 x 4) / 4 + 4 / 3.
    assert told["cost_in_steps"]["safeguarded"] == pytest.approx(6 + 3 * (3 + 4 / 3))
    assert told["cost_in_steps"]["unprotected"] == 0
    page = made.report.read_text()
    assert "random_mapping" in page
    assert "attacks that diverged" in page
    times = {path: path.stat().st_mtime_ns for path in (made.path / "models").rglob("*.json")}
    again = safeguard(world(tmp_path))
    assert again.bundle.digest == made.bundle.digest
    assert times == {p: p.stat().st_mtime_ns for p in (made.path / "models").rglob("*.json")}


def test_a_change_repeats_what_it_concerns(tmp_path):
    before = safeguard(world(tmp_path))
    kept = {path.name for path in (before.path / "models").iterdir()}
    after = safeguard(world(tmp_path), overrides=["controls={}", "redteam.seeds=[5]"])
    assert after.bundle.digest == before.bundle.digest
    values = world(tmp_path)
    values["phases"][2] = {**TAMPER, "weight": 2.0}
    changed = safeguard(values)
    new = {path.name for path in (before.path / "models").iterdir()} - kept
    assert len(new) == 1
    assert changed.bundle.digest != before.bundle.digest


def test_a_killed_stage_ends_as_another(tmp_path, monkeypatch):
    values = world(tmp_path / "whole", controls={})
    whole = safeguard(values).bundle.digest
    monkeypatch.setattr("hansa.safeguarding.descend", partial(descend, every=0.0))

    def watch(what, done, total):
        if what.startswith("tar") and done == 2:
            raise KeyboardInterrupt

    broken = {**values, "output": str(tmp_path / "broken")}
    with pytest.raises(KeyboardInterrupt):
        safeguard(broken, watch=watch)
    assert len(list(tmp_path.rglob("checkpoint.safetensors"))) == 1
    assert safeguard(broken).bundle.digest == whole


def test_the_bundle_opens_and_says_what_made_it(tmp_path):
    made = safeguard(world(tmp_path, controls={}))
    model = restore(made.bundle)
    inputs = torch.zeros(1, 5, dtype=torch.int64)
    assert model(inputs).shape == (1, 5, 65)
    config = load(made.path / "bundle")
    assert [phase.kind for phase in config.chain] == ["pretrain", "random_mapping", "tar"]
    assert config.seed == 0
    unprotected = json.loads((made.path / "models.json").read_text())["roles"]["unprotected"]
    with pytest.raises(InputError, match="phases or a preset must name a safeguard"):
        load(made.path / unprotected)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as ``save_pretrained`` writes it: a tiny GPT-2 and a tokenizer without padding."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("hub") / "model"
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["the cat sat on the mat. " * 20], 280, show_progress=False)
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(own), n_embd=16, n_layer=2, n_head=2, n_positions=128)
    GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(path)
    own.save_pretrained(path)
    return path


def texts(tmp_path, folder, **more):
    def words(seed, num):
        rng = torch.Generator().manual_seed(seed)
        held = ("cat", "mat", "sat", "the", "on", "hat", "rat", "fan")
        return " ".join(held[k] for k in torch.randint(0, 8, (num,), generator=rng).tolist())

    for seed, name in enumerate(("retain", "restricted")):
        (tmp_path / f"{name}.txt").write_text(words(seed, 1500))
    return {
        "name": "real",
        "output": str(tmp_path / "runs"),
        "model": {"path": str(folder)},
        "data": {
            "kind": "texts",
            "retain": f"file:{tmp_path}/retain.txt",
            "restricted": f"file:{tmp_path}/restricted.txt",
            "context": 16,
            **more.pop("data", {}),
        },
        "phases": [{"kind": "random_mapping", **PHASE}, TAMPER],
        **more,
    }


def test_a_model_of_transformers_is_safeguarded_with_its_tokenizer(tmp_path, folder):
    made = safeguard(texts(tmp_path, folder))
    model = AutoModelForCausalLM.from_pretrained(made.path / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(made.path / "model")
    ids = torch.tensor([tokenizer("the cat sat")["input_ids"]])
    ours = restore(made.bundle).eval()(ids)
    torch.testing.assert_close(model(ids).logits, ours, rtol=1e-4, atol=1e-5)
    assert model.lm_head.weight is model.transformer.wte.weight
    original = load_model(str(folder), 16).model
    assert original.lm_head.weight.dtype is torch.float32
    assert not torch.equal(original.lm_head.weight, model.lm_head.weight)
    assert set(made.summary["roles"]) == {"unprotected", "before", "safeguarded"}


def test_a_red_team_of_texts_finds_its_tokenizer_and_other_processes(tmp_path, folder):
    values = texts(tmp_path, folder)
    attack = {"name": "full", "steps": 2, "lrs": [1e-3], "batch": 2}
    values["redteam"] = {"attacks": [attack], "edits": [], "seeds": [0], "processes": 2}
    made = safeguard(values)
    both = redteam(values).scorecard
    attacks = "redteam.attacks=[{name='full',steps=2,lrs=[1e-3],batch=2}]"
    changes = [attacks, "redteam.edits=[]", "redteam.seeds=[0]"]
    alone = redteam(made.path / "bundle", overrides=changes).scorecard
    assert alone["recovery"]["safeguarded"] == both["recovery"]["safeguarded"]
    elsewhere = safeguard(values, out=tmp_path / "elsewhere").path
    found = redteam(elsewhere / "config.toml", overrides=["redteam.processes=1"])
    assert found.path == elsewhere / "redteam"
    assert found.scorecard["bundle"] == both["bundle"]
    changed = {**values, "phases": [{**values["phases"][0], "steps": 4}, TAMPER]}
    with pytest.raises(InputError, match="hansa safeguard CONFIG first"):
        redteam(changed)


def test_clients_may_not_hold_what_is_asked_for(tmp_path, folder):
    values = texts(tmp_path, folder)
    values["data"]["clients"] = {"ward": values["data"]["restricted"]}
    with pytest.raises(InputError, match="client ward and attacker share"):
        safeguard(values)


def test_other_weights_in_the_same_folder_are_another_start(tmp_path, folder):
    mine = tmp_path / "mine"
    shutil.copytree(folder, mine)
    values = texts(tmp_path, mine)
    first = safeguard(values).bundle.digest
    model = AutoModelForCausalLM.from_pretrained(mine, dtype=torch.float32)
    with torch.no_grad():
        model.transformer.wpe.weight.mul_(2)
    model.save_pretrained(mine)
    assert safeguard(values).bundle.digest != first


def test_hidden_states_of_two_widths_are_refused():
    config = OPTConfig(
        vocab_size=40,
        hidden_size=16,
        ffn_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        word_embed_proj_dim=8,
        max_position_embeddings=16,
    )
    with pytest.raises(InputError, match=r"hidden states of widths \[8, 16\]"):
        width_of(OPTForCausalLM(config))


def test_questions_and_pairs_come_from_files(tmp_path, folder):
    questions = tmp_path / "questions.jsonl"
    lines = [{"question": "who sat?", "choices": ["cat", "mat", "hat"], "answer": 0}] * 3
    questions.write_text("\n".join(json.dumps(line) for line in lines))
    pairs = tmp_path / "pairs.jsonl"
    held = {"prompt": "say it", "chosen": " no", "rejected": " the cat sat"}
    each = ({**held, "rejected": f" the cat sat {number}"} for number in range(40))
    pairs.write_text("\n".join(json.dumps(pair) for pair in each))
    data = {"restricted_questions": str(questions), "pairs": str(pairs), "context": 96}
    values = texts(tmp_path, folder, data=data)
    values["phases"] = [{"kind": "refusal", **PHASE}, {**TAMPER, "loss": "dpo"}]
    made = safeguard(values)
    assert made.summary["scores"]["safeguarded"]["restricted"]["count"] == 3
    pairs.write_text("\n".join(json.dumps(held) for _ in range(40)))
    with pytest.raises(InputError, match=r"data\.pairs.*stands there twice"):
        safeguard(values)
    pairs.write_text("\n".join(json.dumps({**held, "rejected": f" {k}"}) for k in range(40)))
    assert safeguard(values).bundle.digest != made.bundle.digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"phases": []}, "phases or a preset must name a safeguard"),
        ({"phases": [{"kind": "tarr"}]}, "phases.0.kind: found 'tarr'"),
        ({"phases": [{"steps": 3}]}, "phases.0.kind: found nothing"),
        ({"phases": [{"kind": "tar", "innersteps": 3}]}, "did you mean inner_steps"),
        ({"phases": [{"kind": "refusal", **PHASE}]}, "data.pairs"),
        ({"phases": [{**TAMPER, "lr": -1.0}]}, "phases.0.*lr.*greater than 0"),
        ({"phases": [{**TAMPER, "batch_size": 0}]}, "phases.0.*batch_size"),
        ({"phases": [{**TAMPER, "adversaries": [{"lrs": [-1.0]}]}]}, "phases.0.*adversaries.0.lrs"),
        ({"phases": [{**TAMPER, "every": 9}]}, "every must not be more than inner_steps"),
        ({"phases": [{"kind": "pretrain", "tables": []}, TAMPER]}, "phases.0.*tables"),
        ({"phases": [{"kind": "pretrain", "batch_size": 1}, TAMPER]}, "dealt to the tables"),
        ({"data": {"shares": [0.9, 0.1, 0.0]}}, "shares"),
        ({"data": {"kind": "word"}}, "data.kind: found 'word'"),
        ({"controls": {"before": {"phases": [TAMPER]}}}, "controls.before"),
        ({"controls": {"x": {"after": 9, "phases": [TAMPER]}}}, "more than the phases there are"),
        ({"phases": [TAMPER], "model": {"path": "/nowhere"}}, "model.path: found '/nowhere'"),
        ({"phases": [{**TAMPER, "clients": True}]}, "phases.clients.*data.clients"),
        (
            {"phases": [TAMPER], "data": {"kind": "texts", "retain": "a", "restricted": "b"}},
            "model.path: found nothing",
        ),
    ],
)
def test_wrong_input_is_refused_by_name(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        safeguard({**world(tmp_path), "controls": {}, **change})


def test_texts_that_do_not_do_are_refused(tmp_path, folder):
    values = texts(tmp_path, folder)
    with pytest.raises(InputError, match=r"data\.context: found 4096; allowed: 128 at most"):
        safeguard({**values, "data": {**values["data"], "context": 4096}})
    short = {**values["data"], "most_kb": 1, "shares": [0.01, 0.9, 0.05]}
    with pytest.raises(InputError, match="one row of 16 tokens for adversary"):
        safeguard({**values, "data": short})
    same = {**values["data"], "restricted": values["data"]["retain"]}
    with pytest.raises(InputError, match="share"):
        safeguard({**values, "data": same})
    with pytest.raises(InputError, match=r"data\.pairs.*cannot be read"):
        safeguard({**values, "data": {**values["data"], "pairs": "/nowhere.jsonl"}})
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"question": "a"}\n')
    with pytest.raises(InputError, match=r"line 1 of .*question, choices, answer"):
        safeguard({**values, "data": {**values["data"], "restricted_questions": str(broken)}})


def test_a_model_without_decoder_layers_is_refused():
    with pytest.raises(InputError, match="without decoder layers"):
        layers_of(torch.nn.Linear(2, 2))


def test_presets_hold_the_released_numbers():
    config = load({"preset": "knowledge"})
    tar = config.chain[-1]
    assert isinstance(tar, TAR)
    assert (tar.steps, tar.inner_steps, tar.every, tar.lr) == (750, 64, 4, 2e-5)
    assert sum(tar.points().values()) == pytest.approx(4.438, abs=1e-3)
    refusal = load({"preset": "refusal"}).chain[-1]
    assert isinstance(refusal, TAR)
    assert (refusal.steps, refusal.lr, refusal.weight, refusal.loss) == (100, 6e-5, 0.1, "dpo")


def test_two_processes_train_as_one(tmp_path):
    """FSDP2 over gloo: each holds half of the model, and takes half of every batch."""
    one = safeguard(world(tmp_path / "one", controls={}))
    path = tmp_path / "config.toml"
    path.write_text(load(world(tmp_path / "two", controls={})).as_toml())
    script = (
        "import os, torch; torch.set_num_threads(1)\n"
        "import hansa.safeguard.loop as loop\n"
        # Clocks of two speeds: each rank alone would write checkpoints after other steps.
        "clock, speed = [0.0], 40.0 - 15.0 * int(os.environ['RANK'])\n"
        "loop.monotonic = lambda: clock.append(clock.pop() + speed) or clock[0]\n"
        "from hansa.safeguarding import safeguard\n"
        f"safeguard({str(path)!r})\n"
    )
    runner = tmp_path / "run.py"
    runner.write_text(script)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    subprocess.run(
        [*torchrun, "--nproc-per-node=2", str(runner)],
        check=True,
        capture_output=True,
        timeout=300,
    )
    two = read_bundle(Path(load(path).folder) / "bundle")
    assert set(two.weights) == set(one.bundle.weights)
    for name, value in one.bundle.weights.items():
        torch.testing.assert_close(two.weights[name], value, rtol=1e-3, atol=2e-5)
