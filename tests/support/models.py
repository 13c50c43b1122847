"""Where the shipped model is, for tests that read its files."""

from fimserver.checkpoints.known import SHIPPED_MODELS

TINY = SHIPPED_MODELS / "tiny"
