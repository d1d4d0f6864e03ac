"""Trains a network: ``python train.py --config=configs/digits.py --workdir=runs/digits``.

The same as ``lipjax train``. What happens, in its order: `lipjax.cli.train`.
"""

from lipjax.cli import common, train

if __name__ == "__main__":
    common.run(train)
