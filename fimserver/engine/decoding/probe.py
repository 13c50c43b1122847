"""How dear a wide pass is on this machine: decides how much is drafted for one.

On a GPU a pass over sixty rows takes as long as one over a single row, since both wait for the weights. On a CPU every
row costs arithmetic, and a draft has to be likely to be worth its row.

Knows:  the model, a clock.  Never: text, answers.
"""

import time

from fimserver.engine.decoding.speculative import DraftOptions
from fimserver.engine.modeling.devices import wait_for
from fimserver.engine.modeling.model import Model
from fimserver.engine.modeling.network import causal_rows

_WIDE = 32
_REPEATS = 10
_CHEAP = 0.01  # of a pass over one row, for one more row: there canvases pay
_MAX_NODES = 48


def measure_row_cost(model: Model) -> float:
    """What one more row adds to a pass, in passes over one row; the least of some tries, because others disturb."""
    cache = model.new_cache()
    cache.reserve(_WIDE)

    def least_s(num_rows: int) -> float:
        rows = causal_rows([model.metadata.special_tokens["bos"]] * num_rows, 0, model.device)
        times = []
        for _ in range(_REPEATS):
            begin = time.perf_counter()
            model.to_logits(model.forward_rows(rows, cache))
            wait_for(model.device)
            times.append(time.perf_counter() - begin)
        return min(times)

    one = least_s(1)
    return max(0.0, (least_s(_WIDE) - one) / one / (_WIDE - 1))


def choose_drafts(row_cost: float) -> DraftOptions:
    """Drafts worth their rows: at most about one pass's worth of them, and canvases only where rows are cheap."""
    nodes = min(_MAX_NODES, max(4, int(1 / max(row_cost, 1e-3))))
    if row_cost > _CHEAP:
        return DraftOptions(max_nodes=nodes)
    return DraftOptions(max_nodes=nodes, max_canvases=12)
