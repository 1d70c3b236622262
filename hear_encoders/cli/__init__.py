"""Commands: `hear-embed`, `hear-map`, `hear-weights`, and embedding a corpus under torchrun."""
