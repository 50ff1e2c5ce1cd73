"""``python -m token_sparse_attention.cli`` is `tsa`."""

import sys

from token_sparse_attention.cli import main

sys.exit(main())
