"""Measure the cost of a wide pass on this machine, which decides how many tokens are drafted for one.

On a GPU a pass over sixty rows takes as long as one over a single row, since both wait for the weights. On a CPU every
row costs arithmetic, so only likely drafts are worth their row.

Knows:  the model, a clock.  Never: text, answers.
"""

import time

import torch

from fimserver.engine.decoding.speculative import DraftOptions
from fimserver.engine.kernels.devices import wait_for
from fimserver.engine.modeling.backbone import causal_rows
from fimserver.engine.modeling.model import Model

_WIDE = 32
_REPEATS = 10
_CHEAP = 0.01  # cost of one more row, in passes over one row, up to which canvases pay off
_MAX_NODES = 48
_PROMPT_ROWS = 128  # of a pass that measures how fast prompts are encoded
_COLD_S = 1.0  # for a prompt of which nothing is cached
_LEAST_PROMPT, _PROMPT_STEP = 384, 64  # tokens


def measure_row_cost(model: Model) -> float:
    """Return the cost of one more row in passes over one row; the minimum of several runs, to exclude interruptions."""
    cache = model.new_cache()
    cache.reserve(_WIDE)

    def least_s(num_rows: int) -> float:
        rows = causal_rows([model.metadata.special_tokens["eos"]] * num_rows, 0, model.device)
        times = []
        for _ in range(_REPEATS):
            begin = time.perf_counter()
            model.to_logits(model.forward_rows(rows, cache))
            wait_for(model.device)
            times.append(time.perf_counter() - begin)
        return min(times)

    one = least_s(1)
    return max(0.0, (least_s(_WIDE) - one) / one / (_WIDE - 1))


@torch.inference_mode()
def choose_prompt_length(model: Model) -> int:
    """Return how many tokens of a prompt this machine encodes in a second, within limits; a multiple of 64.

    So a request at a new place, of which nothing is cached, is answered before the user has gone on.
    """
    cache = model.new_cache()
    rows = causal_rows([model.metadata.special_tokens["eos"]] * _PROMPT_ROWS, 0, model.device)
    times = []
    for _ in range(2):
        begin = time.perf_counter()
        model.forward_rows(rows, cache)
        wait_for(model.device)
        times.append(time.perf_counter() - begin)
    tokens = int(_COLD_S * _PROMPT_ROWS / min(times))
    return max(_LEAST_PROMPT, tokens // _PROMPT_STEP * _PROMPT_STEP)


def choose_drafts(row_cost: float, cheap_rows: int = 0) -> DraftOptions:
    """Return options whose draft rows cost at most about one pass; canvases only if rows are cheap.

    ``cheap_rows`` is the number of rows up to which the model has faster kernels.
    """
    nodes = min(_MAX_NODES, max(4, int(1 / max(row_cost, 1e-3))))
    if row_cost > _CHEAP:
        return DraftOptions(max_nodes=nodes, cheap_rows=cheap_rows)
    return DraftOptions(max_nodes=nodes, max_canvases=12, cheap_rows=cheap_rows)
