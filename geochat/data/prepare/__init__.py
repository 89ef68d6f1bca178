"""Published archives and foreign label formats, made ready for training.

    python -m geochat.data.prepare geochat-instruct images_parta* --output DIR
    python -m geochat.data.prepare --help

Every command names what is wrong in one line and ends with exit code 2; it may be repeated after a kill, and goes on
where it was. Exit code 1: the data were written, and the check at the end found something.
"""

from __future__ import annotations

import argparse

from geochat.data.prepare import classes, coco, dota, geochat_instruct, mix665k, vhm
from geochat.errors import stop

_COMMANDS = (geochat_instruct, vhm, mix665k, dota, coco, classes)


def main(argv: list[str] | None = None) -> int:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(
        prog="python -m geochat.data.prepare",
        description="Unpack published archives, and convert labelled images to instruction records.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_options(commands.add_parser(command.NAME, help=command.HELP, description=command.HELP))
    options = parser.parse_args(argv)
    run = next(command.run for command in _COMMANDS if options.command == command.NAME)
    try:
        return run(options)
    except (ValueError, OSError) as error:
        stop(error)
