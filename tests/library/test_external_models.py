"""External models by folder, s3:// and hub id: refusals, identity, fetching."""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from rlhf.config import PipelineConfig, StoreConfig
from rlhf.errors import ConfigError, StoreConfigError, StoreError
from rlhf.modeling.source import ExternalModel, ExternalTokenizer
from rlhf.store import Producer
from rlhf.store.s3 import S3Backend
from tasks.preflight import preflight
from tasks.runner import run_stage, store_of
from tasks.stages import STAGES
from tests.ceph import CephServer, free_ports
from tests.data.hub import COMMIT, fake_hub
from tests.library import toys
from tests.servers import client_of

FIELD = "ppo.reward_model_path"
BUCKET = "models"


def model(uri: object, ready: bool = True, revision: str | None = None) -> ExternalModel:
    return ExternalModel(FIELD, str(uri), revision=revision, ready=ready)


def refusal(uri: object, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        model(uri, **options).check()
    text = str(caught.value)
    assert text.startswith(f"{FIELD} = {str(uri)!r}: ")
    assert "\n" not in text
    return text


def set_config(folder: Path, **values: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def test_a_good_folder(reward_model, sft, tmp_path):
    model(reward_model).check()
    model(sft, ready=False).check()
    assert model(reward_model).fetch(tmp_path / "unused").folder == reward_model
    assert not (tmp_path / "unused").exists()


def test_places_are_told_apart(tmp_path, monkeypatch, reward_model):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(reward_model, "owner/name")
    for place in ("owner/name", "./owner/name", "~/owner/name", tmp_path / "owner/name"):
        model(place).check()
    for place in ("./none", "~nobody-of-that-name/x", "/no/such", "a/b/c"):
        assert "no model there (no config.json)" in refusal(place)


def test_a_revision_is_for_a_hub_id_alone(tmp_path, monkeypatch, reward_model):
    assert "revision = 'v2' is for a hub id; leave it out" in refusal(reward_model, revision="v2")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(reward_model, "owner/name")
    assert "is for a hub id; leave it out" in refusal("owner/name", revision="v2")
    config = (reward_model / "config.json").read_bytes()
    for uri, message in (("artifact:12ab", "is for a hub id"), ("a/b@v1", "give one of them")):
        with pytest.raises(ConfigError, match=message):
            model(uri, revision="v2").check_config(config)
    model("a/b", revision="v2").check_config(config)


def test_a_base_without_safetensors_is_named_by_its_weights(copy_of, sft, tmp_path):
    """A run checks the source of its tokenizer first, which needs no weights."""
    folder = copy_of(sft)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    ExternalTokenizer("base.path", str(folder)).check()
    settings = {
        "base": {"path": str(folder)}, "data": {"source": str(tmp_path / "pairs.jsonl")},
        "store": str(tmp_path / "store"), "runtime": {"work_dir": str(tmp_path / "work")},
    }  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    with pytest.raises(ConfigError, match=r"its weights are a pickle \(pytorch_model\.bin\)"):
        preflight(PipelineConfig.model_validate(settings))


def test_only_a_classifier_with_one_label_is_ready(sft, reward_model, copy_of):
    must = "must be a sequence-classification model with one label, and this one is "
    assert f"{must}LlamaForCausalLM; give a reward model, or none" in refusal(sft)
    two = set_config(copy_of(reward_model), id2label={"0": "no", "1": "yes"})
    assert f"{must}LlamaForSequenceClassification with 2 labels; give" in refusal(two)
    config = json.loads((two / "config.json").read_text())
    (two / "config.json").write_text(json.dumps({k: v for k, v in config.items() if "2" not in k}))
    assert "with 2 labels" in refusal(two)  # transformers' default, which it does not write down
    assert f"{must}of no named architecture" in refusal(set_config(two, architectures=None))
    model(sft, ready=False).check()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers = '0' in its config.json is no number above"),
        ({"hidden_size": "16"}, "hidden_size = '16'"),
        ({"rope_theta": 0}, "rope_theta = '0'"),
        ({"rope_theta": True}, "rope_theta = 'True'"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, r"rope_scaling.factor = '-1'"),
        (
            {"rope_parameters": {"sliding": {"rope_theta": 0.0}}},
            "rope_parameters.rope_theta = '0.0'",
        ),
        ({"text_config": {"rope_theta": -1.0}}, "rope_theta = '-1.0'"),
        ({"return_dict": False}, "return_dict = False .* answer by a tuple; remove the field"),
        ({"id2label": ["x"]}, r"id2label = .* is no object of names by number"),
        ({"id2label": 5}, "id2label = '5'"),
        ({"id2label": None, "num_labels": "1"}, "num_labels = '1' in its .* write 1 for a reward"),
        # As families have them.
        ({"vision_config": {"num_hidden_layers": 0}, "torchscript": True}, None),
        ({"encoder_layers": 0, "num_hidden_layers": 0}, None),
        ({"return_dict": True, "torchscript": False, "rope_scaling": None}, None),
        ({"rope_theta": [1e4, 1e6], "rope_parameters": {"mrope_section": [1, 1]}}, None),
    ],
)
def test_values_that_no_model_has(reward_model, copy_of, fields, message):
    folder = set_config(copy_of(reward_model), **fields)
    if message is None:
        model(folder).check()
    else:
        assert re.search(message, refusal(folder))


