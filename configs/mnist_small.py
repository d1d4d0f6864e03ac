"""MNIST on a laptop: a small net, clipped MaxMin, BCP loss, epsilon 0.5 and 1.58.

    python train.py --config=configs/mnist_small.py --workdir=runs/mnist_small
    python certify.py --workdir=runs/mnist_small --examples=500 --modes=local --nocurve --early
    python certify.py --workdir=runs/mnist_small --examples=500 --modes=local --nocurve --early \\
        --epsilon=0.5

Measured (seed 0, first 500 images of the test set's fixed shuffle, bound local, tier probabilistic
with delta 1e-6, PGD of 100 steps and 5 restarts; before batches were drawn from stripes): clean
90.0 %; at epsilon 1.58 PGD 51.4, certified 26.0 %; at 0.5 PGD 80.4, certified 70.8 %. 0.17 s a step
on two CPU cores, 154 s in all; each certification about a minute and a half.

Twenty epochs, which is `lipjax.load("mnist-maxmin")` (seed 0, the same 500 images, tier and
attack): clean 93.8 %; at epsilon 1.58 PGD 61.8, certified 36.0 %; at 0.5 PGD 87.0, certified
82.8 %:

    python train.py --config=configs/mnist_small.py --config.schedule.epochs=20 \\
        --config.schedule.ramp=10.0 --config.optimizer.learning_rate=2e-3 \\
        --config.optimizer.decay_start=12.0 --workdir=runs/mnist
    python certify.py --workdir=runs/mnist --examples=500

Downloads MNIST through TFDS, or takes the four original archives from --config.data.manual_dir.
"""

from lipjax.configs import digits


def get_config():
    """As digits.py, on MNIST."""
    config = digits.get_config()
    config.batch_size = 256
    config.data.name = "mnist"
    config.model.widths = (8, 16)
    config.model.dense = 64
    config.epsilon.train, config.epsilon.test = 1.7, 1.58
    config.schedule.epochs, config.schedule.ramp = 4, 2.5
    config.optimizer.learning_rate, config.optimizer.final_learning_rate = 4e-3, 1e-5
    config.optimizer.decay_start = 2.5
    config.evaluation.every = 1
    config.evaluation.iterations = 10
    config.checkpoints.every = 1
    config.vectors.dtype = "bfloat16"
    return config
