"""The same bytes as the libraries whose checkpoints are read and written: ModelOpt, compressed-tensors, torchao."""

import warnings
from collections.abc import Iterator

import pytest
import torch

from fimserver.engine.kernels.nvfp4 import Dialect, dequantize, quantize, to_parts

SIZES = [1.0, 0.02, 300.0]
SHAPES = [(1, 16), (7, 48), (128, 256)]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Hide the warnings of other packages while they are imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def weights_of(shape: tuple[int, int], size: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    random = torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0])) * size
    random[:, :4] *= 20  # some blocks are unlike the others
    return random.to(dtype)


@pytest.mark.slow("compares with three other libraries")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modelopt_writes_these_bytes(shape: tuple[int, int], size: float, dtype: torch.dtype) -> None:
    module = pytest.importorskip("modelopt.torch.quantization.qtensor.nvfp4_tensor", exc_type=ImportError)
    weights = weights_of(shape, size, dtype)
    ours = quantize(weights)
    theirs, scales, global_scale = module.NVFP4QTensor.quantize(weights.clone(), 16)
    assert torch.equal(theirs._quantized_data, ours.packed)
    assert torch.equal(scales.view(torch.uint8), ours.scales.view(torch.uint8))
    assert torch.equal(global_scale.reshape(1), ours.global_scale)


@pytest.mark.parametrize("shape", SHAPES)
def test_modelopt_reads_these_bytes(shape: tuple[int, int]) -> None:
    module = pytest.importorskip("modelopt.torch.quantization.qtensor.nvfp4_tensor", exc_type=ImportError)
    ours = quantize(weights_of(shape, 0.02))
    tensor = module.NVFP4QTensor(torch.Size(shape), torch.float32, ours.packed)
    read = tensor.dequantize(scale=ours.scales, double_scale=ours.global_scale, block_sizes={-1: 16})
    assert torch.allclose(read.float(), dequantize(ours), rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [0.0, 1e-40, 1e-9])
def test_modelopt_rounds_edges_alike(value: float) -> None:
    module = pytest.importorskip("modelopt.torch.quantization.qtensor.nvfp4_tensor", exc_type=ImportError)
    weights = torch.full((2, 32), value)
    weights[0, 0] = 1.0  # ModelOpt divides by zero where all are zeros
    theirs, scales, _ = module.NVFP4QTensor.quantize(weights.clone(), 16)
    ours = quantize(weights)
    assert torch.equal(theirs._quantized_data, ours.packed)
    assert torch.equal(scales.view(torch.uint8), ours.scales.view(torch.uint8))


def test_all_ties_are_rounded_alike_everywhere() -> None:
    """Half-way numbers under a scale of one: ModelOpt, compressed-tensors, torchao."""
    modelopt = pytest.importorskip("modelopt.torch.quantization.qtensor.nvfp4_tensor", exc_type=ImportError)
    compressed = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers", exc_type=ImportError)
    torchao = pytest.importorskip("torchao.prototype.mx_formats.kernels", exc_type=ImportError)
    halves = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    weights = torch.cat((halves, -halves))[None]
    one = torch.tensor([1.0])
    ours = quantize(weights, global_scale=one)
    assert torch.equal(ours.scales.float(), torch.ones(1, 1))
    theirs, _, _ = modelopt.NVFP4QTensor.quantize(weights.clone(), 16, weights_scaling_factor_2=one)
    assert torch.equal(theirs._quantized_data, ours.packed)
    packed = compressed.quantize_and_pack_fp4(weights, torch.ones(1, 1), global_scale=one, group_size=16)
    assert torch.equal(packed, ours.packed)
    assert torch.equal(torchao.pack_uint4(torchao.f32_to_f4_unpacked(weights)), ours.packed)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_compressed_tensors_packs_and_unpacks_these_bytes(shape: tuple[int, int], size: float) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers", exc_type=ImportError)
    weights = weights_of(shape, size)
    ours = quantize(weights)
    parts = to_parts("m", ours, Dialect.COMPRESSED_TENSORS)
    inverse = parts["m.weight_global_scale"]
    packed = helpers.quantize_and_pack_fp4(weights, ours.scales.float(), global_scale=inverse, group_size=16)
    assert torch.equal(packed, parts["m.weight_packed"])
    read = helpers.unpack_fp4_from_uint8(parts["m.weight_packed"], *shape)
    step = (ours.scales.float() / inverse).repeat_interleave(16, dim=1)
    assert torch.allclose(read.float() * step, dequantize(ours), rtol=1e-6, atol=0)


def test_compressed_tensors_decompresses_these_parts() -> None:
    nvfp4 = pytest.importorskip("compressed_tensors.compressors.nvfp4", exc_type=ImportError)
    quantization = pytest.importorskip("compressed_tensors.quantization", exc_type=ImportError)
    ours = quantize(weights_of((32, 64), 0.02))
    parts = to_parts("m", ours, Dialect.COMPRESSED_TENSORS)
    arguments = quantization.QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments)
    state = nvfp4.NVFP4PackedCompressor.decompress({n.removeprefix("m."): t for n, t in parts.items()}, scheme)
    assert torch.allclose(state["weight"].float(), dequantize(ours), rtol=2**-7, atol=0)  # theirs is in bf16


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_torchao_writes_these_bytes(shape: tuple[int, int], size: float) -> None:
    """From float32: it multiplies by a rounded reciprocal, so ties, which bf16 has many of, may fall otherwise."""
    module = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor", exc_type=ImportError)
    weights = weights_of(shape, size)
    ours = quantize(weights)
    theirs = module.NVFP4Tensor.to_nvfp4(weights, per_tensor_scale=module.per_tensor_amax_to_scale(weights.abs().max()))
    assert torch.equal(theirs.qdata.view(torch.uint8), ours.packed)
    assert torch.equal(theirs.scale.view(torch.uint8).reshape(ours.scales.shape), ours.scales.view(torch.uint8))
    assert torch.allclose(theirs.dequantize(torch.float32), dequantize(ours), rtol=1e-6, atol=0)
