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


def test_a_config_file_with_an_unknown_argument_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"epoch": 3}')
    with pytest.raises(SystemExit):
        parse_arguments(["--output_dir", "x", "--config", str(tmp_path / "config.json")])
    assert "sets unknown arguments: epoch" in capsys.readouterr().err


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
