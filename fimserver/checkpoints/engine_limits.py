"""Limits of what the engine keeps in memory: the engine obeys them, and the planner counts with them."""

MAX_PROMPT_CACHE_BYTES = 512 * 2**20  # KV caches of earlier prompts
CHUNK_TOKENS = 512  # of a prompt, per pass; cancellation is checked between passes
MARGIN_TOKENS = 1024  # kept by a sliding layer beyond its window, so that a prompt can be trimmed
MIN_GROWTH_TOKENS, MAX_GROWTH_TOKENS = 256, 4096  # KV buffers grow by half, within these limits
CUT_MULTIPLE = 16  # lengths of shortened canvases on a GPU, so that few sizes of tensors are allocated
LARGEST_REPEATED_MASK = 2**25  # elements, for the heads of a group; 64 MB in bf16
MAX_GRAPH_BYTES = 1_500_000_000  # of all CUDA graphs; more is a reason not to use them
LOGITS_COPIES = 3  # float32, alive at once: the head's, capped or sampled from, and one temporary (decoding/denoise.py)
MAX_TABLED_POSITIONS = 16384  # in the tables of rotations; those of 262,144 positions would take 1.6 GB
_LEAST_CAPTURED_ROWS = 16
_LEAST_CAPTURED_PLACES = 16384


def captured_rows(canvas_length: int) -> tuple[int, ...]:
    """Return the rows of captured passes: powers of two, and a whole canvas; canvases in between are padded."""
    rows = [_LEAST_CAPTURED_ROWS]
    while rows[-1] < canvas_length:
        rows.append(2 * rows[-1])
    return (*rows[:-1], canvas_length)


def captured_places(num_tokens: int) -> tuple[int, ...]:
    """Return the places of a buffer that captured passes read: all of them, and less for short prompts in long buffers.

    A pass reads the keys of all its places, whatever the prompt's length.
    """
    places: list[int] = []
    while (count := _LEAST_CAPTURED_PLACES * 4 ** len(places)) < num_tokens:
        places.append(count)
    return (*places, num_tokens)


def fixed_places(context_tokens: int, canvas_length: int) -> int:
    """Return the tokens of a KV cache that captured passes run over: prompt, answer and canvas, rounded up."""
    return -(-(context_tokens + 2 * canvas_length + 16) // 64) * 64
