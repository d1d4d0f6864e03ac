"""What the first call of a process costs, with nothing compiled before, and the second.

    python -m benchmarks.first_call
    python -m benchmarks.first_call --network=mnist-maxmin --examples=20 --tier=deterministic

Certifies random images, predictions as labels, in this process with JAX's cache off. Prints
seconds of both calls, how many programs the first one compiled, and the seconds that it traced,
lowered and compiled; with --programs the longest of them.
"""

import argparse
import time

import jax
import numpy as np

import lipjax
from lipjax import bounds

STAGES = {
    "/jax/core/compile/jaxpr_trace_duration": "traced",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowered",
    "/jax/core/compile/backend_compile_duration": "compiled",
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="digits-maxmin", help="as `lipjax.load` takes it")
    parser.add_argument("--examples", type=int, default=100)
    parser.add_argument("--epsilon", type=float, default=0.5)
    parser.add_argument("--tier", default="probabilistic", choices=lipjax.certificates.TIERS)
    parser.add_argument("--mode", default="local", choices=(*bounds.MODES, "auto"))
    parser.add_argument("--programs", type=int, default=0, help="print so many, the longest")
    options = parser.parse_args(arguments)

    jax.config.update("jax_enable_compilation_cache", False)
    seen: dict[str, list[tuple[float, str]]] = {name: [] for name in STAGES.values()}

    def listen(event: str, seconds: float, **facts) -> None:
        if event in STAGES:
            seen[STAGES[event]].append((seconds, facts.get("fun_name", "")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    network = lipjax.load(options.network)
    shape = lipjax.storage.description(lipjax.pretrained.path(options.network))["input_shape"]
    images = np.random.default_rng(0).random((options.examples, *shape), np.float32)
    labels = np.argmax(network(images), axis=-1)

    for call in ("first", "second"):
        for found in seen.values():
            found.clear()
        began = time.perf_counter()
        certificate = lipjax.certify(
            network,
            images,
            labels,
            options.epsilon,
            tier=options.tier,
            mode=options.mode,
            seed=0,
        )
        seconds = time.perf_counter() - began
        parts = ", ".join(
            f"{name} {sum(s for s, _ in found):.1f} s" for name, found in seen.items()
        )
        print(f"{call} call: {seconds:.1f} s ({parts}; {len(seen['compiled'])} programs)")
        if call == "first":
            for taken, name in sorted(seen["compiled"], reverse=True)[: options.programs]:
                print(f"    {taken:.2f} s  {name}")
    print(certificate)


if __name__ == "__main__":
    main()
