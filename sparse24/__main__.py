"""The command line: python -m sparse24 explain | doctor | bench."""

from .compiler.command import main

raise SystemExit(main())
