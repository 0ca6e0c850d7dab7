"""Evaluation of trained models: perplexity under expert policies, their calibration, tasks."""
