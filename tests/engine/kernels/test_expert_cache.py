"""Experts in host memory give the results of experts on the device; here both memories are a CPU's."""

import gc
import random
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from support.checkpoints import EXPERTS_ONLY, Tensors, quantized, state_of, write_checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

from fimserver.checkpoints.gpus import find_gpu
from fimserver.checkpoints.memory import Role, find_checkpoint, read_folder
from fimserver.checkpoints.metadata import read_metadata
from fimserver.checkpoints.planner import HostPlan, plan_on_gpu
from fimserver.datatypes import FimContext, Hole, HoleKind, Mode, PartialAnswer, Sampling
from fimserver.engine.engine import Engine
from fimserver.engine.kernels.expert_cache import ExpertCache, Traffic, add_up
from fimserver.engine.kernels.matmul import PLAIN, AsStored, MatmulBackend
from fimserver.engine.kernels.nvfp4 import Dialect, NVFP4Tensor, quantize
from fimserver.engine.kernels.packed import find_packed_experts
from fimserver.engine.loading.weights import CPU, load_weights
from fimserver.engine.modeling.model import Model, find_experts_on_device
from fimserver.engine.vocabulary import Vocabulary
from fimserver.errors import WeightsError

EXPERTS, CHOSEN, HIDDEN, INNER = 8, 2, 32, 16
CONTEXT = FimContext("def f(x):\n    return ", "\n", "a.py", "python", Hole(HoleKind.REST_OF_LINE, 1, 8))


def stacks(experts: int = EXPERTS, seed: int = 0) -> tuple[NVFP4Tensor, NVFP4Tensor]:
    """Return gate and up, and down; experts differ in size, so that a wrong one shows."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-1, 0, experts)[:, None, None]
    shapes = (2 * INNER, HIDDEN), (HIDDEN, INNER)
    both = [quantize(torch.randn(experts, *s, generator=generator) * sizes).with_row_scales() for s in shapes]
    return both[0], both[1]


def drifting_passes(experts: int = EXPERTS, seed: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return tokens, choices and weights of passes of 1 to 40 tokens, whose favourite experts change."""
    generator = torch.Generator().manual_seed(seed)
    for step, tokens in enumerate([1, 3, 1, 40, 2, 5, 1, 1, 17, 2, 33, 1, 4, 1, 2]):
        spread = torch.randn(tokens, experts, generator=generator)
        spread[:, step % experts] += 4
        weights, chosen = torch.softmax(spread, dim=-1).topk(min(CHOSEN, experts), dim=-1)
        yield torch.randn(tokens, HIDDEN, generator=generator), chosen, weights


def check(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-6) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


