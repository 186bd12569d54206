"""`python -m moshi_cli` is the command `moshi`."""

from __future__ import annotations

from moshi_cli.app import main

if __name__ == "__main__":
    main()
