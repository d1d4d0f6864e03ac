"""``python -m lipjax.data NAME`` prepares a set of TFDS."""

from lipjax.data.sets import main

raise SystemExit(main())
