"""Publish and load with the real `huggingface_hub`, `transformers` and `datasets`, on a local Hub."""

import hashlib
import json
import re

import pytest
from hub_client import ROOT, Client, copy_with_card, run_without_package
from hub_http import Fault
from hub_server import Account, HubServer
from PIL import Image
from safetensors.torch import load_file

from dataset_scripts import load_tagging_dataset
from modeling_optsg import OPTSGForTagGeneration, OPTSGProcessor
from modeling_optsg.pipeline_optsg import CUSTOM_PIPELINES

SHIPPED = ROOT / "checkpoints/optsg-icon-small"
IMAGE, TITLE = ROOT / "examples/images/bus.png", "bus"
TOKENS = {
    "hf_writes": Account("ann", ("org",)),
    "hf_reads": Account("ann", ("org",), role="read"),
    "hf_stranger": Account("bob"),
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("hub") / "files", TOKENS).running() as hub:
        yield hub
        assert hub.problems() == []


@pytest.fixture(scope="module")
def optsg(hub, tmp_path_factory):
    client = Client(hub.endpoint, tmp_path_factory.mktemp("client") / "home", "hf_writes")
    yield client
    client.close()


@pytest.fixture
def fault(hub):
    """Inject a fault until the end of the test."""

    def make(*arguments, **settings):
        hub.faults.append(Fault(*arguments, **settings))
        return hub.faults[-1]

    yield make
    hub.faults.clear()


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    return copy_with_card(tiny_checkpoint, tmp_path / "tiny")


@pytest.fixture
def sharded(folder, make_model):
    """The folder with its weights in several files."""
    (folder / "model.safetensors").unlink()
    model = make_model()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


PUSHES = """
from modeling_optsg import OPTSGForTagGeneration, OPTSGProcessor
OPTSGForTagGeneration.from_pretrained({0!r}).push_to_hub("org/own")
OPTSGProcessor.from_pretrained({0!r}).push_to_hub("org/own")
"""
LOADS = """
import hashlib, json, sys
from pathlib import Path
from datasets import load_dataset
from huggingface_hub import snapshot_download
from transformers import AutoModel, AutoProcessor, pipeline

def tags(name, **example):
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
    model = AutoModel.from_pretrained(name, trust_remote_code=True)
    return type(model).__module__, processor.batch_decode(model.generate(**processor(**example)))[0]

image, title = sys.argv[1:]
found = {}
found["code"], found["tags"] = tags("org/optsg-icon-small", images=[image], titles=[title])
tagger = pipeline("tag-generation", model="org/optsg-icon-small", trust_remote_code=True)
found["pipeline"] = tagger({"image": image, "title": title})
_, found["own"] = tags("org/own", titles=["a red square"])
folder = Path(snapshot_download("org/optsg-icon-small", cache_dir="downloaded"))
files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".gitattributes")
found["files"] = {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
found["rows"] = [
    [split, row["title"], row["tags"], list(row["image"].getpixel((0, 0)))]
    for split, rows in load_dataset("org/images").items()
    for row in rows
]
found["refused"] = []
for load, more in ((AutoModel.from_pretrained, {"trust_remote_code": True}), (load_dataset, {})):
    try:
        load("org/private", **more)
    except Exception as error:
        found["refused"].append(f"{type(error).__name__}: {error}")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(hub, optsg, shipped, images, tiny_checkpoint, tmp_path_factory):
    """Published models and datasets as loaded by a process without a token, a cache and this package."""
    root = tmp_path_factory.mktemp("without_package")
    done = [
        optsg.python(PUSHES.format(str(tiny_checkpoint))),
        optsg("push", copy_with_card(tiny_checkpoint, root / "tiny"), "org/private", "--private"),
        optsg("export", images, root / "exported", "--push-to-hub", "org/images"),
        optsg("export", images, root / "exported", "--push-to-hub", "org/private", "--private"),
    ]
    assert [status for status, _, _ in done] == [0] * 4, done
    hub.faults.append(Fault("GET /objects/", times=1, drop_after=10_000_000))
    found = run_without_package(LOADS, [IMAGE, TITLE], hub.endpoint, root / "home", token="")
    assert hub.faults.pop().times == 0, "no download was cut off"
    return found


@pytest.fixture(scope="module")
def shipped(hub, optsg):
    """Publish the shipped checkpoint; exit status and outputs of the command."""
    return optsg("push", SHIPPED, "org/optsg-icon-small")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 3), ("test", 2)):
        (root / split).mkdir()
        rows = []
        for number in range(count):
            # Noise, which PNG cannot compress.
            Image.effect_noise((32, 32), 80 + number).convert("RGB").save(root / split / f"{number}.png")
            rows.append({"file_name": f"{number}.png", "title": f"凉面 {number}", "tags": ["美食", f"tag {number}"]})
        (root / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return root


def history(hub, repo, revision="main", kind="models"):
    """Return the titles of the commits, the latest first, without the initial one."""
    return [commit.title for commit in hub.repository(repo, kind).history(revision)][:-1]


def tags_here():
    processor = OPTSGProcessor.from_pretrained(SHIPPED)
    model = OPTSGForTagGeneration.from_pretrained(SHIPPED)
    return processor.batch_decode(model.generate(**processor(images=[IMAGE], titles=[TITLE])))[0]


def same_tags(tags, expected):
    assert [tag["tag"] for tag in tags] == [tag["tag"] for tag in expected] and len(expected) > 1
    assert [tag["score"] for tag in tags] == pytest.approx([tag["score"] for tag in expected], rel=1e-3)


def one_line(error):
    """Return the error message, which must be the command's only line apart from files left out."""
    assert "Traceback" not in error
    [line] = [line for line in error.splitlines() if line.startswith("optsg ") and "left out" not in line]
    return line


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_shipped_checkpoint_is_published_by_one_commit(hub, shipped):
    status, output, error = shipped
    assert status == 0, error
    assert re.fullmatch(rf"{hub.endpoint}/org/optsg-icon-small/commit/[0-9a-f]{{40}}\n", output)
    local, published = files_of(SHIPPED), hub.contents("org/optsg-icon-small")
    assert local.keys() - published.keys() == {"training_log.jsonl"} and "left out: training_log.jsonl" in error
    card = local["README.md"].replace(b'"FOLDER"', b'"org/optsg-icon-small"')
    assert published.pop("README.md") == card and b'model="org/optsg-icon-small"' in card
    changed = {name for name in local.keys() & published.keys() if local[name] != published[name]}
    assert changed == {"config.json", "processor_config.json"}
    assert history(hub, "org/optsg-icon-small") == ["Upload model, processor and code"]
    # The weights are uploaded in parts, because they exceed this Hub's part size.
    assert len(hub.requests(r"PUT /objects/models/org/optsg-icon-small/\w{64}/\d+")) == 5


