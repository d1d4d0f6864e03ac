"""The commands behind the name `lipjax` (`entry`), one module for each of the larger ones."""
