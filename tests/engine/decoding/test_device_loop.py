"""The denoising loop as a GPU runs it: reads by the host, and kernels per step.

A CPU waits for nothing, so reads are counted when they are requested. ``Tensor.cpu`` is one, and its result may be
read freely; ``item``, ``tolist``, ``bool``, ``nonzero`` and the like on other tensors count as more.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support.checkpoints import EXPERTS_ONLY, repack
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fimserver.bench.gpu.synthetic import DenseMatmul
from fimserver.engine.decoding.denoise import (
    CanvasState,
    Denoiser,
    DenoisingOptions,
    is_settled,
    read_out,
)
from fimserver.engine.decoding.stopping import AnswerEnd, AnswerStart
from fimserver.engine.kernels.backends import Choice
from fimserver.engine.kernels.matmul import PlainMatmul
from fimserver.engine.modeling.model import Model
from fimserver.engine.modeling.prompt_cache import PromptCache
from fimserver.engine.vocabulary import Vocabulary

READS = {
    "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero", "equal", "unique",
    "masked_select", "bincount", "is_nonzero", "allclose", "argwhere", "multinomial",
}  # fmt: skip


FOLLOWS = {
    "nonzero", "nonzero_numpy", "argwhere", "masked_select", "unique_dim", "_unique", "_unique2", "unique_consecutive",
    "bincount", "repeat_interleave", "equal", "allclose",
}  # fmt: skip


class Reads(TorchFunctionMode):
    """Counts the host's reads of tensors that it has not fetched."""

    def __init__(self) -> None:
        self.count = 0
        self.names: list[str] = []
        self._fetched: list[torch.Tensor] = []

    def has_fetched(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor was fetched, or is a view of one that was."""
        return any(tensor.untyped_storage().data_ptr() == t.untyped_storage().data_ptr() for t in self._fetched)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        result = func(*args, **(kwargs or {}))
        if name == "cpu":
            self.count += 1
            self._fetched.append(result)
        elif name in READS and not any(args and args[0] is t for t in self._fetched):
            self.count += 1
            self.names.append(name)
        return result


class Launches(TorchDispatchMode):
    """Counts operations that a GPU would run: those that give new tensors, not views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns):
            self.count += 1
        return func(*args, **(kwargs or {}))


class Waits(TorchDispatchMode):
    """Counts operations that wait for a GPU, whatever their name: numbers, and shapes that depend on values."""

    def __init__(self, reads: Reads) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []
        self._reads = reads

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        by_mask = name in {"index", "index_put", "index_put_", "_index_put_impl_"} and any(
            t is not None and t.dtype in {torch.bool, torch.uint8} for t in args[1]
        )
        follows = name in FOLLOWS or (name == "where" and len(args) == 1)
        reads = name in {"item", "_local_scalar_dense", "is_nonzero"} and not self._reads.has_fetched(args[0])
        if by_mask or follows or reads:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def options_of(model: Model, **changes: Any) -> DenoisingOptions:
    values = {
        "max_denoising_steps": 12, "entropy_bound": 0.1, "confidence_threshold": 0.0, "stability_threshold": 1,
        "t_min": 0.4, "t_max": 0.8, "canvas_length": model.canvas_length, "conditioning_top": 64,
    }  # fmt: skip
    return DenoisingOptions(**{**values, **changes})


@pytest.fixture(scope="module")
def packed_model(random_model: Model) -> Model:
    """The random model with its experts in 4 bits, multiplied as on a GPU: without reading the routing choices."""
    pytest.importorskip("triton")
    from fimserver.engine.kernels.triton_kernels import TritonMatmul

    network = repack(random_model.reference, EXPERTS_ONLY)
    choice = Choice(TritonMatmul(dtype=torch.float32, exact=True))
    return Model(network, random_model.metadata, choice)


def count_reads(
    model: Model, vocabulary: Vocabulary, healed: str, steps: int, *, watch: Any = None, **changes: Any
) -> Reads:
    cache = PromptCache(model)
    cache.encode([2, *range(100, 140)])
    end = AnswerEnd(vocabulary, max_lines=4)
    denoiser = Denoiser(
        model,
        options_of(model, max_denoising_steps=steps, **changes),
        torch.Generator().manual_seed(0),
        end,
        stop=lambda: False,
        on_step=lambda _state, _answer: None,
    )
    start = AnswerStart(end, healed, min_tokens=1, vocab_size=model.vocab_size)
    reads = Reads()
    with reads, watch(reads) if watch else nullcontext(), torch.inference_mode():
        filled = denoiser.fill(cache.cache, start)
    assert filled.passes == steps
    return reads


@pytest.mark.parametrize("healed", ["", " self"])
@pytest.mark.parametrize("is_cut", [False, True])
def test_a_step_is_read_back_once(tiny_model: Model, vocabulary: Vocabulary, healed: str, *, is_cut: bool) -> None:
    """Whatever the answer has to begin with; once more at the end, for the confidence."""
    few = count_reads(tiny_model, vocabulary, healed, 4, is_cut=is_cut)
    many = count_reads(tiny_model, vocabulary, healed, 9, is_cut=is_cut)
    assert many.count - few.count == 9 - 4, many.names
    assert many.count <= 9 + 3, many.names