def test_a_push_adds_the_code_and_the_endpoint_files(hub, shipped):
    published = hub.contents("org/optsg-icon-small")
    package = ROOT / "modeling_optsg"
    code = {name: content for name, content in published.items() if name.endswith(".py") and name != "handler.py"}
    assert {"configuration_optsg.py", "modeling_optsg.py", "processing_optsg.py", "pipeline_optsg.py"} <= code.keys()
    assert all((package / name).read_bytes() == content for name, content in code.items())
    for name in ("handler.py", "requirements.txt"):
        assert published[name] == (package / "hub" / name).read_bytes()
    config = json.loads(published["config.json"])
    assert config.pop("auto_map") == {
        "AutoConfig": "configuration_optsg.OPTSGConfig",
        "AutoModel": "modeling_optsg.OPTSGForTagGeneration",
    }
    assert config.pop("custom_pipelines") == CUSTOM_PIPELINES
    assert config == json.loads((SHIPPED / "config.json").read_bytes())
    processor = json.loads(published["processor_config.json"])
    assert processor.pop("auto_map") == {"AutoProcessor": "processing_optsg.OPTSGProcessor"}
    assert processor == json.loads((SHIPPED / "processor_config.json").read_bytes())


def test_a_published_model_loads_with_this_package(optsg, shipped):
    status, output, error = optsg("tag", IMAGE, "--title", TITLE, "--model", "org/optsg-icon-small", "--json")
    assert status == 0, error
    same_tags(json.loads(output)["tags"], tags_here())


def test_a_published_model_loads_without_this_package(found):
    same_tags(found["tags"], tags_here())
    same_tags([tag | {"tag": tag.pop("label")} for tag in found["pipeline"]], tags_here())
    assert found["code"].startswith("transformers_modules.org.")


def test_a_download_that_is_cut_off_is_completed(hub, found):
    published = hub.contents("org/optsg-icon-small")
    assert found["files"] == {name: hashlib.sha256(content).hexdigest() for name, content in published.items()}


def test_a_model_pushed_by_transformers_loads(hub, found, tiny_checkpoint):
    saved = {path.relative_to(tiny_checkpoint).as_posix() for path in tiny_checkpoint.rglob("*") if path.is_file()}
    assert saved <= hub.contents("org/own").keys()
    processor = OPTSGProcessor.from_pretrained(tiny_checkpoint)
    model = OPTSGForTagGeneration.from_pretrained(tiny_checkpoint)
    same_tags(found["own"], processor.batch_decode(model.generate(**processor(titles=["a red square"])))[0])


