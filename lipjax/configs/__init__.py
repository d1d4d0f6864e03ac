"""The configurations that come with lipjax.

In a checkout they lie in `configs` at its top, where people edit them; an installation has that
folder in the place of this file.
"""

from pathlib import Path

__path__.append(str(Path(__file__).resolve().parents[2] / "configs"))
