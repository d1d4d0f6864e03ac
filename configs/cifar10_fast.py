"""CIFAR-10 in minutes on a GPU: 6C2F, MaxMin, BCP loss, epsilon 36/255, one cycle of 56 epochs.

    python train.py --config=configs/cifar10_fast.py --workdir=runs/cifar10
    python certify.py --workdir=runs/cifar10 --examples=1000 --modes=local --nocurve --early \\
        --arithmetic=float32

Measured (seed 0, one H100, 102 s of steps; first 1,000 of the test set's fixed shuffle, bound
local, tier probabilistic with delta 1e-6, float32, PGD of 100 steps and 5 restarts; the weights
rounded to float16): clean 73.9, PGD 66.3, certified 52.4 % at epsilon 36/255, 55.0 % but for the
rounding of float32 that the error model allows (docs/results.md). On two CPU cores it takes 4.7
hours by the time of a step; that was not run.
"""

from lipjax.configs import cifar10_maxmin


def get_config():
    """As cifar10_maxmin.py, without thresholds and on a shorter schedule."""
    config = cifar10_maxmin.get_config()
    config.model.activation = "maxmin"
    config.schedule.epochs, config.schedule.warmup, config.schedule.ramp = 56, 0.0, 22.0
    config.optimizer.learning_rate, config.optimizer.final_learning_rate = 2e-3, 1e-5
    config.optimizer.rise, config.optimizer.decay_start = 2.0, 22.0
    config.optimizer.decay = "cosine"
    config.evaluation.every = 8
    config.vectors.dtype = "bfloat16"
    return config
