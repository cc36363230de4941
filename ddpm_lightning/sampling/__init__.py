"""Sampling: a request for images, resolved once, and the files that it fills."""
