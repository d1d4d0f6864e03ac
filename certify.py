"""Certifies a trained network: ``python certify.py --workdir=runs/digits``.

The same as ``lipjax certify``. What happens, in its order: `lipjax.cli.certify`.
"""

from lipjax.cli import certify, common

if __name__ == "__main__":
    common.run(certify)
