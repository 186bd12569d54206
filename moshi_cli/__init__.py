"""The command `moshi`; the model is `moshi_cli.core`, what one does with it `moshi_cli.tasks`.

Importing this package imports neither torch nor typer.
"""

__version__ = "0.1.0"
