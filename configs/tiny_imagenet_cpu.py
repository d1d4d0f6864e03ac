"""TinyImageNet on two CPU cores: a small net, MaxMin, EMMA loss, bound global, epsilon 36/255.

    python train.py --config=configs/tiny_imagenet_cpu.py --workdir=runs/tiny
    python certify.py --workdir=runs/tiny --examples=1000 --modes=local --nocurve --early

A first look, not a recipe. On a tenth of the set (seed 0, 1,000 validation images of 200 classes,
bound local, tier probabilistic with delta 1e-6, float32): clean 15.1, PGD 11.7, certified 5.7 %.
Unpack tiny-imagenet-200.zip and give its folder: --config.data.name=folder:<path>.
"""

from lipjax.configs import mnist_small


def get_config():
    """As mnist_small.py, with a wider net that takes 64 x 64 images apart in patches first."""
    config = mnist_small.get_config()
    config.data.name = "folder:tiny-imagenet-200"
    config.data.augment = True
    config.model.stem = 4
    config.model.widths = (64, 128)
    config.model.dense = 256
    config.epsilon.train, config.epsilon.test = 0.155, 36 / 255
    config.schedule.epochs, config.schedule.ramp = 40, 16.0
    config.optimizer.rise, config.optimizer.decay_start = 2.0, 16.0
    config.evaluation.every = 5
    return config
