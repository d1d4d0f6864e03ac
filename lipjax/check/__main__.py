"""``python -m lipjax.check FILE --workdir=RUN``"""

from lipjax.check.checker import main

raise SystemExit(main())
