"""MNIST on a laptop: a small net, MaxMin, EMMA loss, bound global, epsilon 1.58 and 0.5.

    python train.py --config=configs/mnist_small.py --workdir=runs/mnist
    python certify.py --workdir=runs/mnist --examples=500
    python certify.py --workdir=runs/mnist --examples=500 --nocurve --epsilon=0.5

Measured, which is `lipjax.load("mnist-maxmin")` (seed 0, first 500 images of the test set's fixed
shuffle, bound local, tier probabilistic with delta 1e-6, float32, PGD of 100 steps and 5 restarts):
clean 93.6 %; at epsilon 1.58 PGD 61.6, certified 42.8 %; at 0.5 PGD 89.2, certified 87.0 %.
Training takes seven minutes on two busy CPU cores.

Downloads MNIST through TFDS, or takes the four original archives from --config.data.manual_dir.
"""

from lipjax.configs import digits


def get_config():
    """As digits.py, on MNIST, in one cycle of the learning rate."""
    config = digits.get_config()
    config.batch_size = 256
    config.data.name = "mnist"
    config.model.widths = (8, 16)
    config.model.dense = 64
    config.model.activation = "maxmin"
    config.epsilon.train, config.epsilon.test = 1.7, 1.58
    config.bound.mode, config.bound.shared_iterations, config.bound.loss = "global", 20, "emma"
    config.schedule.epochs, config.schedule.ramp = 12, 5.0
    config.optimizer.learning_rate, config.optimizer.final_learning_rate = 2e-3, 1e-5
    config.optimizer.rise, config.optimizer.decay_start = 0.5, 5.0
    config.optimizer.decay = "cosine"
    config.evaluation.every, config.evaluation.iterations = 3, 10
    config.checkpoints.every = 1
    return config
