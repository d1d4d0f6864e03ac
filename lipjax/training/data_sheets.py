"""What data sheets say of the devices that a plan can be made for, and which one is here."""

import dataclasses
import os

import jax


@dataclasses.dataclass(frozen=True)
class Device:
    """One device, by its data sheet.

    Attributes:
        memory: bytes.
        usable: share of the memory that JAX takes for arrays by default.
        bandwidth: of the memory, bytes a second; None: not known.
        peak: operations a second in `arithmetic`, what JAX takes for float32 products by default;
            dense.
        per_host: devices of one host.
        source: publisher and document.
    """

    name: str
    platform: str
    memory: int
    usable: float
    bandwidth: float | None
    peak: float
    arithmetic: str
    per_host: int
    source: str


def _nvidia(name, gigabytes, bandwidth, tf32, source):
    # 0.75: JAX documentation, "GPU memory allocation" (XLA_PYTHON_CLIENT_MEM_FRACTION). TF32 on
    # these GPUs and bfloat16 on TPUs is what float32 products are by default: JAX documentation,
    # "Matmul precision".
    return Device(name, "gpu", gigabytes * 10**9, 0.75, bandwidth, tf32, "tf32", 8, source)


def _tpu(name, memory, bandwidth, bfloat16, per_host):
    source = f"Google Cloud documentation, {name}"
    return Device(name, "tpu", memory, 1.0, bandwidth, bfloat16, "bfloat16", per_host, source)


# NVIDIA's data sheets of H100 and H200 give the rates of tensor cores "with sparsity": half of them
# is dense.
DEVICES = {
    "h100": _nvidia("NVIDIA H100 SXM", 80, 3.35e12, 989e12 / 2, "NVIDIA, H100 data sheet"),
    "h200": _nvidia("NVIDIA H200 SXM", 141, 4.8e12, 989e12 / 2, "NVIDIA, H200 data sheet"),
    "a100": _nvidia("NVIDIA A100 SXM 80GB", 80, 2.039e12, 156e12, "NVIDIA, A100 data sheet"),
    "v4": _tpu("TPU v4", 32 * 2**30, 1.2e12, 275e12, 4),
    "v5e": _tpu("TPU v5e", 16 * 10**9, 819e9, 197e12, 8),
    "v5p": _tpu("TPU v5p", 95 * 2**30, 2.765e12, 459e12, 4),
}

# What a part of the name that JAX gives a device means.
KINDS = {"H100": "h100", "H200": "h200", "A100": "a100", "v5 lite": "v5e", "v5e": "v5e"}
KINDS |= {"v5": "v5p", "v4": "v4"}


def device_of(name: str, devices: int = 1) -> Device:
    """The device of that name in `DEVICES`, or "cpu": one of `devices` that share two cores and
    this machine's memory.

    Raises:
        ValueError: an unknown name, with the known ones.
    """
    if name == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // devices
        # 450 GFlop/s: products of matrices on two cores, measured (benchmarks/README.md).
        rate, source = 450e9 / devices, "measured (benchmarks/README.md)"
        return Device(
            "CPU, two cores as measured",
            "cpu",
            memory,
            1.0,
            None,
            rate,
            "float32",
            devices,
            source,
        )
    if name not in DEVICES:
        raise ValueError(f"no device is called {name!r}; there are {', '.join(DEVICES)}, cpu.")
    return DEVICES[name]


def device_here() -> str:
    """The name, for `device_of`, of the devices that JAX sees.

    Raises:
        ValueError: a kind that has no data sheet here, with the known names.
    """
    first = jax.devices()[0]
    if first.platform == "cpu":
        return "cpu"
    for part, name in KINDS.items():
        if part in first.device_kind:
            return name
    raise ValueError(
        f"no data sheet of {first.device_kind!r} is here: say which device of "
        f"{', '.join(DEVICES)}, cpu comes nearest."
    )
