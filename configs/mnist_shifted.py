"""MNIST on two CPU cores by products and shifts: orthogonal, MaxMin, EMMA loss, epsilon 1.58.

    python train.py --config=configs/mnist_shifted.py --workdir=runs/mnist_shifted
    python certify.py --workdir=runs/mnist_shifted --modes=local --nocurve --early \\
        --arithmetic=float64

Measured (seed 0, all 10,000 test images, bound local, tier probabilistic with delta 1e-6, PGD of 10
steps and one restart): clean 95.9, PGD 71.9, certified at epsilon 1.58 52.7 % executed in float64
and 41.8 % executed in float32. Training takes 11 and a half minutes on two cores.
"""

from lipjax.configs import mnist_small


def get_config():
    """As mnist_small.py, with another network and two epochs more."""
    config = mnist_small.get_config()
    del config.model.widths
    config.model.name, config.model.orthogonal = "shifted", True
    config.model.patch, config.model.width = 4, 128
    config.model.blocks, config.model.dense = 8, 256
    config.bound.shared_iterations = 2
    config.schedule.epochs, config.schedule.ramp = 14, 6.0
    config.optimizer.decay_start = 4.0
    config.evaluation.every = 2
    return config
