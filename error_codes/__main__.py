"""`python -m llmc.error_codes [--write FILE]`: print docs/errors.md, or write it."""

from __future__ import annotations

import argparse
from pathlib import Path

from .page import page


def main() -> None:
    """Print the page of all error codes, or write it to a file."""
    parser = argparse.ArgumentParser(prog="python -m llmc.error_codes", description="The page of all error codes.")
    parser.add_argument("--write", type=Path, metavar="FILE", help="Write the page to this file.")
    target: Path | None = parser.parse_args().write
    if target:
        target.write_text(page(), encoding="utf-8")
    else:
        print(page(), end="")


if __name__ == "__main__":
    main()