def test_a_step_through_experts_in_4_bits_is_read_back_once(packed_model: Model, vocabulary: Vocabulary) -> None:
    pytest.importorskip("triton", reason="Triton is not installed; pip install '.[interop]'")
    assert packed_model.network.is_fixed
    cache = PromptCache(packed_model)
    cache.encode([2, *range(100, 120)])
    with Reads() as reads, torch.inference_mode():
        packed_model.network.to_self_conditioning(packed_model.decode(torch.arange(8)[None], cache.cache, None)[0], 64)
    names = [n for n in reads.names if n != "__index__"]  # Triton's interpreter asks for numbers of its own
    assert not [n for n in names if n in {"item", "tolist", "nonzero", "equal", "unique"}]


@pytest.mark.parametrize("healed", ["", " self"])
def test_nothing_of_a_step_waits(random_model: Model, vocabulary: Vocabulary, healed: str) -> None:
    """Steps through several experts in 4 bits, counted at the operations that torch runs in the end."""
    network = repack(random_model.reference, EXPERTS_ONLY)
    model = Model(network, random_model.metadata, Choice(DenseMatmul()))
    assert model.network.is_fixed
    few, many = (count_waits(model, vocabulary, healed, steps) for steps in (4, 9))
    assert few == many, "waits are outside of a step"
    assert len(few) <= 1
    plain = Model(network, random_model.metadata, Choice(PlainMatmul()))
    assert len(count_waits(plain, vocabulary, healed, 4)) > 4, "the count can fail: these read the routing choices"


def count_waits(model: Model, vocabulary: Vocabulary, healed: str, steps: int) -> list[str]:
    waits: list[Waits] = []

    def watch(reads: Reads) -> Waits:
        waits.append(Waits(reads))
        return waits[0]

    count_reads(model, vocabulary, healed, steps, watch=watch)
    return waits[0].names


def test_experts_in_floats_would_be_seen(random_model: Model) -> None:
    """The count can fail: going through experts one by one reads the routing choices."""
    cache = PromptCache(random_model)
    cache.encode([2, *range(100, 120)])
    with Reads() as reads, torch.inference_mode():
        random_model.decode(torch.arange(8)[None], cache.cache, None)
    assert reads.count >= len(random_model.reference.model.decoder.layers)


def test_kernels_of_a_step_do_not_depend_on_the_canvas(tiny_model: Model) -> None:
    counts = []
    for length in (8, 32):
        cache = PromptCache(tiny_model)
        cache.encode([2, *range(100, 140)])
        canvas = torch.arange(length)[None]
        tiny_model.decode(canvas, cache.cache, None)
        with Launches() as launches, torch.inference_mode():
            tiny_model.decode(canvas, cache.cache, None)
        counts.append(launches.count)
    assert counts[0] == counts[1]
    assert counts[0] < 60 * len(tiny_model.reference.model.decoder.layers)


@pytest.mark.parametrize("healed", ["", " ", " fi", "q", "_x", " \u00e9t\u00e9", "\U0001f40d", " zqzq"])
@pytest.mark.parametrize("min_tokens", [0, 1])
def test_beginnings_on_the_device_equal_the_reference(vocabulary: Vocabulary, healed: str, min_tokens: int) -> None:
    start = AnswerStart(AnswerEnd(vocabulary, 3), healed, min_tokens=min_tokens, vocab_size=8192 + 8)
    for seed in range(6):
        logits = torch.randn(3, 24, 8192 + 8, generator=torch.Generator().manual_seed(seed))
        if seed % 2:  # tokens that spell one letter, and spaces, are likelier
            short = [i for i in range(vocabulary.size) if len(vocabulary.token_bytes[i]) == 1]
            logits[..., short] += 6
        found = start.constrain_canvases(logits)
        for canvas, expected in zip(found, logits, strict=True):
            assert torch.equal(canvas, start.constrain_canvas(expected))


def test_masks_equal_a_check_of_every_token(vocabulary: Vocabulary) -> None:
    start = AnswerStart(AnswerEnd(vocabulary, 2), " self.x", min_tokens=0, vocab_size=8192)
    for length in range(1, 8):
        rest = b" self.x"[-length:]
        expected = [bool(t) and (t.startswith(rest) or rest.startswith(t)) for t in vocabulary.token_bytes]
        beginning = type(start.beginning)(rest, needs_more=False)
        assert start.allowed_mask(beginning, torch.device("cpu")).tolist()[: len(expected)] == expected


@pytest.mark.parametrize("threshold", [0, 1, 2])
def test_the_read_out_equals_the_state(threshold: int) -> None:
    generator = torch.Generator().manual_seed(threshold)
    for trial in range(20):
        best = torch.randint(3, (2, 5), generator=generator)
        history = tuple(torch.where(torch.rand(2, 5, generator=generator) < 0.8, best, 9) for _ in range(trial % 4))
        entropy = torch.rand(2, 5, generator=generator)
        logits = torch.randn(2, 5, 11, generator=generator)
        accepted = torch.zeros(2, 5, dtype=torch.bool)
        state = CanvasState(best, best, logits, accepted, entropy, 3, history)
        options = DenoisingOptions(9, 0.1, 0.5, threshold, 0.4, 0.8)
        drafted = torch.randint(11, (2, 5), generator=generator)
        for i, readout in enumerate(read_out(state, options, drafted, [3, 5])):
            assert readout.best == best[i].tolist()
            assert readout.entropy == pytest.approx(entropy[i].tolist())
            count = [3, 5][i]
            scores = torch.log_softmax(logits[i], dim=-1).gather(-1, drafted[i][:, None])[:count]
            assert readout.support == pytest.approx(float(scores.mean()))
            for positions in (1, 3, 5):
                assert readout.is_settled(options, positions) is is_settled(state.only(i), options, positions)