def test_pickles_and_broken_folders_are_refused(reward_model, copy_of):
    folder = copy_of(reward_model)
    (folder / "training_args.bin").write_bytes(b"a pickle beside safetensors is never opened")
    model(folder).check()
    (folder / "model.safetensors").unlink()
    assert "its weights are a pickle (training_args.bin), and only safe" in refusal(folder)
    (folder / "training_args.bin").unlink()
    assert "it has no weights, and only safetensors are read" in refusal(folder)
    shutil.copy(reward_model / "model.safetensors", folder)
    large, deep = "{" + " " * 2**21 + "}", "[" * 10**5
    for text in ("[1]", "{", "\xff", large, deep, '{"a":' * 100 + "1" + "}" * 100):
        (folder / "config.json").write_text(text, encoding="latin-1")
        assert "its config.json is no JSON object" in refusal(folder)


def test_identity_of_a_folder_is_its_content(reward_model, copy_of, tmp_path):
    folder = copy_of(reward_model)
    first = model(reward_model).digest()
    assert model(folder).digest() == first
    (folder / "notes.md").write_text("no part of the model")
    (folder / "optimizer.pt").write_bytes(b"neither")
    (folder / "checkpoint-1").mkdir()
    assert model(folder).digest() == first
    (folder / "added_tokens.json").write_text("{}")
    assert model(folder).digest() != first
    (folder / "added_tokens.json").unlink()
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert model(folder).digest() != first


@pytest.fixture(scope="module")
def client(s3_server: CephServer) -> Iterator[Any]:
    with client_of(s3_server, BUCKET) as client:
        yield client