def test_an_exported_dataset_loads_by_its_name(hub, found, images):
    expected = [
        [split, row["title"], row["tags"], list(row["image"].getpixel((0, 0)))]
        for split, rows in load_tagging_dataset(images).items()
        for row in rows
    ]
    assert found["rows"] == expected and len(expected) == 5
    assert history(hub, "org/images", kind="datasets") == ["Upload dataset"]


def test_private_repositories_are_hidden_from_others(hub, found):
    assert hub.repository("org/private").private and hub.repository("org/private", "datasets").private
    assert len(found["refused"]) == 2
    for message in found["refused"]:
        assert "org/private" in message and re.search("private|doesn't exist", message)


def test_pushing_unchanged_files_makes_no_commit(hub, optsg, folder):
    assert optsg("push", folder, "org/same")[0] == 0
    sent = len(hub.requests("PUT"))
    status, output, error = optsg("push", folder, "org/same")
    assert status == 0 and "nothing to change" in error
    assert hub.repository("org/same").refs["refs/heads/main"] in output
    assert len(history(hub, "org/same")) == 1 and len(hub.requests("PUT")) == sent


def test_a_dry_run_sends_no_request(hub, optsg, folder):
    before = len(hub.requests(""))
    status, output, _ = optsg("push", folder, "org/dry", "--dry-run", token="")
    listed = {line.split()[1] for line in output.splitlines()}
    assert status == 0 and {"config.json", "model.safetensors", "tag_tokenizer/tokenizer.json"} <= listed
    assert len(hub.requests("")) == before


def test_branches_and_pull_requests_leave_main_alone(hub, optsg, folder, make_model):
    assert optsg("push", folder, "org/revised")[0] == 0
    main = hub.contents("org/revised")
    make_model(seed=1).save_pretrained(folder)
    status, _, error = optsg("push", folder, "org/revised", "--revision", "v2", "--commit-message", "Second seed")
    assert status == 0, error
    assert history(hub, "org/revised", "v2")[0] == "Second seed"
    make_model(seed=2).save_pretrained(folder)
    # A user without write access may open a pull request.
    status, output, error = optsg("push", folder, "org/revised", "--create-pr", token="hf_stranger")
    assert (status, output) == (0, f"{hub.endpoint}/org/revised/discussions/1\n"), error
    assert hub.contents("org/revised") == main
    code = """
from modeling_optsg import OPTSGForTagGeneration
for revision in ("main", "v2", "refs/pr/1"):
    model = OPTSGForTagGeneration.from_pretrained("org/revised", revision=revision)
    print(model.tag_decoder.token_embeddings.weight.sum().item())
"""
    status, output, error = optsg.python(code)
    assert status == 0, error
    name = "tag_decoder.token_embeddings.weight"
    expected = [load_weights(hub, folder.parent, r)[name].sum().item() for r in ("main", "v2", "refs/pr/1")]
    assert len(set(expected)) == 3
    assert [float(line) for line in output.split()] == pytest.approx(expected)


def test_a_pull_request_is_pushed_to_again_by_its_revision(hub, optsg, folder):
    hub.create("org/proposed")
    assert optsg("push", folder, "org/proposed", "--create-pr")[0] == 0
    (folder / "README.md").write_text((folder / "README.md").read_text() + "More.\n")
    status, _, error = optsg("push", folder, "org/proposed", "--revision", "refs/pr/1")
    assert status == 0, error
    assert len(history(hub, "org/proposed", "refs/pr/1")) == 2 and hub.contents("org/proposed") == {}


def test_the_local_hub_serves_other_calls_of_the_client(hub, optsg, shipped):
    code = """
from huggingface_hub import HfApi
api = HfApi()
assert api.whoami()["name"] == "ann"
api.create_tag("org/optsg-icon-small", tag="v1.0")
refs = api.list_repo_refs("org/optsg-icon-small", include_pull_requests=True)
assert [tag.name for tag in refs.tags] == ["v1.0"] and [branch.name for branch in refs.branches] == ["main"]
assert [c.title for c in api.list_repo_commits("org/optsg-icon-small", revision="v1.0")][-1] == "initial commit"
[info] = api.get_paths_info("org/optsg-icon-small", ["model.safetensors", "nothing"])
assert info.lfs.size == info.size and api.model_info("org/optsg-icon-small").pipeline_tag == "image-classification"
api.create_repo("org/demo", repo_type="space", space_sdk="gradio")
api.upload_file(path_or_fileobj=b"print()", path_in_repo="app.py", repo_id="org/demo", repo_type="space")
api.delete_file("app.py", "org/demo", repo_type="space")
"""
    status, _, error = optsg.python(code)
    assert status == 0, error
    assert len(history(hub, "org/demo", kind="spaces")) == 2 and hub.contents("org/demo", kind="spaces") == {}


