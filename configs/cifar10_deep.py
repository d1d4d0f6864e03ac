"""CIFAR-10 on a GPU: a deep convolutional network, MaxMin, bound global, epsilon 36/255."""

from lipjax.configs import cifar10_fast


def get_config():
    """As cifar10_fast.py, with `deep_conv` and norms that all images share."""
    config = cifar10_fast.get_config()
    config.model.name = "deep_conv"
    config.bound.mode, config.bound.shared_iterations = "global", 10
    config.optimizer.learning_rate = 1e-3
    return config