@pytest.fixture
def upload(
    client: Any, s3_server: CephServer, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Path], str]:
    """Puts a folder's files under a prefix of the test's own and returns its URI."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    prefix = f"{uuid.uuid4().hex}/a model"

    def put(folder: Path) -> str:
        for path in folder.iterdir():
            client.put_object(Bucket=BUCKET, Key=f"{prefix}/{path.name}", Body=path.read_bytes())
        return f"s3://{BUCKET}/{prefix}"

    return put


@pytest.mark.s3
def test_s3(upload, client, reward_model, tmp_path):
    uri = upload(reward_model)
    key = uri.removeprefix(f"s3://{BUCKET}/")
    first = model(uri).digest()
    for name in ("training_args.bin", "old/model.safetensors", "", "2/config.json", ".hidden.json"):
        client.put_object(Bucket=BUCKET, Key=f"{key}/{name}", Body=b"no part of the model")
    client.put_object(Bucket=BUCKET, Key=f"{key}-2/config.json", Body=b"a neighbour")
    model(uri).check()
    model(uri + "/").check()
    assert model(uri).digest() == model(uri + "/").digest()
    folder = model(uri).fetch(tmp_path / "copy").folder
    ours = {p.name: p.read_bytes() for p in reward_model.iterdir()}
    fetched = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert fetched == ours
    assert first == model(uri).digest()
    client.put_object(Bucket=BUCKET, Key=f"{key}/config.json", Body=b"{}")
    assert model(uri).digest() != first


@pytest.mark.s3
def test_s3_refusals(upload, client, reward_model, sft, s3_server, monkeypatch, copy_of):
    pickled = copy_of(reward_model)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    uri = upload(pickled)
    assert "its weights are a pickle (pytorch_model.bin)" in refusal(uri)
    for call in (lambda m: m.digest(), lambda m: m.fetch(Path("unused"))):
        with pytest.raises(ConfigError, match=r"pickle \(pytorch_model.bin\)"):
            call(model(uri))
    assert "LlamaForCausalLM" in refusal(upload(sft))
    assert "holds no object of this name, and none under it" in refusal(f"{uri}/none")
    assert "no model there (no config.json)" in refusal(f"{uri}/config.json")
    with pytest.raises(StoreConfigError, match=rf"^{FIELD} = 's3://no-bucket/x': .* no bucket"):
        model("s3://no-bucket/x").check()
    (port,) = free_ports(1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    with pytest.raises(StoreError, match=f"no answer from http://127.0.0.1:{port}"):
        model(uri).check()


@pytest.mark.s3
def test_stages_start_from_s3(upload, reward_model, sft, data, tmp_path):
    """All three places of the configuration, through the stages themselves."""
    runtime = {"work_dir": str(tmp_path / "work"), "threads": 1}
    tree = {"store": str(tmp_path / "store"), "runtime": runtime, "tracking": {"trackers": []}}
    ready = PipelineConfig.model_validate(
        {
            **tree,
            "rl_reward_model_path": upload(reward_model),
            "ppo": {"max_new_tokens": 8, "critic": "policy"},
        }
    )
    preflight(ready)
    nowhere = {**tree, "runtime": {**runtime, "report_dir": "~no.such.user/x"}}
    with pytest.raises(ConfigError, match=r"report_dir = '~no\.such.*: there is no such user"):
        preflight(PipelineConfig.model_validate(nowhere))
    store = store_of(ready)
    ref = run_stage(STAGES["train-reward-model"], ready, {}).ref
    toys.assert_same_weights(store.fetch(ref), reward_model)
    assert run_stage(STAGES["train-reward-model"], ready, {}).cached
    producer = Producer(stage="x", code_version="1", config={}, seed=0, versions={})
    rows = store.publish(data, "dataset", parents={}, producer=producer, metrics={})
    uri = upload(sft)  # the same prefix: what lies there changed
    with pytest.raises(ConfigError, match="LlamaForCausalLM"):
        preflight(ready)
    training = {"epochs": 0.2, "max_length": 48, "base": uri}
    start = {"base": {"path": uri}, "sft": {"enabled": False}, "reward_model": training}
    start["ppo"] = {"max_new_tokens": 8}
    based = PipelineConfig.model_validate({**tree, **start})
    preflight(based)
    policy = run_stage(STAGES["train-sft"], based, {"data": rows}).ref
    toys.assert_same_weights(store.fetch(policy), sft)
    inputs = {"data": rows, "sft": policy}
    assert run_stage(STAGES["train-reward-model"], based, inputs).metrics["pairs"] == 96
    left = [p.name for p in (tmp_path / "work").iterdir() if p.suffix != ".lock"]
    assert sorted(left) == ["cache", "checkpoints", "rehearsals"]
    assert [*(tmp_path / "work" / "checkpoints").iterdir()] == []


@pytest.mark.s3
def test_options_of_the_store_are_used(upload, reward_model, s3_server, monkeypatch):
    uri = upload(reward_model)
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    options = StoreConfig(endpoint_url=s3_server.endpoint, region="us-east-1")
    ExternalModel(FIELD, uri, options=options).check()


@pytest.mark.s3
def test_objects_that_change_while_they_are_read(
    upload, client, reward_model, monkeypatch, tmp_path
):
    uri = upload(reward_model)
    key = uri.removeprefix(f"s3://{BUCKET}/")
    download = S3Backend.get_file

    def late(self, name, path):
        download(self, name, path)
        client.put_object(Bucket=BUCKET, Key=f"{key}/tokenizer.json", Body=b"{}")

    monkeypatch.setattr(S3Backend, "get_file", late)
    with pytest.raises(StoreError, match="it changed while it was being read; try again") as caught:
        model(uri).fetch(tmp_path / "copy")
    assert caught.value.retriable


@pytest.fixture
def hub(monkeypatch, tmp_path, reward_model, request) -> Iterator[Any]:
    """A hub that holds the reward model as `acme/rm`, beside a pickle and a nested copy."""
    files = {p.name: p.read_bytes() for p in reward_model.iterdir()}
    files |= {"pytorch_model.bin": b"a pickle", "original/model.safetensors": b"deeper"}
    for name in getattr(request, "param", ()):
        del files[name]
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with fake_hub(files, repo="models/acme/rm") as server:
        use(monkeypatch, server.url)
        yield server


def use(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    from huggingface_hub import hf_api

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(hf_api.api, "endpoint", url)
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def test_hub(hub, reward_model, tmp_path, monkeypatch):
    for place, revision in (("acme/rm", None), ("acme/rm@v1", None), ("acme/rm", "v1")):
        model(place, revision=revision).check()
        assert model(place, revision=revision).digest() == f"acme/rm@{COMMIT}"
    assert [path for path in hub.asked if "config.json" not in path] == []
    folder = model("acme/rm").fetch(tmp_path / "unused").folder
    ours = {p.name: p.read_bytes() for p in reward_model.iterdir()}
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == ours
    assert not [path for path in hub.asked if path.endswith(".bin")]
    # Without a network, what the hub's cache holds is enough.
    (port,) = free_ports(1)
    use(monkeypatch, f"http://127.0.0.1:{port}")
    assert model("acme/rm").digest() == f"acme/rm@{COMMIT}"
    assert model("acme/rm").fetch(tmp_path / "unused").folder == folder


@pytest.mark.parametrize("hub", [["model.safetensors"]], indirect=True)
def test_hub_model_without_safetensors(hub, tmp_path):
    with pytest.raises(ConfigError, match="it has no weights, and only safetensors are read"):
        model("acme/rm").fetch(tmp_path / "unused")


def test_hub_that_knows_no_such_model(hub):
    assert "no such folder here, and the hub gives no config.json" in refusal("acme/other")
