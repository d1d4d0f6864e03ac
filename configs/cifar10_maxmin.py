"""The published CIFAR-10 experiment: 6C2F, clipped MaxMin, BCP loss, epsilon 36/255.

    python train.py --config=configs/cifar10_maxmin.py --workdir=runs/cifar10
    python certify.py --workdir=runs/cifar10 --examples=1000

Published (Huang et al. 2021, power-iteration estimates, not measured here): clean 77.4, PGD 70.4,
verified 60.7 %. 800 epochs are a GPU's work. The power-iteration vectors of 45,000 training images
take 5.1 GB as float8 (20.5 GB as float32): --config.vectors.dtype. Downloads CIFAR-10 through TFDS;
    from files: --config.data.name=npz:train.npz,test.npz.
"""

from lipjax.configs import digits


def get_config():
    """As digits.py, with METHOD 6's settings for CIFAR-10."""
    config = digits.get_config()
    config.batch_size = 256
    config.data.name = "cifar10"
    config.data.augment = True
    config.model.name = "conv6_dense2"
    config.model.activation = "clipped_maxmin"
    del config.model.threshold  # published thresholds
    config.epsilon.train, config.epsilon.test = 0.1551, 36 / 255
    config.schedule.epochs, config.schedule.warmup, config.schedule.ramp = 800, 20.0, 400.0
    config.optimizer.learning_rate, config.optimizer.final_learning_rate = 1e-3, 1e-6
    config.optimizer.decay_start = 425.0
    config.vectors.dtype = "float8_e4m3fn"
    return config
