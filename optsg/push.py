"""`optsg push`: publish a checkpoint's folder as a model on the Hub."""

import argparse
import shutil
import sys
from pathlib import Path

from .terminal import print_line, printable

EPILOG = """\
The token comes from `hf auth login` or HF_TOKEN. All files are uploaded in one
commit. If a push fails, run the same command again. Files that were already
uploaded are not sent again.

exit status: 0 published, or nothing to change; 1 the Hub cannot be reached or
rejects the push; 2 the arguments or the folder are invalid.
"""


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add `push` to the subcommands of `optsg`."""
    parser = commands.add_parser(
        "push",
        help="publish a checkpoint on the Hub",
        description="Publishes a checkpoint: weights, processor, generation settings, model card, and the model\n"
        "code. If README.md is missing, it is first created from the training summary. Before\n"
        "anything is uploaded, the command checks that the folder is complete, can be loaded, and\n"
        "holds no links, tokens or paths of this machine.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of the checkpoint")
    parser.add_argument("name", metavar="ORG/NAME", help="name on the Hub; the repository is created if necessary")
    parser.add_argument("--private", action="store_true", help="create the repository as private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to push to, created if necessary (default: main)")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of pushing directly")
    parser.add_argument("--commit-message", metavar="TEXT", help="title of the commit or pull request")
    parser.add_argument("--dry-run", action="store_true", help="check the folder and list its files without uploading")
    card = parser.add_argument_group("model card", "Any of these options creates FOLDER/README.md again.")
    card.add_argument("--results", type=Path, metavar="FILE", help="output of optsg evaluate, for its metrics")
    card.add_argument("--examples", type=Path, metavar="DIR", help="images for the widget, shown with predicted tags")
    card.add_argument("--license", metavar="ID", help="licence of the weights, as a Hub identifier such as apache-2.0")
    card.add_argument("--language", nargs="+", metavar="CODE", help="languages of titles and tags, such as en")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    import transformers

    from modeling_optsg.hub.commits import PublishingError, check_repo_id
    from modeling_optsg.hub.push_checkpoint import push_checkpoint, read_checkpoint

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        check_repo_id(args.name)
        _write_card(args)
        checkpoint = read_checkpoint(args.folder)
        for name, reason in checkpoint.left_out.items():
            _report(f"left out: {name} ({reason})")
        for path in checkpoint.shortened_paths:
            _report(f"training_summary.json: only the last part of {path} is published")
        if args.dry_run:
            for addition in checkpoint.files.additions():
                print_line(f"{addition.upload_info.size:>14,}  {printable(addition.path_in_repo)}")
            return 0
        result = push_checkpoint(
            checkpoint,
            args.name,
            private=args.private,
            revision=args.revision,
            create_pr=args.create_pr,
            commit_message=args.commit_message,
        )
    except (ValueError, OSError) as error:
        _report(str(error))
        return 2
    except PublishingError as error:
        _report(str(error))
        return 1
    if not result.changed:
        _report("nothing to change: the Hub has the same files")
    print_line(result.url)
    return 0


def _write_card(args: argparse.Namespace) -> None:
    """Write the model card if it is missing or if options require it; keep the old one as `README.md.bak`."""
    from dataset_scripts.export_manifest import backup_path
    from modeling_optsg.hub.model_card import write_training_card

    settings = {"results": args.results, "license": args.license, "language": args.language}
    given = {name: value for name, value in settings.items() if value is not None}
    if args.examples is not None:
        given["examples"] = _find_images(args.examples)
    card = args.folder / "README.md"
    if args.folder.is_dir() and (given or not card.is_file()):
        if card.is_file() and not card.is_symlink():
            shutil.copy(card, backup_path(card))
        write_training_card(args.folder, args.name, **given)
        _report(f"wrote {card} from the training summary")


def _find_images(folder: Path) -> list[Path]:
    """Return the images of a folder.

    Raises:
        ValueError: There are no images, or one has a format that is not published.
    """
    from dataset_scripts.media_suffixes import IMAGE_SUFFIXES
    from modeling_optsg.hub.push_checkpoint import MEDIA_SUFFIXES

    images = sorted(
        path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    )
    if not images:
        raise ValueError(f"--examples {folder} contains no images")
    if refused := [path.name for path in images if path.suffix.lower() not in MEDIA_SUFFIXES]:
        raise ValueError(f"--examples: {', '.join(refused)} cannot be shown on the Hub; save as JPEG, PNG or WebP")
    return images


def _report(text: str) -> None:
    print_line(f"optsg push: {printable(text)}", file=sys.stderr)
