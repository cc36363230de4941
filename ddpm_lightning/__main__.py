"""``ddpm``, and ``python -m ddpm_lightning``."""

import sys

from ddpm_lightning.first_screen import answered

__all__ = ["main"]


def main(args: list[str] | None = None) -> None:
    """Entry point: help at once, all else with torch and Lightning."""
    words = sys.argv[1:] if args is None else args
    if not answered(words):
        from ddpm_lightning.cli import main as run

        run(words)


if __name__ == "__main__":
    main()