def load_weights(hub, tmp_path, revision):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(hub.contents("org/revised", revision)["model.safetensors"])
    return load_file(path)


def test_new_weight_files_replace_the_old_ones(hub, optsg, sharded, make_model):
    assert optsg("push", sharded, "org/shards")[0] == 0
    hub.change("org/shards", "NOTES.md", b"by another user")
    for path in [*sharded.glob("model-*"), sharded / "model.safetensors.index.json"]:
        path.unlink()
    make_model().save_pretrained(sharded)
    assert optsg("push", sharded, "org/shards")[0] == 0
    weights = {name for name in hub.contents("org/shards") if "safetensors" in name}
    assert weights == {"model.safetensors"} and "NOTES.md" in hub.contents("org/shards")


@pytest.mark.parametrize(
    ("token", "name", "status", "message"),
    [
        ("", "org/a", 1, "hf auth login"),
        ("hf_wrong", "org/a", 1, "does not accept this token"),
        ("hf_reads", "org/a", 1, "may not write to org/a"),
        ("hf_stranger", "org/a", 1, 'under the namespace "org"'),
        ("hf_writes", "nobody/a", 1, 'under the namespace "nobody"'),
        ("hf_writes", "a", 2, "give org/name"),
        ("hf_writes", "org/a/b", 2, "not a repository name"),
        ("hf_writes", "org/-a..", 2, "not a repository name"),
    ],
)
def test_a_push_without_permission_says_why(hub, optsg, folder, token, name, status, message):
    exit_status, output, error = optsg("push", folder, name, token=token)
    assert (exit_status, output) == (status, "") and message in one_line(error)
    assert not {"org/a", "nobody/a"} & {repo for _, repo in hub.repositories}


def test_a_private_push_to_a_public_repository_is_refused(hub, optsg, folder):
    hub.create("org/public")
    status, _, error = optsg("push", folder, "org/public", "--private")
    assert status == 1 and "already exists and is public" in one_line(error) and not hub.contents("org/public")


def test_a_pull_request_needs_a_repository(optsg, folder):
    status, _, error = optsg("push", folder, "org/nothing", "--create-pr")
    assert status == 1 and "no repository org/nothing" in one_line(error)


def test_after_a_lost_connection_only_missing_files_are_sent(hub, optsg, sharded, fault):
    shards = {hashlib.sha256(path.read_bytes()).hexdigest() for path in sharded.glob("*.safetensors")}
    lost = max(shards)
    broken = fault(f"PUT /objects/.*/{lost}", drop_after=5_000)
    status, output, error = optsg("push", sharded, "org/lost")
    assert (status, output) == (1, ""), error
    assert "connection was lost" in one_line(error) and "nothing was published" in one_line(error)
    assert re.search(r"uploading 'model-0000\d-of-0000\d\.safetensors'", error)
    sent = {shard: len(hub.requests(f"PUT /objects/models/org/lost/{shard}")) for shard in shards}
    assert sent[lost] == 6, "the client retries"
    arrived = {shard for shard in shards - {lost} if sent[shard]}
    assert arrived and hub.contents("org/lost") == {} and history(hub, "org/lost") == []
    broken.times = 0
    assert optsg("push", sharded, "org/lost")[0] == 0
    assert all(len(hub.requests(f"PUT /objects/models/org/lost/{shard}")) == 1 for shard in arrived)
    for path in sharded.glob("*.safetensors"):
        assert hub.contents("org/lost")[path.name] == path.read_bytes()


def test_a_lost_answer_to_the_commit_is_reported_as_unknown(hub, optsg, folder, fault):
    fault("POST .*/commit/", times=1, lose_answer=True)
    status, _, error = optsg("push", folder, "org/unknown")
    assert status == 1 and "the commit may have been made; push again" in one_line(error)
    status, _, error = optsg("push", folder, "org/unknown")
    assert status == 0 and "nothing to change" in error and len(history(hub, "org/unknown")) == 1