def experts_output(name: str) -> MatmulBackend:
    if name == "plain":
        return PLAIN
    pytest.importorskip("triton", reason="Triton is not installed; pip install '.[interop]'")
    from fimserver.engine.kernels import triton_kernels as nvfp4_kernels

    kernels: ModuleType = nvfp4_kernels
    matmul: MatmulBackend = kernels.TritonMatmul(dtype=torch.float32, exact=True)
    return matmul


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches the host's storages: only views and copies out of them are allowed; both are counted."""

    ALLOWED = ("aten::copy_", "aten::select", "aten::view", "aten::slice", "aten::detach", "aten::alias")

    def __init__(self, host: tuple[NVFP4Tensor, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._host = {t.untyped_storage().data_ptr() for s in host for t in (s.packed, s.scales, s.global_scale)}
        self.copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        touched = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and self._is_host(a)]
        if touched:
            name = func._schema.name
            assert name in self.ALLOWED, f"{name} reads the host's experts"
            if name == "aten::copy_":
                assert touched == [1], "nothing is written to the host"
                self.copies += 1
        return func(*args, **(kwargs or {}))

    def _is_host(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._host


@pytest.mark.slow("runs experts of many shapes")
@pytest.mark.parametrize("num_slots", range(1, EXPERTS + 1))
@pytest.mark.parametrize("name", ["plain", "triton"])
def test_equal_to_all_experts_on_the_device(name: str, num_slots: int) -> None:
    matmul, whole = experts_output(name), stacks()
    cache = ExpertCache(*whole, num_slots, CPU)
    passes = list(drifting_passes())[: None if name == "plain" else 5]  # the interpreter is slow
    expected = [matmul.experts(*whole, *each) for each in passes]
    with Watch(whole) as watch:
        for each, result in zip(passes, expected, strict=True):
            before, earlier = cache.resident, cache.traffic
            check(cache.run(matmul, *each), result)
            needed, now = set(each[1].flatten().tolist()), cache.traffic.since(earlier)
            assert (now.hits, now.misses) == (len(needed & before), len(needed - before))
            assert now.rounds == 1 + max(0, -((num_slots - len(needed)) // max(1, num_slots // 2)))
            assert len(cache.resident) <= num_slots
    one = sum(s.num_bytes for s in whole) // EXPERTS
    assert cache.traffic.bytes_copied == cache.traffic.misses * one
    assert watch.copies == 6 * cache.traffic.misses, "every copy is counted"
    assert device_bytes(cache, [cache]) == num_slots * one + 8 * EXPERTS, "of the device: slots and the table"


def test_the_watch_sees_matrix_products_of_the_host() -> None:
    """A test of the watch above: it reports a matrix product with the host's stacks."""
    whole = stacks()
    with Watch(whole), pytest.raises(AssertionError, match="reads the host's experts"):
        PLAIN.experts(*whole, *next(drifting_passes()))


def test_only_slots_are_computed_with() -> None:
    whole = stacks()
    cache = ExpertCache(*whole, EXPERTS, CPU)
    everyone = torch.randn(EXPERTS // CHOSEN, HIDDEN), torch.arange(EXPERTS).view(-1, CHOSEN), torch.ones(4, CHOSEN)
    before = cache.run(PLAIN, *everyone)
    for stack in whole:
        stack.packed.random_(256)
        stack.global_scale.mul_(3)
    assert torch.equal(cache.run(PLAIN, *everyone), before), "fetched once, the host is not needed any more"
    cache.slots[1].packed[0] ^= 0x11
    assert not torch.equal(cache.run(PLAIN, *everyone), before)


def one_expert_each(experts: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.ones(len(experts), HIDDEN), torch.tensor(experts)[:, None], torch.ones(len(experts), 1)


def test_an_expert_of_most_passes_outlasts_one_of_the_last_pass() -> None:
    cache = ExpertCache(*stacks(), 2, CPU)
    for _ in range(5):
        cache.run(PLAIN, *one_expert_each([3]))
    for other in (4, 5, 6, 7):
        cache.run(PLAIN, *one_expert_each([other]))
        assert cache.resident == {3, other}
    cache.run(PLAIN, *one_expert_each(list(range(EXPERTS))))
    assert 3 in cache.resident, "a pass that needs them all leaves the hottest"


def test_among_equally_hot_experts_the_last_used_stays() -> None:
    cache = ExpertCache(*stacks(), 2, CPU)
    for expert in (1, 2, 3):
        cache.run(PLAIN, *one_expert_each([expert]))
    assert cache.resident == {2, 3}


def test_experts_cool_over_time() -> None:
    cache = ExpertCache(*stacks(), 1, CPU)
    for _ in range(64):
        cache.run(PLAIN, *one_expert_each([0]))
    heat = cache._heat(0)[0]
    for step in range(64 * 4):
        cache.run(PLAIN, *one_expert_each([1 + step % 2]))
    assert heat == 64
    assert cache._heat(0)[0] == 4, "halved four times"


class Nothing(AsStored):
    """A MatmulBackend that only counts traffic."""

    name, dtype, reads_choices = "nothing", torch.float32, False

    def linear(self, weights: NVFP4Tensor, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def experts(
        self, gate_up: NVFP4Tensor, down: NVFP4Tensor, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        return torch.zeros(x.shape)


def simulate(num_slots: int, tokens: int, likelihood: torch.Tensor, passes: int = 120, chosen: int = 8) -> Traffic:
    """Return the traffic of one warm layer whose tokens draw experts by their likelihood."""
    generator = torch.Generator().manual_seed(0)
    cache = ExpertCache(*stacks(len(likelihood)), num_slots, CPU)
    warm = Traffic()
    for step in range(2 * passes):
        drawn = torch.multinomial(likelihood.expand(tokens, -1), chosen, generator=generator)
        cache.run(Nothing(), torch.zeros(tokens, HIDDEN), drawn, torch.ones(tokens, chosen))
        if step + 1 == passes:
            warm = cache.traffic
    return cache.traffic.since(warm)


@pytest.fixture(scope="module")
def host_plan() -> HostPlan:
    """The 26B on a GPU of 16 GB, its projections in 4 bits too."""
    return plan_on_gpu(find_checkpoint("nvidia/diffusiongemma-26B-A4B-it-NVFP4"), find_gpu("RTX 5080")).host_plans[-1]


def test_the_plan_of_uniform_routing_equals_the_caches_copies(host_plan: HostPlan) -> None:
    """Misses of each pass times the planner's bytes per expert, and the time of both over the plan's bus."""
    experts = host_plan.experts_in_all
    assert 1 <= host_plan.experts_on_gpu < experts
    for step in host_plan.steps:
        traffic = simulate(host_plan.experts_on_gpu, step.canvas_tokens, torch.ones(experts))
        copied = traffic.misses / traffic.passes * host_plan.host_bytes / experts
        assert copied == pytest.approx(step.bus_bytes, rel=0.15), step.canvas_tokens
        scaled = Traffic(passes=traffic.passes, bytes_copied=round(copied * traffic.passes))
        planned_ms = 1e3 * step.bus_bytes / (host_plan.bus_gb_per_s * 1e9)
        assert scaled.copy_ms_per_pass(host_plan.bus_gb_per_s) == pytest.approx(planned_ms, rel=0.15)


@pytest.mark.parametrize("tokens", [1, 16])
def test_skewed_routing_costs_less(tokens: int) -> None:
    """Experts as likely as one over their rank: more of the needed ones are on the device."""
    even, skewed = (simulate(32, tokens, likelihood) for likelihood in (torch.ones(128), 1 / torch.arange(1, 129)))
    assert skewed.bytes_per_pass < 0.7 * even.bytes_per_pass
    assert skewed.hit_share > 1.2 * even.hit_share
    assert skewed.copy_ms_per_pass(20) < 0.7 * even.copy_ms_per_pass(20)


def test_traffic_of_a_bus() -> None:
    traffic = Traffic(passes=4, rounds=4, hits=30, misses=10, bytes_copied=8_000_000_000)
    assert traffic.copy_ms_per_pass(20) == pytest.approx(100)
    assert traffic.hit_share == 0.75
    assert Traffic().copy_ms_per_pass(20) == 0


def device_bytes(thing: Any, caches: list[ExpertCache]) -> int:
    """Return the bytes of every storage reachable from an object, except those of the host's stacks."""
    host = {id_of(t) for c in caches for s in c.host for t in (s.packed, s.scales, s.global_scale)}
    found: dict[int, int] = {}
    seen: set[int] = set()
    waiting = [thing]
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, type | ModuleType | FunctionType):
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            found[id_of(one)] = one.untyped_storage().nbytes()
        waiting.extend(gc.get_referents(one))
    return sum(size for ptr, size in found.items() if ptr not in host)


def id_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.fixture(scope="module")
def folder(random_model: Model, random_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors: Tensors = quantized(state_of(random_model.reference), Dialect.MODELOPT, chosen=EXPERTS_ONLY)
    return write_checkpoint(tmp_path_factory.mktemp("hosted"), random_folder, tensors)


def load(folder: Path, experts_on_device: int | None) -> Model:
    network = load_weights(folder, dtype=torch.float32, keeps_nvfp4=True, experts_on_device=experts_on_device)
    return Model(network, read_metadata(folder), consumes=True)


@pytest.mark.parametrize("experts_on_device", [1, 3, 8, 20])
def test_a_model_with_experts_on_the_host(folder: Path, experts_on_device: int) -> None:
    """Rows of the encoder and canvases, over prompts longer than a window."""
    hosted, whole = load(folder, experts_on_device), load(folder, None)
    assert whole.expert_traffic is None
    assert not whole.network.is_fixed, "plain torch reads them too"
    assert not hosted.network.is_fixed, "the host reads choices, which no CUDA graph can do"
    caches = [model.new_cache() for model in (hosted, whole)]
    rng = random.Random(0)
    for _ in range(4):
        ids = [rng.randrange(8, 8192) for _ in range(rng.randrange(1, 24))]
        canvas = torch.tensor([[rng.randrange(8, 8192) for _ in range(16)] for _ in range(2)])
        self_conditioning = torch.randn(
            canvas.numel(), hosted.network.hidden_size, generator=torch.Generator().manual_seed(0)
        )
        results = [
            (
                model.encode_all(ids, cache),
                model.decode(canvas, cache, None),
                model.decode(canvas, cache, self_conditioning),
            )
            for model, cache in zip((hosted, whole), caches, strict=True)
        ]
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
            assert experts_on_device < 8 or torch.equal(found, expected), "in one round even the bits are the same"
    traffic = hosted.expert_traffic
    assert traffic is not None
    assert traffic.passes == 12
    assert traffic.misses > 0


@pytest.mark.parametrize(
    ("mode", "experts_on_device", "steps"),
    [(Mode.DIFFUSION, 8, 4), (Mode.DIFFUSION, 3, 1), (Mode.SPECULATIVE, 3, 4), (Mode.AUTOREGRESSIVE, 3, 4)],
)
def test_it_completes_as_with_all_experts_on_the_device(
    folder: Path, vocabulary: Vocabulary, mode: Mode, experts_on_device: int, steps: int
) -> None:
    """In rounds sums differ by 1e-5, which after some steps changes a random model's draws."""
    sampling = Sampling(mode, seed=0, max_denoising_steps=steps)
    models = (load(folder, n) for n in (experts_on_device, None))
    seen: list[list[PartialAnswer]] = [[], []]
    hosted, whole = (
        Engine(model, vocabulary).complete(CONTEXT, sampling, on_partial=partials.append)
        for model, partials in zip(models, seen, strict=True)
    )
    assert hosted.text == whole.text
    assert seen[0] == seen[1], "drafts too, since a random model settles on no answer in parallel"
    assert seen[0][-1].text
    assert hosted.forward_passes == whole.forward_passes


@pytest.mark.parametrize("experts_on_device", [1, 3, 7])
def test_device_memory_shrinks_as_planned(folder: Path, experts_on_device: int) -> None:
    hosted, whole = load(folder, experts_on_device), load(folder, None)
    caches = hosted._expert_caches
    assert len(caches) == 4, "one for each layer, which encoder and decoder share"
    hosted.encode_all(list(range(8, 40)), hosted.new_cache())
    planned = read_folder(folder).bytes_of(Role.EXPERTS)
    assert sum(cache.device_bytes for cache in caches) * 8 == planned * experts_on_device
    saved = device_bytes(whole.network._layers, []) - device_bytes(hosted.network._layers, caches)
    assert saved == planned * (8 - experts_on_device) // 8 - sum(8 * cache.num_experts for cache in caches)


def test_transformers_own_modules_read_the_device_too(folder: Path) -> None:
    hosted, whole = (
        load_weights(folder, dtype=torch.float32, keeps_nvfp4=True, experts_on_device=n) for n in (3, None)
    )
    ids, canvas = torch.tensor([[2, 9, 100, 4000, 17]]), torch.tensor([[5, 77, 4321, 9]])
    with torch.inference_mode():
        logits = [n(ids, decoder_input_ids=canvas).logits for n in (hosted, whole)]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=0)
    caches = [m.cache for m in find_packed_experts(hosted) if m.cache is not None]
    assert add_up(caches).misses > 0


def test_a_gpu_gets_as_many_experts_as_fit(folder: Path, random_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = read_folder(folder)
    total, experts = plan_on_gpu(checkpoint, find_gpu("RTX 5080"), 256).total_bytes, checkpoint.bytes_of(Role.EXPERTS)
    rest = total - experts
    assert find_experts_on_device(folder, 256, total) is None
    assert not caplog.messages
    assert find_experts_on_device(folder, 256, total - 1) == 7
    assert caplog.messages[0].startswith("7 of 8 experts of each layer fit on the GPU")
    assert "too slow for ghost text (seconds for a line)" in caplog.messages[0]
    assert find_experts_on_device(folder, 256, rest + 3 * experts // 8) == 3
    assert find_experts_on_device(folder, 256, rest + 4 * experts // 8 - 1) == 3
    with pytest.raises(WeightsError, match=r"needs 1\.\d GB of GPU memory even with experts in main memory"):
        find_experts_on_device(folder, 256, rest)
    assert find_experts_on_device(random_folder, 256, 0) is None, "its experts are not in 4 bits"


def test_loading_for_a_gpu_that_is_too_small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``Model.load`` as on a GPU; the device's memory is the CPU's."""
    from fimserver.engine.kernels.backends import Choice
    from fimserver.engine.modeling import model as module

    checkpoint = read_folder(folder)
    longest = read_metadata(folder).max_prompt_tokens
    total = plan_on_gpu(checkpoint, find_gpu("RTX 5080"), longest).total_bytes
    free = total - checkpoint.bytes_of(Role.EXPERTS) // 2

    def load_here(folder: Path, *, dtype: torch.dtype, device: torch.device, **others: Any) -> Any:
        return load_weights(folder, dtype=torch.float32, **others)

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (free, 2 * free))
    monkeypatch.setattr(module, "load_weights", load_here)
    monkeypatch.setattr(module, "choose_matmul", lambda _device, _dtype, _work, **_options: Choice(PLAIN))
    loaded = Model.load(folder, torch.device("cuda"))
    assert [cache.num_slots for cache in loaded._expert_caches] == [4] * 4
    whole = load(folder, None)
    ids = [2, 9, 100, 4000, 17]
    torch.testing.assert_close(
        loaded.encode(ids, loaded.new_cache()), whole.encode(ids, whole.new_cache()), atol=1e-4, rtol=0
    )


def test_models_that_cannot_use_host_memory_are_refused(
    folder: Path, random_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, message: str, experts_on_device: int, *, keeps_nvfp4: bool = True) -> None:
        with pytest.raises(WeightsError, match=message):
            load_weights(source, dtype=torch.float32, keeps_nvfp4=keeps_nvfp4, experts_on_device=experts_on_device)

    refuse(folder, "experts_on_device is 0; it has to be at least 1", 0)
    refuse(folder, "only experts that stay in 4 bits", 3, keeps_nvfp4=False)
    refuse(random_folder, "only experts that stay in 4 bits", 3)
    needed = read_folder(folder).bytes_of(Role.EXPERTS)
    monkeypatch.setattr("fimserver.engine.loading.weights.available_bytes", lambda: needed - 1)
    refuse(folder, r"its experts take 0\.0 GB of main memory, and 0\.0 GB are free", 3)
    monkeypatch.setattr("fimserver.engine.loading.weights.available_bytes", lambda: needed)
    load_weights(folder, dtype=torch.float32, keeps_nvfp4=True, experts_on_device=3)
