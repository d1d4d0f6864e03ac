"""scikit-learn's bundled digits (8x8), the default: no download.

    python train.py --config=configs/digits.py --workdir=runs/digits
    python certify.py --workdir=runs/digits

Measured twice (seed 0, two CPU cores): clean 97.5, PGD 76.9 and 76.7, certified 65.0 and 64.2 % at
epsilon 0.5 (bound local, tier probabilistic with delta 1e-6, test split, float32). Training takes
half a minute (26 s, 9 of them compilation), certifying a minute.

The other experiments start from this file and change fields. All fields, with what they mean and
their defaults, are in lipjax/training/config.py.
"""

from lipjax import training


def get_config():
    """The defaults, which are those of the digits; what makes this experiment is said once more."""
    config = training.default_config()
    config.data.name = "digits"
    config.model.name = "small_conv"
    config.model.activation = "clipped_maxmin"
    config.epsilon.train, config.epsilon.test = 0.55, 0.5
    config.schedule.epochs, config.schedule.ramp = 100, 40.0
    config.optimizer.learning_rate, config.optimizer.final_learning_rate = 5e-3, 1e-5
    config.optimizer.decay_start = 50.0
    return config
