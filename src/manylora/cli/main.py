"""The entry point is a lazy group of commands; an error is told as one paragraph.

Exit codes: 0 done, 1 something failed, 2 the command or a run file is wrong, 130 Ctrl-C.
"""

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

import manylora

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

# Import strings, so that a command costs nothing until it is asked for.
COMMANDS = {
    "quickstart": "manylora.cli.quickstart:quickstart",
    "train": "manylora.cli.train:train",
    "serve": "manylora.cli.serve:serve",
    "keys": "manylora.cli.keys:keys",
    "submit": "manylora.cli.submit:submit",
    "runs": "manylora.cli.server_lists:runs",
    "adapters": "manylora.cli.server_lists:adapters",
    "checkpoints": "manylora.cli.server_lists:checkpoints",
    "sample": "manylora.cli.sample:sample",
    "export": "manylora.cli.export:export",
    "inspect": "manylora.cli.inspect:inspect",
    "rollout": "manylora.cli.rollout:rollout",
    "rollouts": "manylora.cli.rollouts:rollouts",
    "schema": "manylora.cli.schema:schema",
    "doctor": "manylora.cli.doctor:doctor",
}


class LazyGroup(click.Group):
    """A `LazyGroup` imports a command's module when the command is looked up."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(
    manylora.__version__, message="manylora %(version)s", help="Print the version and exit."
)
@click.option(
    "--traceback",
    is_flag=True,
    envvar="MANYLORA_TRACEBACK",
    help="On an error, show where in the program it arose (also MANYLORA_TRACEBACK=1).",
)
@click.pass_obj
def group(settings: dict[str, bool], traceback: bool) -> None:
    """Train many LoRA adapters at once on one shared base model.

    First steps: manylora quickstart
    """
    settings["traceback"] = traceback  # for the error handler


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; never raise."""
    settings: dict[str, bool] = {}
    try:
        code: Any = group.main(
            list(arguments) if arguments is not None else None,
            prog_name="manylora",
            obj=settings,
            standalone_mode=False,
        )
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has seen enough; the flush at exit must not complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except Exception as error:
        if settings.get("traceback"):
            traceback.print_exception(error)
        return report(error)


def report(error: Exception) -> int:
    """Say on stderr what went wrong, and return the exit code that it calls for."""
    from manylora.types import ConfigError, ManyloraError

    hints = list(getattr(error, "__notes__", []))
    if isinstance(error, ManyloraError):
        message = str(error) or type(error).__name__
    elif isinstance(error, OSError) and error.strerror:
        message = error.strerror + (f": {error.filename}" if error.filename else "")
    else:
        message = f"{type(error).__name__}: {error}"
        hints.append(
            "this is a fault in manylora; MANYLORA_TRACEBACK=1 shows where. Please report it"
        )
    click.echo(f"error: {message}", err=True)
    for hint in hints:
        click.echo(f"hint: {hint}", err=True)
    return EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
