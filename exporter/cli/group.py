"""The group of commands: `shiftdc-export MODEL` is `shiftdc-export export MODEL`; errors become one sentence and an exit code."""

from __future__ import annotations

import difflib
import errno
import os
import traceback
from pathlib import Path
from typing import NoReturn

import click

from exporter.errors import InputError, ShiftDCError, printable
from exporter.runtime.ranks import is_main


class DefaultToExport(click.Group):
    """Commands, of which the first word may be left out where it is `export`."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands:
            self._check_is_no_command(args[0])
            args = ["export", *args]
        return super().resolve_command(ctx, args)

    def _check_is_no_command(self, word: str) -> None:
        """Raise InputError for what is nearly the name of a command, and no folder."""
        near = difflib.get_close_matches(word.lower(), [name for name, command in self.commands.items() if not command.hidden], 1)
        if near and "/" not in word and not Path(word).exists():
            raise InputError(
                f"there is no command {word!r}; {near[0]!r} is nearest (a model of the Hub that has this name is calibrated by "
                f"'shiftdc-export export {word}')."
            )

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # options of the default command may come before MODEL
        own = {"--help", "--version"}
        if args and args[0].startswith("-") and args[0] not in own:
            args = ["export", *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except click.exceptions.NoArgsIsHelpError:
            raise
        except click.UsageError as error:
            _fail(ctx, f"{error.format_message().rstrip('.')}; see --help.", 2)
        except InputError as error:
            _fail(ctx, str(error), 2)
        except ShiftDCError as error:
            _fail(ctx, str(error), 1)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                _fail(ctx, f"a name is too long for the file system ({str(error.filename)[:100]}...); give a shorter one.", 2)
            if error.errno in (None, errno.EPIPE):  # not the disk's, or a reader of stdout who has gone
                raise
            where = f" at {error.filename}" if error.filename else ""
            _fail(ctx, f"the system refused to read or to write ({error.strerror}{where}); see to it and run again.", 1)


def _fail(ctx: click.Context, sentence: str, code: int) -> NoReturn:
    """Print the sentence; with SHIFTDC_DEBUG=1 also where it came from, and its causes."""
    if is_main():  # the same error ends all processes of a run
        if os.environ.get("SHIFTDC_DEBUG"):
            traceback.print_exc()
        click.echo(f"Error: {printable(sentence)}", err=True)
    ctx.exit(code)
