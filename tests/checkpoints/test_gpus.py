"""Names of GPUs: whole names only, those of the driver, and what a memory or a bandwidth decides."""

import pytest

from fimserver.checkpoints.gpus import COMMON, GPUS, describe_gpu, find_gpu, find_reported
from fimserver.errors import FimserverError

GIB, MIB = 2**30, 2**20


@pytest.mark.parametrize(
    ("name", "memory", "bandwidth", "capability"),
    [
        ("RTX 4060", 8, 272, "8.9"),
        ("4060", 8, 272, "8.9"),
        ("RTX 4060 Ti 8 GB", 8, 288, "8.9"),
        ("4060 ti 16gb", 16, 288, "8.9"),
        ("RTX 5070", 12, 672, "12.0"),
        ("5060 Ti 16 GB", 16, 448, "12.0"),
        ("4080 Super", 16, 736, "8.9"),
        ("5090 Laptop", 24, 896, "12.0"),
        ("GeForce RTX 5090 Laptop GPU", 24, 896, "12.0"),
        ("RTX 5090", 32, 1792, "12.0"),
        ("A6000", 48, 768, "8.6"),
        ("RTX A6000", 48, 768, "8.6"),
        ("RTX 6000 Ada Generation", 48, 960, "8.9"),
        ("RTX PRO 6000", 96, 1792, "12.0"),
        ("L4", 22.5, 300, "8.9"),
        ("L40S", 45, 864, "8.9"),
        ("L40S 48 GB", 45, 864, "8.9"),
        ("A100 40 GB", 40, 1555, "8.0"),
        ("A100-SXM4-80GB", 80, 2039, "8.0"),
        ("H100 SXM", 80, 3350, "9.0"),
        ("H100 PCIe", 80, 2000, "9.0"),
        ("H200", 141, 4800, "9.0"),
        ("B200", 180, 8000, "10.0"),
        ("DGX Spark", 119.2, 273, "12.1"),
        ("nvidia geforce rtx4090", 24, 1008, "8.9"),
    ],
)
def test_a_whole_name_is_one_product(name: str, memory: float, bandwidth: float, capability: str) -> None:
    gpu = find_gpu(name)
    assert (gpu.memory_gib, gpu.bandwidth_gb_per_s, gpu.compute_capability) == (memory, bandwidth, capability)


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("RTX 4060 Ti", ["RTX 4060 Ti 8 GB (8 GB, 288 GB/s)", "RTX 4060 Ti 16 GB (16 GB, 288 GB/s)"]),
        ("5060 Ti", ["RTX 5060 Ti 8 GB", "RTX 5060 Ti 16 GB"]),
        ("A100", ["A100 40 GB", "A100 PCIe 80 GB", "A100 SXM 80 GB"]),
        ("A100 80GB", ["A100 PCIe 80 GB", "A100 SXM 80 GB"]),
        ("H100", ["H100 PCIe (80 GB, 2000 GB/s)", "H100 SXM (80 GB, 3350 GB/s)", "H100 NVL (94 GB, 3900 GB/s)"]),
        ("RTX 6000", ["RTX A6000", "RTX 6000 Ada", "RTX PRO 6000", "RTX PRO 6000 Max-Q"]),
    ],
)
def test_a_shared_name_is_an_error_that_lists_the_products(name: str, choices: list[str]) -> None:
    with pytest.raises(FimserverError, match="more than one product; name one of") as raised:
        find_gpu(name)
    for choice in choices:
        assert choice in str(raised.value)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("RTX 406", "RTX 4060 "),
        ("RTX 40", "RTX 4070 Super"),
        ("RTX 5095", "RTX 5090 "),
        ("RTX 4090 Ti", "RTX 4090 "),
        ("RTX 4060 16 GB", "RTX 4060 Ti 16 GB"),
        ("RTX 5090 D", "RTX 5090 "),
        ("L40", "L40S"),
        ("A10", "A100 40 GB"),
        ("H20", "H200"),
        ("RTX", "known are: RTX 3050 6 GB"),
        ("", "known are:"),
    ],
)
def test_an_unknown_name_is_never_another_product(name: str, nearest: str) -> None:
    with pytest.raises(FimserverError, match="is not in the table") as raised:
        find_gpu(name)
    assert nearest in str(raised.value)


def test_memory_or_bandwidth_chooses_among_products() -> None:
    assert find_gpu("RTX 4060 Ti", memory_gib=16).name == "RTX 4060 Ti 16 GB"
    assert find_gpu("A100", memory_gib=40).name == "A100 40 GB"
    assert find_gpu("H100", bandwidth_gb_per_s=3350).name == "H100 SXM"
    assert find_gpu("RTX 6000", memory_gib=48, bandwidth_gb_per_s=960).name == "RTX 6000 Ada"
    with pytest.raises(FimserverError, match=r"A100 PCIe 80 GB .*A100 SXM 80 GB"):
        find_gpu("A100", memory_gib=80)
    with pytest.raises(FimserverError, match=r"no GPU 'RTX 4090' has that memory or bandwidth; .*24 GB, 1008 GB/s"):
        find_gpu("RTX 4090", memory_gib=48)


