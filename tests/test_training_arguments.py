"""Training arguments, the shipped files of them, and the configurations of accelerate."""

import json
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from modeling_optsg import OPTSGConfig
from modeling_optsg.training import OPTSGTrainingArguments, num_micro_batches, parse_arguments

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize(
    "eval_steps, expected",
    [(0.2, {4, 8, 12, 16, 20}), (0.5, {10, 20}), (0.3, {6, 12, 18, 20}), (1, {*range(1, 21)}), (8, {8, 16, 20})]
    + [(500, {20})],
)
def test_eval_steps_are_a_ratio_or_an_interval(eval_steps, expected):
    assert OPTSGTrainingArguments("run", eval_steps=eval_steps).evaluation_steps(20) == expected


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--eval_steps", "0"), "--eval_steps 0.0 must be a ratio below 1 or a whole number"),
        (("--eval_steps", "1.5"), "--eval_steps 1.5 must be"),
        (("--train_ratio", "0"), "--train_ratio 0.0 must be above 0"),
        (("--train_ratio", "1.5"), "--train_ratio 1.5 must be above 0 and at most 1"),
        (("--num_stream_shards", "1"), "--num_stream_shards 1 must be at least 2"),
        (("--model_type", "bert"), "--model_type bert is unknown; expected one of op-tsg"),
        (("--group_by_length", "True", "--streaming", "True"), "cannot be combined with --streaming"),
        (("--checkpoint", "runs/a", "--classifier_checkpoint", "runs/b"), "exclude each other"),
        (("--push_to_hub", "a/b/c"), "--push_to_hub: "),
    ],
)
def test_a_wrong_argument_is_reported(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--output_dir", "run", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"epoch": 3}', "sets unknown arguments: epoch"),
        (None, "cannot be read: No such file"),
        ("{", "is not valid JSON: "),
        (b"\xff\xfe", "is not valid JSON: "),
        ("[3]", "is not a JSON object"),
        ('{"seed": "three"}', 'seed is "three"; expected a whole number'),
        ('{"train_batch_size": [8]}', "train_batch_size is [8]; expected a whole number"),
        ('{"seed": 1.5}', "seed is 1.5; expected a whole number"),
        ('{"learning_rate": true}', "learning_rate is true; expected a number"),
        ('{"learning_rate": {}}', "learning_rate is {}; expected a number"),
        ('{"streaming": 2}', "streaming is 2; expected true or false"),
        ('{"dataset": 3}', "dataset is 3; expected text"),
        ('{"pad_biases": [0, "a"]}', 'pad_biases is [0, "a"]; expected a list, each value a number'),
        ('{"report_to": "wandb"}', 'report_to is "wandb"; expected a list, each value text'),
        ('{"seed": null}', "seed is null; expected a whole number"),
        ('{"config_overrides": {"dropout": NaN}}', "Out of range float values"),
    ],
)
def test_a_bad_config_file_is_reported_in_one_line(tmp_path, capsys, content, message):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit):
        parse_arguments(["--output_dir", "x", "--config", str(path)])
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"--config {path}" in error and message in error


def test_a_config_file_takes_what_the_command_line_takes(tmp_path):
    values = {"seed": "3", "learning_rate": 1, "streaming": True, "pad_biases": [0, -1.5], "dataset": None}
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8-sig")
    args = parse_arguments(["--output_dir", "x", "--config", str(tmp_path / "config.json")])
    assert args.seed == 3 and args.streaming is True and args.pad_biases == [0, -1.5] and args.dataset is None


def test_the_command_line_overrides_the_config_file(tmp_path):
    (tmp_path / "config.json").write_text('{"num_train_epochs": 3, "config_overrides": {"num_prompts": 5}}')
    command = ["--output_dir", "x", "--config", str(tmp_path / "config.json"), "--num_train_epochs", "7"]
    args = parse_arguments(command)
    assert args.num_train_epochs == 7 and json.loads(args.config_overrides) == {"num_prompts": 5}


@pytest.mark.parametrize(
    "config, num_train_epochs, train_batch_size",
    [
        ("optsg-create-pretrain", 20, 1024),
        ("optsg-create", 30, 512),
        ("optsg-pexel", 20, 512),
        ("optsg-icon-small", 16, 64),
    ],
)
def test_shipped_configs_have_the_schedules_of_the_supplement(config, num_train_epochs, train_batch_size):
    args = parse_arguments(["--config", str(EXAMPLES / f"configs/{config}.json"), "--output_dir", "run"])
    assert (args.num_train_epochs, args.train_batch_size) == (num_train_epochs, train_batch_size)
    overrides = json.loads(args.config_overrides) | {"vision_feature_layers": None}
    OPTSGConfig(**overrides, frame_feature_size=512)
    processes = {"optsg-create-pretrain": 16, "optsg-icon-small": 1}.get(config, 8)
    assert num_micro_batches(args.train_batch_size, processes, args.per_device_train_batch_size) == 1


def test_shipped_configurations_of_accelerate_can_be_read():
    paths = sorted((EXAMPLES / "accelerate").glob("*.yaml"))
    assert [path.stem for path in paths] == ["ddp_2x8", "ddp_8", "deepspeed_zero2_8", "fsdp_8"]
    for path in paths:
        # Unknown keys raise an error.
        config = load_config_from_file(str(path))
        assert config.num_processes == (16 if "2x8" in path.stem else 8) and config.mixed_precision == "bf16"
    known = {action.dest for action in launch_command_parser()._actions}
    for name in ("fsdp_8", "deepspeed_zero2_8"):
        config = load_config_from_file(str(EXAMPLES / f"accelerate/{name}.yaml"))
        assert set(config.fsdp_config) | set(config.deepspeed_config) <= known
