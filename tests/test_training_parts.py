"""Parts of the training loop: steps that do not depend on processes, saved states, the log and the status."""

import copy
import json
import sys

import pytest
import torch
from accelerate import Accelerator, PartialState
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import BertModel

from modeling_optsg.data.checksums import write_checksums
from modeling_optsg.training import (
    GlobalBatches,
    OPTSGTrainingArguments,
    RunState,
    RunStatus,
    SeededExamples,
    SkippingCollator,
    build_model,
    num_micro_batches,
)
from modeling_optsg.training.interruption import Interrupted
from modeling_optsg.training.model_building import _config_overrides, freeze_text_layers, read_image_words
from modeling_optsg.training.optimizer import parameter_groups
from modeling_optsg.training.preparation import prepare_training_run
from modeling_optsg.training.training_log import SlotChanges, TrainingLog
from modeling_optsg.training.unreadable_examples import UnreadableExamples


@pytest.mark.parametrize("processes, micro_batches", [(1, 1), (2, 1), (3, 2), (4, 1)])
def test_a_step_does_not_depend_on_processes_and_micro_batches(processes, micro_batches):
    whole = list(GlobalBatches(23, 12, 8, seed=3))
    divided = [
        list(GlobalBatches(23, 12, 8, seed=3, process=process, num_processes=processes, micro_batches=micro_batches))
        for process in range(processes)
    ]
    for step, expected in enumerate(whole):
        batches = [own[step * micro_batches + index] for own in divided for index in range(micro_batches)]
        assert [pair for batch in batches for pair in batch] == expected and all(batches)


def test_each_epoch_has_all_examples_in_another_order():
    order = [example for batch in GlobalBatches(23, 5, 14, seed=0) for example, _ in batch]
    epochs = [order[:23], order[23:46], order[46:69]]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert order != [example for batch in GlobalBatches(23, 5, 14, seed=1) for example, _ in batch]


def test_a_resumed_sampler_yields_the_remaining_batches():
    whole = list(GlobalBatches(23, 5, 14, seed=0, micro_batches=2))
    rest = GlobalBatches(23, 5, 14, seed=0, micro_batches=2, start=6)
    assert list(rest) == whole[12:] and len(rest) == 16


def test_steps_grouped_by_length_contain_all_examples():
    lengths = [1 + (7 * example) % 40 for example in range(400)]
    settings = {"lengths": lengths, "seed": 0}
    order = [[example for example, _ in batch] for batch in GlobalBatches(400, 10, 80, **settings)]
    first, second = ([example for batch in half for example in batch] for half in (order[:40], order[40:]))
    assert sorted(first) == sorted(second) == list(range(400)) and first != second
    ranges = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in order]
    # The lengths are 1 to 40; ten random ones would span nearly all of them.
    assert sum(ranges) / len(ranges) < 8
    partition = {"process": 1, "num_processes": 2, "start": 3}
    own = [[example for example, _ in batch] for batch in GlobalBatches(400, 10, 80, **settings, **partition)]
    assert own == [batch[5:] for batch in order[3:]]


def test_length_groups_begin_with_each_epoch():
    # 405 examples: an epoch ends in the middle of a step.
    lengths = [1 + example % 40 for example in range(405)]
    batches = [
        [lengths[example] for example, _ in batch] for batch in GlobalBatches(405, 10, 200, seed=0, lengths=lengths)
    ]
    assert sum(max(batch) - min(batch) > 25 for batch in batches) < 20
    order = [example for batch in GlobalBatches(405, 10, 81, seed=0, lengths=lengths) for example, _ in batch]
    assert sorted(order[:405]) == sorted(order[405:]) == list(range(405))


def test_examples_have_another_seed_in_each_epoch():
    pairs = [pair for batch in GlobalBatches(4, 4, 2, seed=0) for pair in batch]
    assert len({seed for _, seed in pairs}) == 8
    assert SeededExamples([{"a": 1}])[(0, 17)] == {"a": 1, "example_index": 0, "example_seed": 17}


