"""The former name of ``ddpm_lightning.export``, which diffusers folders written before still hold."""
