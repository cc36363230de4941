"""Evaluation: what is measured of a trained model, with errors and units."""
