"""Draft tokens ahead and verify them in one pass: the autoregressive answer in a fraction of the passes.

One pass reads the verified tokens, a tree of draft tokens, and after them canvases of pure noise:

    verified tokens    causal, as the encoder reads them (in the first pass: the end of the prompt)
    draft tree         causal along each branch: logits after every node verify the next
    canvases           bidirectional, each after one of the nodes: they draft what the next pass verifies

Verification starts at the root and takes the autoregressive token at each node; it continues while a draft has that
token. So the answer equals that of ``fill_autoregressive`` token by token, whatever the drafts were, in float32. In
bfloat16, rounding depends on the number of rows, and nearly tied tokens may swap.

With ``commit_probability`` it is denoising from the left: where no draft continues, the canvas after the last verified
node does, as long as it has the same next token and is that sure of each following one. Such tokens are written
unverified: fewer passes, and a different text where the canvas is wrong.

Knows:   token ids, logits, the cache.  Never: text, files, LSP.
Stops:   as ``fill_autoregressive`` does; ``stop`` is checked before every pass.
Source:  self-speculation of a model that is causal and bidirectional in one pass, TiDAR (arXiv 2511.08923); trees,
         arXiv 2305.09781; parallel decoding by a threshold of confidence, arXiv 2505.22618.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from fimserver.engine.decoding.autoregressive import choose_token
from fimserver.engine.decoding.denoise import Filled, RunnerUp
from fimserver.engine.decoding.drafts import DraftTree, Lookup
from fimserver.engine.decoding.request import DecodeRequest
from fimserver.engine.decoding.stopping import Beginning, confidence_of
from fimserver.engine.modeling.backbone import Rows
from fimserver.engine.modeling.model import Model
from fimserver.engine.modeling.prompt_cache import PromptCache

_RUNNERS_UP = 3  # alternative first tokens
_MATCH_NODES = 40  # nodes added in the first pass, which scores all matches


@dataclass(frozen=True, slots=True)
class DraftOptions:
    """Limits of the drafts of one pass: nodes of the tree, and canvases of ``canvas_length`` after the nodes.

    A canvas token of at least ``commit_probability`` is written without verification; above 1 none is. Where passes of
    at most ``cheap_rows`` rows are much cheaper than wider ones, drafts keep to that number; 0 is no such limit.
    """

    max_nodes: int = 12
    max_canvases: int = 0
    canvas_length: int = 6
    lookup: bool = True
    commit_probability: float = math.inf
    cheap_rows: int = 0


@dataclass
class Drafter:
    """Sources of drafts for one answer."""

    options: DraftOptions
    lookup: Lookup
    matches: Sequence[Sequence[int]] = ()
    from_canvas: list[int] = field(default_factory=list)

    def draft(self, before: Sequence[int], answer: Sequence[int], num_pending: int = 1) -> tuple[DraftTree, list[int]]:
        """Return a tree of drafts after ``before``, which ends with the answer so far; and its nodes with canvases.

        ``num_pending`` rows of the pass are tokens that have to be read.
        """
        written, most = len(answer), self.options.max_nodes + (0 if answer else _MATCH_NODES)
        if num_pending <= self.options.cheap_rows:
            most = min(most, self.options.cheap_rows - num_pending)
        tree = DraftTree(most)
        for match in self.matches:
            if len(match) > written and list(match[:written]) == list(answer):
                tree.add(match[written:])
        tree.max_nodes = min(most, len(tree.tokens) + self.options.max_nodes)
        main = tree.add(self.from_canvas)
        if self.options.lookup:
            for continuation in self.lookup.find(before):
                tree.add(continuation)
        if not self.options.max_canvases:
            return tree, []
        nodes = [-1, *main, *(n for n in range(len(tree.tokens)) if n not in main)]
        return tree, nodes[: self.options.max_canvases]


def fill_speculative(  # noqa: PLR0913  the options of one call
    model: Model,
    prompt_cache: PromptCache,
    pending: Sequence[int],
    request: DecodeRequest,
    *,
    drafter: Drafter,
    before: Sequence[int],
    first: RunnerUp | None = None,
    max_steps: int = sys.maxsize,
    on_canvas: Callable[[Sequence[int], torch.Tensor], None] = lambda _answer, _logits: None,
) -> Filled:
    """Return the answer after a prompt whose last tokens ``pending`` are not in the cache yet.

    ``before`` are the tokens before the answer, for drafts. The written tokens stay in the cache. With ``first`` the
    answer begins with that token, which is then the only one in ``pending``. ``max_steps`` limits the passes per
    canvas length of tokens. After each pass ``on_canvas`` gets the answer so far and the logits (C, V) of the canvas
    after it, or no logits if there is no canvas.
    """
    verification = _Verification(request)
    if first is not None:
        verification.begin(first)
        if verification.is_closed:
            return verification.filled("end", 0)
    noise = torch.Generator(model.device).manual_seed(0)
    passes, pending, num_read = 0, list(pending), len(verification.answer)
    while True:
        if passes and request.stop():
            return verification.filled("latency", passes)
        if passes >= max_steps * (1 + len(verification.answer) // model.canvas_length):
            return verification.filled("steps", passes)
        tree, canvases = drafter.draft([*before, *verification.answer], verification.answer, len(pending))
        rows = to_rows(model, pending, tree, canvases, drafter.options.canvas_length, prompt_cache.cache.length, noise)
        hidden = model.forward_rows(rows, prompt_cache.cache)
        passes += 1
        logits = model.to_logits(hidden[len(pending) - 1 :])
        if passes == 1 and first is None:
            verification.score_matches(logits, tree, drafter.matches)
        nodes, finish = verification.follow(logits, tree)
        if passes == 1 and first is None:
            verification.note_runners_up(logits[0])
        kept = [*range(len(pending)), *(len(pending) + n for n in nodes)]
        prompt_cache.keep(kept, [*pending, *(tree.tokens[n] for n in nodes)])
        last = nodes[-1] if nodes else -1
        following = logits[:0]
        if not finish and last in canvases:
            begin = 1 + len(tree.tokens) + canvases.index(last) * drafter.options.canvas_length
            canvas = logits[begin : begin + drafter.options.canvas_length]
            following, finish = verification.commit(canvas, drafter.options.commit_probability)
        on_canvas(verification.answer, following)
        if finish:
            return verification.filled(finish, passes)
        pending = verification.answer[num_read + len(nodes) :]
        drafter.lookup.extend(verification.answer[num_read:])
        num_read = len(verification.answer)
        drafter.from_canvas = following.argmax(-1).tolist()


def to_rows(  # noqa: PLR0913, PLR0917  the inputs of one pass
    model: Model,
    pending: Sequence[int],
    tree: DraftTree,
    canvases: Sequence[int],
    canvas_length: int,
    cached: int,
    noise: torch.Generator,
) -> Rows:
    """Return the verified tokens, the tree below the last of them, and a canvas after each node of ``canvases``."""
    num_sure, num_nodes, num_canvas = len(pending), len(tree.tokens), len(canvases) * canvas_length
    if not num_nodes and not num_canvas and num_sure == 1:
        ids = torch.tensor(list(pending), device=model.device)
        return Rows(ids, torch.tensor([cached], device=model.device), None, cached + 1)
    num_rows = num_sure + num_nodes + num_canvas
    sees = torch.zeros(num_rows, num_rows, dtype=torch.bool)
    sees[:num_sure, :num_sure] = torch.ones(num_sure, num_sure, dtype=torch.bool).tril()
    sees[num_sure:, :num_sure] = True
    for node, parent in enumerate(tree.parents):
        if parent >= 0:
            sees[num_sure + node] = sees[num_sure + parent]
        sees[num_sure + node, num_sure + node] = True
    root = cached + num_sure - 1
    positions = [*range(cached, cached + num_sure), *(root + depth for depth in tree.depths)]
    origins: list[int] = []
    for i, node in enumerate(canvases):
        rows = slice(num_sure + num_nodes + i * canvas_length, num_sure + num_nodes + (i + 1) * canvas_length)
        sees[rows] = sees[num_sure + node]  # for the root, -1, this is the last verified token
        sees[rows, rows] = True
        begin = root + 1 + tree.depth(node)
        positions += range(begin, begin + canvas_length)
        origins += [begin] * canvas_length
    ids = torch.tensor([*pending, *tree.tokens], device=model.device)
    if num_canvas:
        random = torch.randint(0, model.vocab_size, (num_canvas,), generator=noise, device=model.device)
        ids = torch.cat((ids, random))
    at = torch.tensor(positions, device=model.device)
    origin = torch.tensor(origins, device=model.device)
    return Rows(ids, at, sees.to(model.device), max(positions) + 1, num_canvas, origin)


class _Verification:
    """The answer so far, and the rules that each of its tokens has to pass."""

    def __init__(self, request: DecodeRequest) -> None:
        self.answer: list[int] = []
        self._answer_end, self._answer_start = request.answer_end, request.answer_start
        self._max_tokens, self._on_token = request.max_tokens, request.on_token
        self._temperature, self._generator, self._rules = request.temperature, request.generator, request.rules
        self._beginning = self._answer_start.beginning
        self._log_probabilities: list[float] = []
        self._end_log_probability = 0.0
        self._match_log_probabilities: list[float | None] = []
        self._runners_up: tuple[RunnerUp, ...] = ()

    def begin(self, first: RunnerUp) -> None:
        """Write a first token that was chosen elsewhere."""
        self._write(first.token_id, first.log_probability)

    @property
    def is_closed(self) -> bool:
        """Return whether the answer's last token holds its end."""
        return self._answer_end.is_closed(self.answer)

    def _write(self, token_id: int, log_probability: float) -> None:
        self.answer.append(token_id)
        self._log_probabilities.append(log_probability)
        if self._rules is not None:
            self._rules.accept(token_id)
        self._beginning = self._answer_start.after(self._beginning, token_id)

    def note_runners_up(self, row: torch.Tensor) -> None:
        """Record the alternatives to the answer's first token."""
        constrained = self._answer_start.constrain(row, self._answer_start.beginning)
        values, ids = torch.log_softmax(constrained, dim=-1).topk(_RUNNERS_UP + 1)
        taken = self.answer[:1]
        self._runners_up = tuple(
            RunnerUp(token_id, value)
            for token_id, value in zip(ids.tolist(), values.tolist(), strict=True)
            if [token_id] != taken and value > -math.inf and self._answer_end.find([token_id]) == 1
        )

    def score_matches(self, logits: torch.Tensor, tree: DraftTree, matches: Sequence[Sequence[int]]) -> None:
        """Record the log-probability of each whole match, its end included, after the healed word."""
        for match in matches:
            beginning, node, total = self._answer_start.beginning, -1, 0.0
            for token_id in match:
                child = tree.child(node, token_id)
                if child is None:
                    break
                total += self._log_probability(logits[node + 1], token_id, beginning)
                beginning, node = self._answer_start.after(beginning, token_id), child
            if not match or tree.depth(node) < len(match):
                self._match_log_probabilities.append(None)
            else:
                self._match_log_probabilities.append(total + self._answer_end.log_probability(logits[node + 1]))

    def _log_probability(self, row: torch.Tensor, token_id: int, beginning: Beginning) -> float:
        scored = self._answer_start.constrain(row, beginning) if beginning.rest else row
        return float(torch.log_softmax(scored, dim=-1)[token_id])

    def follow(self, logits: torch.Tensor, tree: DraftTree) -> tuple[list[int], str]:
        """Write tokens along the tree until a draft fails; return the accepted nodes, and the finish or ``""``.

        ``logits`` start with the root's, then one row per node.
        """
        node = -1
        taken: list[int] = []
        while True:
            row = logits[node + 1]
            constrained = self._answer_start.constrain(row, self._beginning)
            may_end = self._beginning.is_whole
            token_id = choose_token(constrained, self._temperature, self._generator, self._rules, may_end=may_end)
            if self._ends(row, constrained, token_id):
                return taken, "end"
            assert token_id is not None
            self._write(token_id, self._log_probability(row, token_id, self._beginning))
            self._on_token(self.answer)
            child = tree.child(node, token_id)
            if self.is_closed:
                return taken, "end"
            if len(self.answer) >= self._max_tokens:
                return taken, "length"
            if child is None:
                return taken, ""
            node = child
            taken.append(node)

    def commit(self, canvas: torch.Tensor, least: float) -> tuple[torch.Tensor, str]:
        """Write the tokens that a canvas is sure of after the last one; return the rest of it, and the finish.

        ``canvas`` (C, V) are logits; the first row is at the position of the last written token.
        """
        if least > 1 or self._temperature > 0 or int(canvas[0].argmax()) != self.answer[-1]:
            return canvas[1:], ""
        for position, row in enumerate(canvas[1:], 1):
            constrained = self._answer_start.constrain(row, self._beginning)
            best = int(constrained.argmax())
            may_end = self._beginning.is_whole
            if (
                float(torch.softmax(constrained, dim=-1)[best]) < least
                or choose_token(constrained, 0.0, None, self._rules, may_end=may_end) != best
            ):
                return canvas[position:], ""
            if self._ends(row, constrained, best):
                return canvas[position:], "end"
            self._write(best, self._log_probability(row, best, self._beginning))
            self._on_token(self.answer)
            if self.is_closed:
                return canvas[position + 1 :], "end"
            if len(self.answer) >= self._max_tokens:
                return canvas[position + 1 :], "length"
        return canvas[:0], ""

    def _ends(self, row: torch.Tensor, constrained: torch.Tensor, token_id: int | None) -> bool:
        """Return whether a token ends the answer; if so, drop the tokens after its end."""
        end = len(self.answer) if token_id is None else self._answer_end.find([*self.answer, token_id])
        if token_id is not None and end > len(self.answer):
            return False
        ended_by = int(constrained.argmax()) if token_id is None else token_id
        self._end_log_probability = self._answer_end.log_probability(row, ended_by)
        self._end_log_probability += sum(self._log_probabilities[end:])  # tokens that turned out to begin an anchor
        del self.answer[end:], self._log_probabilities[end:]
        return True

    def filled(self, finish: str, passes: int) -> Filled:
        own = [self._log_probabilities[i] for i in self._answer_start.own_positions(self.answer)]
        return Filled(
            tuple(self.answer),
            finish,
            passes,
            confidence_of(torch.tensor(own)),
            sum(self._log_probabilities) + self._end_log_probability,
            tuple(self._match_log_probabilities),
            self._runners_up,
        )
