"""A plan, never trained: ImageNet at 224x224, `small_conv` behind 7x7 patches, clipped MaxMin, BCP
loss.

    python train.py --config=configs/imagenet.py --plan --plan_device=v5e --plan_devices=64
    python train.py --config=configs/imagenet.py --plan --plan_device=h200 --plan_devices=8

There is no accuracy to expect: no setting was tried. The patches make maps of 32x32, as CIFAR-10
has, because vectors of single examples at 224x224 would take terabytes (benchmarks/README.md,
"ImageNet, on paper").
"""

from lipjax.configs import cifar10_maxmin


def get_config():
    """As cifar10_maxmin.py, with a net and a batch for 224x224."""
    config = cifar10_maxmin.get_config()
    config.batch_size = 512
    config.data.name = "imagenet2012"
    config.data.image_size = 224  # shorter side 256, central square
    config.data.validation_fraction = 0.01
    config.model.name = "small_conv"
    config.model.stem = 7
    config.model.widths = (64, 128, 256)
    config.model.dense = 512
    config.model.threshold = 1.0
    config.schedule.epochs, config.schedule.warmup, config.schedule.ramp = 90, 0.0, 45.0
    config.optimizer.decay_start = 50.0
    return config
