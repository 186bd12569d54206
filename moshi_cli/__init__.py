"""The command `moshi`; the model is in `moshi_cli.core`, what one does with it in `moshi_cli.tasks`.

Importing this package imports neither torch nor typer.
"""

__version__ = "0.1.0"
