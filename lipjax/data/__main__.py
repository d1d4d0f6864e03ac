"""``python -m lipjax.data NAME`` prepares a set of TFDS."""

from lipjax.data.tfds import main

raise SystemExit(main())
