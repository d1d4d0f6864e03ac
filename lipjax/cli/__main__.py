"""``python -m lipjax.cli`` is the command `lipjax`, where that is not installed."""

from lipjax.cli.entry import main

if __name__ == "__main__":
    raise SystemExit(main())
