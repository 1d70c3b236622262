"""Commands: `hear-embed`, `hear-embed-corpus`, `hear-map` and `hear-weights`."""