@pytest.mark.parametrize(
    "name",
    [
        *("RTX 2080", "NVIDIA GeForce RTX 2080 Ti", "RTX 2070 SUPER", "GTX 1660 Ti", "GTX 1080", "Quadro RTX 6000"),
        *("NVIDIA GeForce RTX 2080 with Max-Q Design", "Quadro P2000", "NVIDIA T1000 8GB", "GTX 1080 Ti"),
        *(
            "Tesla T4",
            "T4",
            "Tesla V100-SXM2-16GB",
            "TITAN RTX",
            "P100",
            "MX450",
            "Tesla M60",
            "V100-PCIE-32GB",
            "TITAN Xp",
        ),
        *("NVIDIA GeForce GTX 1060 6GB", "RTX 2080 Ti 11 GB", "Quadro K620", "Quadro GV100", "NVIDIA T600 Laptop GPU"),
    ],
)
def test_gpus_without_bf16_are_not_supported(name: str) -> None:
    with pytest.raises(FimserverError, match=r"computes no bf16, which needs compute capability 8\.0"):
        find_gpu(name)
    assert find_reported(name, 0) is None


@pytest.mark.parametrize(
    "name",
    [
        *(
            "M4 Max",
            "Apple M3 Ultra",
            "M1",
            "V620",
            "Radeon Pro V620",
            "P5",
            "T5",
            "MX570",
            "A30",
            "RTX 6090",
            "Titan 2",
        ),
        *("RX 580", "Arc B580", "MI300X", "M60", "2090", "RTX 2000 Ada Generation", "RTX 3050 Ti Laptop GPU"),
    ],
)
def test_other_gpus_that_are_not_listed_are_unknown(name: str) -> None:
    with pytest.raises(FimserverError, match="is not in the table"):
        find_gpu(name)


@pytest.mark.parametrize(
    ("name", "mebibytes", "listed"),
    [
        ("NVIDIA GeForce RTX 4060 Ti", 16380, "RTX 4060 Ti 16 GB"),
        ("NVIDIA GeForce RTX 4060 Ti", 8188, "RTX 4060 Ti 8 GB"),
        ("NVIDIA GeForce RTX 4080 SUPER", 16376, "RTX 4080 Super"),
        ("NVIDIA GeForce RTX 3060", 12288, "RTX 3060 12 GB"),
        ("NVIDIA GeForce RTX 5090", 32607, "RTX 5090"),
        ("NVIDIA GeForce RTX 5090 Laptop GPU", 24463, "RTX 5090 Laptop"),
        ("NVIDIA RTX A6000", 49140, "RTX A6000"),
        ("NVIDIA RTX 6000 Ada Generation", 49140, "RTX 6000 Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 97887, "RTX PRO 6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 97887, "RTX PRO 6000 Max-Q"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 97887, "RTX PRO 6000 Server"),
        ("NVIDIA L4", 23034, "L4"),
        ("NVIDIA L40S", 46068, "L40S"),
        ("NVIDIA A100-PCIE-40GB", 40960, "A100 40 GB"),
        ("NVIDIA A100-SXM4-40GB", 40960, "A100 40 GB"),
        ("NVIDIA A100 80GB PCIe", 81920, "A100 PCIe 80 GB"),
        ("NVIDIA A100-SXM4-80GB", 81920, "A100 SXM 80 GB"),
        ("NVIDIA H100 PCIe", 81559, "H100 PCIe"),
        ("NVIDIA H100 80GB HBM3", 81559, "H100 SXM"),
        ("NVIDIA H100 NVL", 95830, "H100 NVL"),
        ("NVIDIA H200", 143771, "H200"),
        ("NVIDIA H200 NVL", 143771, "H200 NVL"),
        ("NVIDIA GeForce RTX 4050 Laptop GPU", 6141, "RTX 4050 Laptop"),
        ("NVIDIA GeForce RTX 5060 Laptop GPU", 8151, "RTX 5060 Laptop"),
        ("NVIDIA GeForce RTX 5070 Laptop GPU", 8151, "RTX 5070 Laptop"),
        ("NVIDIA B200", 183359, "B200"),
        ("NVIDIA GB10", 0, "DGX Spark"),
        ("NVIDIA A10", 23028, None),
        ("NVIDIA GeForce RTX 5090 D", 32607, None),
        ("NVIDIA GeForce RTX 4090", 49140, None),  # with memory that the maker does not sell
        ("NVIDIA H100", 81559, None),  # PCIe or SXM
    ],
)
def test_names_of_the_driver(name: str, mebibytes: int, listed: str | None) -> None:
    found = find_reported(name, mebibytes * MIB)
    assert (found and found.name) == listed


def test_every_name_of_the_table_finds_itself() -> None:
    for gpu in GPUS:
        assert find_gpu(gpu.name) is gpu
        assert find_gpu(f"NVIDIA GeForce {gpu.name.upper()}") is gpu
        assert min(gpu.memory_gib, gpu.bandwidth_gb_per_s, gpu.bf16_tflops) > 0
        assert float(gpu.compute_capability) >= 8.0
    assert len({gpu.name for gpu in GPUS}) == len(GPUS)
    assert {find_gpu(name).name for name in COMMON} == set(COMMON)


def test_a_described_gpu_has_the_assumed_bus() -> None:
    gpu = describe_gpu(20, 500)
    assert gpu.name == "a GPU of 20 GB and 500 GB/s"
    assert (gpu.usable_bytes, gpu.pcie_gb_per_s, gpu.bf16_tflops) == (int(20 * GIB * 0.98), 31.5, 0)
