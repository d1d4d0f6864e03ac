"""CIFAR-10 on two CPU cores, a second cycle: from the network of cifar10_cpu.py, EMMA loss, 36
epochs.

    python train.py --config=configs/cifar10_cpu.py --workdir=runs/cifar10
    lipjax export runs/cifar10 --out=cifar10.safetensors
    python train.py --config=configs/cifar10_cpu_more.py --config.start=cifar10.safetensors \\
        --workdir=runs/cifar10-more
    python certify.py --workdir=runs/cifar10-more --examples=1000 --modes=global,local --nocurve \\
        --early --arithmetic=float32
"""

from lipjax.configs import cifar10_cpu


def get_config():
    """As cifar10_cpu.py, with another loss, no rise of epsilon, and a margin for rounding."""
    config = cifar10_cpu.get_config()
    config.bound.loss = "emma"
    # Above the radius that is certified: float32's error model takes a share of each margin.
    config.epsilon.train = 0.17
    config.schedule.epochs, config.schedule.ramp = 36, 0.0
    config.optimizer.learning_rate, config.optimizer.rise = 1.2e-3, 1.0
    config.optimizer.decay_start = 4.0
    config.evaluation.every = 4
    return config