def test_server_errors_are_retried_and_then_reported(hub, optsg, folder, fault):
    fault("PUT /objects", times=2, status=503)
    assert optsg("push", folder, "org/moment")[0] == 0
    fault("/preupload/", status=500)
    status, _, error = optsg("push", folder, "org/moment")
    assert status == 1 and "the Hub answers 500" in one_line(error)


def test_a_corrupted_upload_is_refused(hub, optsg, folder, fault):
    broken = fault("PUT /objects", alter=True)
    status, _, error = optsg("push", folder, "org/altered")
    assert status == 1 and "'model.safetensors'" in one_line(error) and "SHA-256" in one_line(error)
    assert hub.contents("org/altered") == {}
    broken.times = 0
    assert optsg("push", folder, "org/altered")[0] == 0
    assert hub.contents("org/altered")["model.safetensors"] == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("name", "when"),
    [("model.safetensors", "/lfs/objects/batch"), ("config.json", "PUT /objects"), ("README.md", "/preupload/")],
)
def test_a_file_that_changes_during_the_upload_is_named(hub, optsg, folder, fault, name, when):
    def write():
        with (folder / name).open("ab") as file:
            file.write(b"\n")

    changes = fault(when, times=1, action=write)
    repo = f"org/changed-{name.partition('.')[0]}"
    status, _, error = optsg("push", folder, repo)
    assert changes.times == 0 and status == 1, error
    assert f"{name} changed during the upload; nothing was published" in one_line(error)
    assert hub.contents(repo) == {}


def test_a_concurrent_commit_is_not_overwritten(hub, optsg, folder, fault):
    hub.create("org/shared")
    fault("/preupload/", times=1, action=lambda: hub.change("org/shared", "config.json", b"theirs"))
    status, _, error = optsg("push", folder, "org/shared")
    assert status == 1 and "org/shared was changed by another commit" in one_line(error)
    assert hub.contents("org/shared") == {"config.json": b"theirs"}
    assert optsg("push", folder, "org/shared")[0] == 0


def test_new_files_of_a_dataset_replace_the_old_ones(hub, optsg, images, tmp_path):
    for size in ("1KB", "500MB"):
        arguments = ("export", images, tmp_path / "out", "--max-shard-size", size, "--push-to-hub", "org/resized")
        status, _, error = optsg(*arguments)
        assert status == 0, error
        written = {path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")}
        assert hub.contents("org/resized", kind="datasets").keys() == written
    assert len(written) == 3 and len(history(hub, "org/resized", kind="datasets")) == 2


def test_a_dataset_that_cannot_be_published_stays_on_disk(hub, optsg, images, tmp_path):
    arguments = ("export", images, tmp_path / "out", "--push-to-hub")
    status, _, error = optsg(*arguments, "images")
    assert status == 2 and "give org/name" in one_line(error) and not (tmp_path / "out").exists()
    status, _, error = optsg(*arguments, "org/no", token="hf_wrong")
    assert status == 1 and "the Hub does not accept this token" in one_line(error)
    assert (tmp_path / "out/README.md").is_file()


def test_training_publishes_at_its_end_and_survives_a_failure(hub, optsg, images, towers, tmp_path):
    small = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_prompts": 3}
    arguments = ["--dataset", images, "--output_dir", tmp_path / "run", "--cache_dir", tmp_path / "cache"]
    arguments += ["--vision_tower", towers / "vision", "--text_tower", towers / "text"]
    arguments += ["--config_overrides", json.dumps(small), "--tag_vocab_size", 260, "--num_train_epochs", 1]
    arguments += ["--eval_steps", 0.99, "--validation_ratio", 0.4, "--train_batch_size", 2, "--num_negatives", 1]
    arguments += ["--push_to_hub", "org/trained", "--hub_private_repo", True]
    code = f"""
from modeling_optsg.training.trainer import main
main({list(map(str, arguments))!r})
"""
    status, _, error = optsg.python(code, token="hf_stranger")
    assert status == 0, error
    command = f"optsg push {tmp_path / 'run'} org/trained --private"
    assert "Training has finished, but publishing failed" in error and command in error
    assert json.loads((tmp_path / "run/state/status.json").read_text())["status"] == "finished"
    status, _, error = optsg(*command.split()[1:])
    assert status == 0, error
    published = hub.contents("org/trained")
    assert hub.repository("org/trained").private
    assert not [name for name in published if "state" in name or "log" in name]
    assert str(tmp_path) not in b"".join(published.values()).decode("utf-8", "ignore")
    assert json.loads(published["training_summary.json"])["arguments"]["vision_tower"] == "vision"
    card = published["README.md"].decode()
    assert 'from_pretrained("org/trained"' in card and "metrics on the validation split" in card