def test_the_number_of_micro_batches_follows_from_the_limit():
    assert num_micro_batches(512, 8, None) == 1 and num_micro_batches(512, 8, 64) == 1
    assert num_micro_batches(512, 8, 30) == 3 and num_micro_batches(1024, 16, 64) == 1
    with pytest.raises(ValueError, match="4 examples is too small for 8 processes"):
        num_micro_batches(4, 8, None)
    with pytest.raises(ValueError, match="must be at least 1, not 0"):
        num_micro_batches(4, 2, 0)
    with pytest.raises(ValueError, match="5 examples cannot be divided among 4 processes with 2 micro-batches"):
        num_micro_batches(5, 4, 1)
    with pytest.raises(ValueError, match="no examples"):
        GlobalBatches(0, 4, 2, seed=0)


def test_embeddings_and_towers_have_learning_rates_of_their_own(make_model):
    model = make_model(num_tag_classes=3)
    rates = {"learning_rate": 1.0, "tower_learning_rate": 0.1, "embedding_lr_multiplier": 0.5}
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {
        names[parameter]: (group["lr"], group["weight_decay"])
        for group in parameter_groups(model, **rates, weight_decay=0.2)
        for parameter in group["params"]
    }
    assert found.keys() == {name for name, _ in model.named_parameters() if ".pooler." not in name}
    assert found["tag_decoder.token_embeddings.weight"] == (0.5, 0.0)
    assert found["tag_classifier.class_embeddings.weight"] == (0.5, 0.0)
    assert found["model.multimodal_encoder.evidence_pooler.image_inner.weight"] == (1.0, 0.2)
    assert found["model.prompt_encoder.queries"] == found["tag_decoder.positions.weight"] == (1.0, 0.0)
    assert {rate for name, (rate, _) in found.items() if "_tower." in name} == {0.1}


def test_only_the_upper_text_layers_are_trained(tower_configs):
    config = copy.deepcopy(tower_configs["bert"])
    config.num_hidden_layers = 3
    tower = BertModel(config)

    def trained():
        return {name for name, parameter in tower.named_parameters() if parameter.requires_grad}

    names = {name for name in trained() if not name.startswith("pooler.")}
    for number, layers in ((0, ()), (1, ("layer.2.",)), (2, ("layer.1.", "layer.2.")), (3, ("layer.",))):
        freeze_text_layers(tower, number)
        assert trained() == {name for name in names if any(layer in name for layer in layers)}
    freeze_text_layers(tower, -1)
    assert trained() == names
    with pytest.raises(ValueError, match="--train_text_layers 4: the text tower has 3 layers"):
        freeze_text_layers(tower, 4)


def _refuse_every_fifth(examples):
    if bad := [example["example_index"] for example in examples if example["example_index"] % 5 == 3]:
        raise ValueError(f"example {bad[0]} is broken")
    return {"size": len(examples)}


def _examples(*indices):
    return [{"example_index": index} for index in indices]


def test_unreadable_examples_are_left_out_of_a_batch():
    collate = SkippingCollator(_refuse_every_fifth, [])
    found = collate(_examples(*range(5)))
    assert (found.example_indices, found.inputs, found.weight) == ([0, 1, 2, 4], {"size": 4}, 1.0)
    assert found.unreadable == {3: "example 3 is broken"}


def test_a_batch_without_readable_examples_has_a_substitute():
    collate = SkippingCollator(_refuse_every_fifth, _examples(3, 4))
    collate(_examples(0, 1))
    found = collate(_examples(3, 8))
    assert (found.example_indices, found.weight, len(found.unreadable)) == ([], 0.0, 2)
    # Always the first readable example, so that a resumed run has the same one.
    assert collate.substitute == {"example_index": 4, "example_seed": 0}


def test_a_substitute_is_looked_for_among_some_examples():
    others = _examples(3, 8, 13, 14)
    found = SkippingCollator(_refuse_every_fifth, others)([{"example_index": 8, "id": "v8"}])
    assert (found.example_indices, found.weight, found.unreadable) == ([], 0.0, {"v8": "example 8 is broken"})
    with pytest.raises(ValueError, match="None of the 1 examples of a batch can be read.*example 8 is broken"):
        SkippingCollator(_refuse_every_fifth, others, max_tries=3)(_examples(8))


