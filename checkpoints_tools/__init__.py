"""Checkpoints in and out: export, import, verification."""
