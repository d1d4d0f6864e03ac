"""CIFAR-10 on two CPU cores: 6C2F, MaxMin, bound global, epsilon 36/255, one cycle of 40 epochs.

    python train.py --config=configs/cifar10_cpu.py --workdir=runs/cifar10
    python certify.py --workdir=runs/cifar10 --examples=1000 --modes=local --nocurve --early \\
        --arithmetic=float32

Measured (seed 0; first 1,000 of the test set's fixed shuffle, bound local, tier probabilistic with
delta 1e-6, float32, PGD of 10 steps; the weights rounded to float16): clean 68.4, PGD 62.6,
certified 52.3 % at epsilon 36/255. Training took 75 minutes on two cores that had other work too;
undisturbed an epoch takes 61 to 63 s. A second cycle (cifar10_cpu_more.py) goes on from there.
"""

from lipjax.configs import cifar10_fast


def get_config():
    """As cifar10_fast.py, with shared norms and on a shorter schedule."""
    config = cifar10_fast.get_config()
    config.bound.mode, config.bound.shared_iterations = "global", 20
    config.schedule.epochs, config.schedule.ramp = 40, 16.0
    config.optimizer.decay_start = 16.0
    config.evaluation.every = 5
    return config
