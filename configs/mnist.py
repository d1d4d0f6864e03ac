"""The published MNIST experiment: 4C3F, clipped ReLU, GloRo loss, epsilon 1.58.

    python train.py --config=configs/mnist.py --workdir=runs/mnist
    python certify.py --workdir=runs/mnist

Published (Huang et al. 2021, power-iteration estimates, not measured here): clean 96.3, PGD 78.2,
verified 55.8 %.
300 epochs are days on two CPU cores: a GPU's work. Downloads MNIST through TFDS, or takes the four
original archives from --config.data.manual_dir.
"""

from lipjax.configs import digits


def get_config():
    """As digits.py, with METHOD 6's settings for MNIST."""
    config = digits.get_config()
    config.batch_size = 256
    config.data.name = "mnist"
    config.model.name = "conv4_dense3"
    config.model.activation = "clipped_relu"
    del config.model.threshold  # published thresholds
    config.epsilon.train, config.epsilon.test = 1.75, 1.58
    config.schedule.epochs, config.schedule.warmup, config.schedule.ramp = 300, 0.0, 150.0
    config.optimizer.learning_rate, config.optimizer.final_learning_rate = 1e-3, 5e-6
    config.optimizer.decay_start = 175.0
    config.bound.loss, config.bound.iterations = "gloro", 5
    config.vectors.dtype = "bfloat16"
    return config
