"""`python -m geochat.data.prepare`."""

from geochat.data.prepare import main

raise SystemExit(main())
