"""``python -m ddpm_lightning`` is ``ddpm``."""

from ddpm_lightning.cli import main

if __name__ == "__main__":
    main()
