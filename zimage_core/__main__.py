"""`python -m zimage_core` is `zimage`."""

from .cli import main

raise SystemExit(main())
