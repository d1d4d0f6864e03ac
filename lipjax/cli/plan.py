"""Prints what a configuration needs, before anything runs: memory, operations, a range of times.

lipjax plan --config=cifar10_maxmin --device=h200 --devices=8
"""

from absl import flags

from lipjax.cli import common
from lipjax.data import sets
from lipjax.training import plan
from lipjax.training.data_sheets import DEVICES

# These say what is wrong and what to do.
ERRORS = (sets.DataError, ValueError, OSError)


def define_flags(values: flags.FlagValues, prefix: str = "", when: str = "") -> None:
    """The flags; with a prefix and a remark those of ``train.py --plan``."""
    if not prefix:
        common.define_config(values)
    own = {"flag_values": values}
    kinds = ", ".join((*DEVICES, "cpu"))
    flags.DEFINE_string(f"{prefix}device", None, f"{when}{kinds}; default: this.", **own)
    flags.DEFINE_integer(
        f"{prefix}devices", None, f"{when}how many; default: those here.", lower_bound=1, **own
    )
    flags.DEFINE_integer(
        f"{prefix}examples", None, f"{when}size of the training set.", lower_bound=2, **own
    )
    flags.DEFINE_list(f"{prefix}shape", None, f"{when}height,width,channels of the images.", **own)
    flags.DEFINE_integer(f"{prefix}classes", None, f"{when}how many classes.", lower_bound=2, **own)
    flags.DEFINE_bool(
        f"{prefix}compile",
        False,
        f"{when}ask XLA for a step's temporary memory, on the devices here.",
        **own,
    )


def main(options: flags.FlagValues, prefix: str = "") -> None:
    """Prints the plan."""

    def given(name):
        return options[prefix + name].value

    config = options.config
    config.lock()
    sizes = plan.sizes_of(config, given("examples"), given("shape"), given("classes"))
    print(plan.planned(config, sizes, given("devices"), given("device"), compiled=given("compile")))