def test_each_unreadable_example_counts_once_also_after_resuming():
    record = UnreadableExamples(2)
    for _ in range(3):
        record.record(record.not_recorded({3: "example 3 is broken"}))
    record.record(record.not_recorded({8: "example 8 is broken"}))
    assert record.reasons == {"3": "example 3 is broken", "8": "example 8 is broken"}
    resumed = UnreadableExamples(2, json.loads(json.dumps(record.reasons)))
    assert not resumed.not_recorded({3: "example 3 is broken"})
    with pytest.raises(ValueError, match="3 training examples cannot be read, more than max_unreadable=2: example"):
        resumed.record(resumed.not_recorded({9: "example 9 is broken"}))


def test_tags_that_change_slots_are_counted():
    changes, labels = SlotChanges(), torch.tensor([[[10, -100], [20, 4]], [[30, -100], [10, -100]]])
    changes.record([0, 1], torch.tensor([[0, 1, -1], [0, -1, -1]]), labels)
    assert changes.ratio() is None
    changes.record([0, 1], torch.tensor([[0, -1, 1], [0, 1, -1]]), torch.nn.functional.pad(labels, (0, 3), value=-100))
    assert changes.ratio() == pytest.approx(1 / 3)


def test_slot_changes_follow_a_limited_number_of_examples():
    changes, labels = SlotChanges(max_examples=1), torch.tensor([[[10]], [[10]]])
    for slots in ([[0, -1], [0, -1]], [[-1, 0], [0, -1]]):
        changes.record([7, 8], torch.tensor(slots), labels)
    assert changes.ratio() == 1.0 and list(changes.slots) == [7]


@pytest.fixture
def make_state(tmp_path):
    """Make the state of a model of two linear layers, one of them frozen."""

    def make(arguments=None, keep=2):
        accelerator = Accelerator(cpu=True)
        accelerator.free_memory()
        torch.manual_seed(0)
        model = torch.nn.ModuleDict({"frozen": torch.nn.Linear(3, 3), "trained": torch.nn.Linear(3, 3)})
        model["frozen"].requires_grad_(False)
        optimizer = torch.optim.AdamW(model["trained"].parameters())
        model, optimizer = accelerator.prepare(model, optimizer)
        return RunState(accelerator, tmp_path / "state", arguments or {"seed": 0}, keep), model

    return make


def test_a_state_is_complete_or_not_there(make_state, tmp_path, monkeypatch):
    run, model = make_state()
    run.save(5, {"best_metric": 1.5})
    with torch.no_grad():
        model["trained"].weight.fill_(7.0)
    (tmp_path / "state/step-00000010.partial").mkdir()
    (tmp_path / "state/step-00000011").mkdir()  # without its progress and checksums
    resumed, fresh = make_state()
    assert resumed.load("auto") == {"step": 5, "best_metric": 1.5}
    assert not (fresh["trained"].weight == 7.0).any()
    saved = torch.load(tmp_path / "state/step-00000005/pytorch_model.bin", weights_only=True)
    assert set(saved) == {"trained.weight", "trained.bias"}

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    (tmp_path / "state/step-00000010.partial").rmdir()
    (tmp_path / "state/step-00000011").rmdir()
    with pytest.raises(OSError, match="state of step 15.*No space"):
        resumed.save(15, {})
    assert [path.name for path in resumed.checkpoints()] == ["step-00000005"]
    assert not list((tmp_path / "state").glob("*.partial"))


def test_old_states_are_deleted_after_the_new_one_is_saved(make_state):
    run, _ = make_state()
    for step in (1, 2, 3, 4):
        run.save(step, {})
    assert [path.name for path in run.checkpoints()] == ["step-00000003", "step-00000004"]
    # A run resumed from an earlier state gives up the later ones.
    assert run.load(str(run.checkpoints()[0]))["step"] == 3
    run.save(3, {})
    assert [path.name for path in run.checkpoints()] == ["step-00000003"]
    run.clear()
    assert run.checkpoints() == [] and run.load("auto") is None


