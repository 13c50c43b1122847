"""Limits of what the engine keeps in memory: the engine obeys them, and the planner counts with them."""

MAX_PROMPT_CACHE_BYTES = 512 * 2**20  # KV caches of earlier prompts
CHUNK_TOKENS = 512  # of a prompt, per pass; cancellation is checked between passes
MARGIN_TOKENS = 1024  # kept by a sliding layer beyond its window, so that a prompt can be trimmed
MIN_GROWTH_TOKENS, MAX_GROWTH_TOKENS = 256, 4096  # KV buffers grow by half, within these limits
MAX_CAPTURED_PASSES = 12  # CUDA graphs kept per cache
CAPTURED_LENGTH_MULTIPLE = 16  # lengths of captured canvases are multiples of this
MAX_TABLED_POSITIONS = 16384  # in the tables of rotations; those of 262,144 positions would take 1.6 GB
