"""Several commands take these options."""

from pathlib import Path

import click

KEY_VARIABLE, URL_VARIABLE = "TINKER_API_KEY", "TINKER_BASE_URL"

URL = click.option(
    "--url", envvar=URL_VARIABLE, required=True, help=f"The server's address (or {URL_VARIABLE})."
)
KEY_FILE = click.option(
    "--key-file",
    type=click.Path(path_type=Path),
    help=f"File that holds the API key; by default {KEY_VARIABLE} in the environment.",
)
