"""`python -m kdqat`."""

from kdqat.cli.main import main

main()