def test_a_state_of_another_run_or_model_is_refused(make_state, tmp_path):
    run, _ = make_state({"seed": 0, "num_train_epochs": 3})
    run.save(1, {})
    other, _ = make_state({"seed": 0, "num_train_epochs": 4})
    with pytest.raises(ValueError, match=r"num_train_epochs 3 \(now 4\)"):
        other.load("auto")
    assert other.load("never") is None
    with pytest.raises(FileNotFoundError, match="does not contain the state of a training"):
        other.load(str(tmp_path))
    path = tmp_path / "state/step-00000001/pytorch_model.bin"
    torch.save({"else": torch.zeros(1)}, path)
    write_checksums(path.parent)
    same, _ = make_state({"seed": 0, "num_train_epochs": 3})
    with pytest.raises(ValueError, match="does not fit this model"):
        same.load(str(path.parent))


def test_log_rows_after_the_resumed_step_are_deleted(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    log = TrainingLog(Accelerator(cpu=True), path, start=2, total=3)
    log.write({"step": 3, "loss": 1.0})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_an_error_in_a_worker_is_reported_without_its_traceback(tmp_path):
    def fail(rows):
        raise ValueError("example v7 is broken\nand so is v8")

    status = RunStatus(tmp_path / "status.json")
    with pytest.raises(ValueError, match="Original Traceback"), status.follow():
        next(iter(DataLoader([0], collate_fn=fail, num_workers=1)))
    error = "ValueError: example v7 is broken\nand so is v8"
    assert status.read() == {"status": "failed", "error": error, "process": 0}


def test_failed_is_kept_when_the_other_processes_are_stopped(tmp_path):
    PartialState()
    status = RunStatus(tmp_path / "status.json")
    status.set("preparing")
    with pytest.raises(ValueError), status.follow():
        raise ValueError("a broken disk")
    with pytest.raises(Interrupted), status.follow():
        raise Interrupted(3)
    assert status.read() == {"status": "failed", "error": "ValueError: a broken disk", "process": 0}
    status.set("preparing")
    with pytest.raises(Interrupted), status.follow():
        raise Interrupted(3)
    assert status.read() == {"status": "interrupted", "step": 3}


def test_an_open_book_model_needs_faiss_from_the_start(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r'pip install "optsg\[book\]"'):
        prepare_training_run(OPTSGTrainingArguments("run", model_type="open-book"), None, None, None)


@pytest.mark.parametrize("start", [{}, {"checkpoint": "checkpoints/optsg-icon-small"}])
def test_unknown_config_overrides_are_errors(start):
    rows = Dataset.from_list([{"title": "a dog", "tags": ["dog"]}])
    args = OPTSGTrainingArguments("run", dataset="rows", config_overrides='{"hiden_size": 8, "dropout": 0}', **start)
    with pytest.raises(ValueError, match="--config_overrides sets unknown fields of OPTSGConfig: hiden_size"):
        build_model(args, rows, rows)


def test_config_overrides_may_set_what_transformers_and_other_models_have():
    inherited = {"problem_type": None, "id2label": {"0": "a"}, "num_labels": 3, "attn_implementation": "eager"}
    overrides = json.dumps({"dropout": 0.2, "num_book_examples": 3, "num_prompts": 9} | inherited)
    for model_type, own in (("op-tsg", {}), ("open-book", {"num_book_examples": 3})):
        found = _config_overrides(OPTSGTrainingArguments("run", model_type=model_type, config_overrides=overrides))
        prompts = 1 if model_type == "open-book" else 9
        assert found == {"dropout": 0.2, "num_prompts": prompts} | inherited | own


def test_image_words_are_text_in_utf_8(tmp_path):
    path = tmp_path / "words.txt"
    path.write_bytes("\ufeffdog\n\n 猫 \ndog\n".encode())
    assert read_image_words(path) == ["dog", "猫"]
    path.write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match="--image_words .*words.txt is not text in UTF-8"):
        read_image_words(path)
