"""`optsg push`: a checkpoint's folder as a model on the Hub."""

import argparse
import shutil
import sys
from pathlib import Path

from .terminal import printable, say

EPILOG = """\
The token is the one of `hf auth login`, or HF_TOKEN. One commit shows all files
or none; a push that failed is taken up again by the same command, and what has
arrived is not sent again.

exit status: 0 published, or there was nothing to change; 1 the Hub cannot be
reached or refuses; 2 the command line or the folder cannot be used.
"""


def add_command(commands):
    parser = commands.add_parser(
        "push",
        help="a checkpoint to the Hub",
        description="Publishes a checkpoint: weights, processor, code, generation settings and model card.\n"
        "Without a README.md the card is made first, from what the training has left. Before\n"
        "anything is sent, the folder is checked to be complete and to load.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="as training leaves it")
    parser.add_argument("name", metavar="ORG/NAME", help="of the model on the Hub, made if it is not there")
    parser.add_argument("--private", action="store_true", help="make a new model private")
    parser.add_argument("--revision", metavar="BRANCH", help="push there, not to main; made if it is not there")
    parser.add_argument("--create-pr", action="store_true", help="make a pull request instead")
    parser.add_argument("--commit-message", metavar="TEXT", help="title of the commit or pull request")
    parser.add_argument("--dry-run", action="store_true", help="check, list what would be published, send nothing")
    card = parser.add_argument_group("model card", "With any of these it is made anew, in FOLDER.")
    card.add_argument(
        "--results", type=Path, metavar="FILE", help="what examples/score.py wrote: metrics on test examples"
    )
    card.add_argument("--examples", type=Path, metavar="DIR", help="images for the widget, with the tags they get")
    card.add_argument("--license", metavar="ID", help="of the weights, as the Hub names it, such as apache-2.0")
    card.add_argument("--language", nargs="+", metavar="CODE", help="of titles and tags, such as en")
    parser.set_defaults(run=_run)


def _run(args) -> int:
    import transformers

    from modeling_optsg.hub.commits import PublishingError, check_repo_id
    from modeling_optsg.hub.push_checkpoint import push_checkpoint, read_checkpoint

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        check_repo_id(args.name)
        _card(args)
        checkpoint = read_checkpoint(args.folder)
        for name, reason in checkpoint.left_out.items():
            _note(f"left out: {name} ({reason})")
        for path in checkpoint.shortened:
            _note(f"training_summary.json: of {path} only the last part is published")
        if args.dry_run:
            for addition in checkpoint.files.additions():
                say(f"{addition.upload_info.size:>14,}  {printable(addition.path_in_repo)}")
            return 0
        published = push_checkpoint(
            checkpoint,
            args.name,
            private=args.private,
            revision=args.revision,
            create_pr=args.create_pr,
            commit_message=args.commit_message,
        )
    except (ValueError, OSError) as error:
        _note(str(error))
        return 2
    except PublishingError as error:
        _note(str(error))
        return 1
    if not published.changed:
        _note("nothing to change: the Hub has all of it")
    say(published.url)
    return 0


def _card(args) -> None:
    from dataset_scripts.media_suffixes import IMAGE_SUFFIXES
    from modeling_optsg.hub.push_trained import write_card_of_training

    settings = {"results": args.results, "license": args.license, "language": args.language}
    asked = {name: value for name, value in settings.items() if value is not None}
    if args.examples is not None:
        images = sorted(path for path in args.examples.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
        if not images:
            raise ValueError(f"--examples {args.examples} holds no images")
        asked["examples"] = images
    card = args.folder / "README.md"
    if args.folder.is_dir() and (asked or not card.is_file()):
        if card.is_file():
            # It may be a person's work.
            shutil.copy(card, card.with_name("README.md.bak"))
        write_card_of_training(args.folder, args.name, **asked)
        _note(f"{args.folder / 'README.md'} is made from what the training has left")


def _note(text: str) -> None:
    say(f"optsg push: {printable(text)}", file=sys.stderr)
